"""Training steps of both phases, ViT-S/16 at 2 x 224 + 10 x 96: smkd against the plain step of plain_step.py.

Each side runs in a fresh process, so that it has its own peak of memory. The plain step is in float32, with attention
written out; smkd runs in float32 and, if that is another, in the precision it picks here.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from plain_step import PlainStep
from smkd import api
from smkd.device import autocast_type, keep_freed_memory
from smkd.engine.bench import synthetic_views
from smkd.engine.optim import rates_at
from smkd.engine.step import Learner

RECIPES = {"phase 1": "mini-imagenet-pretrain", "phase 2": "mini-imagenet-distill"}
CPU = torch.device("cpu")
CLASSES = 64


def measure(side: str, recipe: str, batch: int, steps: int) -> dict[str, float]:
    """Images a second and peak memory of one side; the loss of the first step tells that both compute the same."""
    config = api.resolve(recipe, [f"batch_size={batch}", "model.drop_path=0", "accelerator=cpu"])
    if side != "plain":
        keep_freed_memory()
    learner = Learner.create(config, CLASSES, CPU, None if side != "auto" else autocast_type("auto", CPU))
    views, rates, plain = synthetic_views(config, CPU), rates_at(config, config.epochs // 2, 1), PlainStep(learner)
    losses, seconds = [], []
    for _ in range(1 + steps):
        start = time.perf_counter()
        if side == "plain":
            losses.append(plain(views, rates))
        else:
            losses.append(float(learner.step([views], rates).losses["loss"]))
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"images_per_second": batch / min(seconds[1:]), "peak_gb": peak, "loss": losses[0]}


def in_process(*words: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="timed steps, after one to warm up")
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "RECIPE"))
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measure(*given.side, given.batch, given.steps)))
        return
    low = autocast_type("auto", CPU)
    sides = ["plain", "fp32", *(["auto"] if low is not None else [])]
    result: dict[str, dict[str, dict[str, float]]] = {}
    for phase, recipe in RECIPES.items():
        words = ("--batch", str(given.batch), "--steps", str(given.steps))
        found = {side: in_process(*words, "--side", side, recipe) for side in sides}
        assert abs(found["fp32"]["loss"] / found["plain"]["loss"] - 1) < 1e-4, found
        for side in sides[1:]:
            found[side]["ratio"] = found[side]["images_per_second"] / found["plain"]["images_per_second"]
            name = "smkd, fp32" if side == "fp32" else f"smkd, {str(low).removeprefix('torch.')}"
            print(
                f"{phase}, batch {given.batch}: plain {found['plain']['images_per_second']:.2f} images/s "
                f"{found['plain']['peak_gb']:.2f} GB; {name} {found[side]['images_per_second']:.2f} images/s "
                f"{found[side]['peak_gb']:.2f} GB: {found[side]['ratio']:.2f} x"
            )
        result[phase] = found
    print(json.dumps(result))


if __name__ == "__main__":
    main()
