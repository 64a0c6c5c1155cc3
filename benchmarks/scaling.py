"""What a phase-2 step costs as the batch, the pairs, the prototypes and the crops grow: one `smkd bench` for each row.

The baseline is the first row; FLOPs are counted and exact, times are as noisy as the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BASE = ["batch_size=16", "model.size=tiny", "global_views.size=96", "local_views.size=48", "head.num_prototypes=2048"]


def sampler(classes: int, per_class: int) -> list[str]:
    """Settings of a batch of that many images of each class."""
    return [f"data.sampler.classes={classes}", f"data.sampler.per_class={per_class}"]


def frozen(last: int) -> list[str]:
    """Settings under which the last blocks alone are trained; nothing is read from what `init` names."""
    return [f"model.train_blocks=last:{last}", "init=trained"]


ROWS = {
    "base: batch 16, 4 a class, 2048 prototypes, 2 + 10 crops": [],
    "batch 8": ["batch_size=8", *sampler(2, 4)],
    "batch 32": ["batch_size=32", *sampler(8, 4)],
    "1 image a class (own views only)": sampler(16, 1),
    "2 images a class": sampler(8, 2),
    "8 images a class": sampler(2, 8),
    "16 images of one class": sampler(1, 16),
    "512 prototypes": ["head.num_prototypes=512"],
    "8192 prototypes": ["head.num_prototypes=8192"],
    "no local crops": ["local_views.count=0"],
    "4 local crops": ["local_views.count=4"],
    "no patch term": ["objective.patch.weight=0"],
    "recompute=true": ["recompute=true"],
    "the last 6 of 12 blocks trained": frozen(6),
    "the last 3 of 12 blocks trained": frozen(3),
    "the last block trained": frozen(1),
}


def measured(words: list[str], steps: int) -> dict[str, Any]:
    """The result of `smkd bench` with these settings, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "smkd", "bench", "mini-imagenet-distill", *BASE, *words]
        subprocess.run([*command, "--steps", str(steps), "--json", str(file)], check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(file.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="for every row, such as model.size=small")
    parser.add_argument("--rows", metavar="WORD", default="", help="only the base and rows that contain this word")
    given = parser.parse_args()
    result = []
    print("| | GFLOP an image | ms an image | objective, ms an image | ratio to base | peak memory, GB |")
    print("|---|---|---|---|---|---|")
    for name, words in ROWS.items():
        if result and given.rows not in name:
            continue
        found = measured([*given.settings, *words], given.steps)
        each = {
            "name": name, "gflop": found["gflop_per_image"], "ms": 1e3 / found["images_per_second"],
            "objective_ms": found["parts_ms"]["objective"] / found["batch_size"], "peak_gb": found["peak_memory_gb"],
        }  # fmt: skip
        result.append(each)
        each["ratio"] = each["ms"] / result[0]["ms"]
        print(
            f"| {name} | {each['gflop']:.2f} | {each['ms']:.0f} | {each['objective_ms']:.1f} | {each['ratio']:.2f} "
            f"| {each['peak_gb']:.2f} |", flush=True,
        )  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
