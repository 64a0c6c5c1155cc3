"""What a checkpoint of ViT-S/16 costs the training: written in the background against written in the loop.

The wait is that of `Run._save`: the look for numbers that are not finite, and the copy or the file.

python benchmarks/saving.py [--out FOLDER] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from smkd import api
from smkd.engine import run_folder, writer
from smkd.engine.checkpoint import bytes_of, first_not_finite
from smkd.engine.step import Learner
from smkd.engine.writer import Writer
from smkd.machine import free_memory

WAYS = {"loop": lambda: 0, "background": free_memory}
"""How much memory is said to be free."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder on the disk to write to; none: a temporary one")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    config = api.resolve("mini-imagenet-distill", ["init=random"])
    learner = Learner.create(config, 64, torch.device("cpu"), None)
    for parameter in learner.pair.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    megabytes = bytes_of(learner.state()) / 1e6
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=given.out) as name:
        out = Path(name)
        (out / "config.yaml").touch()
        for way, free in WAYS.items():
            writer.free_memory = free
            waits = []
            for number in range(given.rounds):
                with Writer() as under_way:
                    start = time.perf_counter()
                    state = {**learner.state(), "epoch": 1, "step": number, "step_in_epoch": 1}
                    assert first_not_finite(state) is None
                    under_way.write(
                        state, lambda it: run_folder.keep_checkpoint(it, out / "checkpoints", config, is_best=False)
                    )
                    waits.append(time.perf_counter() - start)
            found[way] = statistics.median(waits)
            print(f"{way}: the training waits {found[way]:.2f} s (median of {given.rounds}), {megabytes:.0f} MB")
    found["ratio"] = found["loop"] / found["background"]
    print(f"{found['ratio']:.1f} x shorter")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
