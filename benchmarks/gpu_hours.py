"""GPU hours and memory of the paper's runs, worked out: counted FLOPs over the peak of a card times an assumed share.

Nothing is timed. FLOPs are counted without computing anything (PyTorch's meta device), kept activations on the CPU, and
images come from the class lists. The share of the peak that training reaches is an assumption (`--share`), which
`smkd bench` replaces by a measurement on the card.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from memory import SPARE_GB, kept_gb
from smkd import api
from smkd.config.run_config import RunConfig
from smkd.engine.bench import synthetic_views
from smkd.engine.optim import rates_at
from smkd.engine.step import Learner
from smkd.prepare.registry import class_list, count

DATA = ("mini-imagenet", "tiered-imagenet", "cifar-fs", "fc100")
PHASES = ("pretrain", "distill")
NOWHERE = torch.device("meta")
GPUS = 8
COUNTED = 64
"""Images of the counted step; phase 1 depends on their masks a little."""
MB_OF_CROPS = 0.6
"""Crops of an image as bytes, which lie on the device for all passes of a step (docs/performance.md)."""
LOADING_MS = {"JPEG": 3.0, "cache": 1.4}
"""Processor time of an image's crops on one thread (docs/data.md; `python benchmarks/data.py --rounds 7`)."""


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet.

    Attributes:
        memory_gb: of the card.
        tflops: peak of dense bfloat16 products with float32 sums, without sparsity.
    """

    memory_gb: int
    tflops: float


CARDS = {"RTX 3090": Card(24, 71), "A100 80 GB": Card(80, 312), "H100 SXM": Card(80, 989)}


def gflop_an_image(config: RunConfig) -> float:
    """Counted products of one training step, by image: student forward and backward, teacher forward, objective.

    On the CPU PyTorch's counter misses the products within attention, about a twentieth; here it has all of them.
    """
    learner, views = Learner.create(config, 64, NOWHERE, None), [synthetic_views(config, NOWHERE)]
    counter = FlopCounterMode(display=False)
    # the meta device knows no autocast, which changes no count
    with mock.patch("torch.autocast", return_value=contextlib.nullcontext()), counter:
        learner.step(views, rates_at(config, config.epochs // 2, 1))
    return counter.get_total_flops() / config.batch_size / 1e9


def passes(card: Card, images: int, gb_an_image: float, fixed_gb: float) -> int | None:
    """The smallest power of two of passes for so many images a step that leaves `SPARE_GB`; None if none does."""
    for exponent in range(images.bit_length()):
        if memory_gb(images, 2**exponent, gb_an_image, fixed_gb) <= card.memory_gb - SPARE_GB:
            return 2**exponent
    return None


def memory_gb(images: int, passes: int, gb_an_image: float, fixed_gb: float) -> float:
    """Weights, gradients, optimiser, crops of the step, and what a pass keeps for its backward pass."""
    return fixed_gb + images * MB_OF_CROPS / 1024 + images / passes * gb_an_image


def span(low: float, high: float) -> str:
    """Two numbers as 12-25, with two digits that mean something."""

    def short(number: float) -> str:
        return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"

    return f"{short(low)}-{short(high)}"


def runs(gflop: dict[str, float]) -> list[dict[str, Any]]:
    """Length and products of each run of the paper's tables."""
    found = []
    for data in DATA:
        for phase in PHASES:
            config = api.resolve(f"{data}-{phase}", [])
            images = count(class_list(data))["train"].images
            steps = images // config.batch_size * config.epochs
            exaflop = steps * config.batch_size * gflop[phase] / 1e9
            found.append({"recipe": f"{data}-{phase}", "images": images, "epochs": config.epochs, "steps": steps,
                          "gflop_an_image": gflop[phase], "exaflop": exaflop})  # fmt: skip
    return found


def print_runs(found: list[dict[str, Any]], low: float, high: float) -> None:
    cards = " | ".join(f"{name}, 1 / {GPUS}" for name in CARDS)
    print(f"hours at {high:.0%} to {low:.0%} of the peak, on 1 and on {GPUS} cards, all epochs\n")
    print(f"| recipe | steps | EFLOP | {cards} |")
    print("|---|---|---|" + "---|" * len(CARDS))
    for each in found:
        hours = {name: [each["exaflop"] * 1e6 / card.tflops / share / 3600 for share in (high, low)]
                 for name, card in CARDS.items()}  # fmt: skip
        each["hours"] = hours
        cells = " | ".join(f"{span(*of)} / {span(*(hour / GPUS for hour in of))}" for of in hours.values())
        print(f"| `{each['recipe']}` | {each['steps']:,} | {each['exaflop']:,.2f} | {cells} |")


def print_memory(kept: dict[str, tuple[float, float]], batch: int) -> None:
    print(f"\n| phase | card | 1 card: `accumulate`, GB | {GPUS} cards: `accumulate`, GB on each |")
    print("|---|---|---|---|")
    for phase, of in kept.items():
        for name, card in CARDS.items():
            cells = []
            for images in (batch, batch // GPUS):
                needed = passes(card, images, *of)
                assert needed is not None
                cells.append(f"{needed}, {memory_gb(images, needed, *of):.0f}")
            print(f"| {phase} | {name} | {' | '.join(cells)} |")


def print_loading(gflop: dict[str, float], low: float, high: float) -> None:
    print("\n| card | images/s of phase 1 | " + " | ".join(f"cores to load from {name}" for name in LOADING_MS) + " |")
    print("|---|---|" + "---|" * len(LOADING_MS))
    for name, card in CARDS.items():
        speeds = [share * card.tflops * 1e3 / gflop["pretrain"] for share in (low, high)]
        cores = " | ".join(span(*(speed * ms / 1e3 for speed in speeds)) for ms in LOADING_MS.values())
        print(f"| {name} | {span(*speeds)} | {cores} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, nargs=2, default=(0.2, 0.4), metavar=("LOW", "HIGH"))
    given = parser.parse_args()
    low, high = given.share
    if not 0 < low <= high <= 1:
        parser.error("--share needs two numbers above 0, at most 1, the smaller first")
    configs = {phase: api.resolve(f"mini-imagenet-{phase}", [f"batch_size={COUNTED}"]) for phase in PHASES}
    gflop = {phase: gflop_an_image(config) for phase, config in configs.items()}
    kept = {}
    for phase in PHASES:
        (two, fixed), (four, _) = (kept_gb(f"mini-imagenet-{phase}", False, images) for images in (2, 4))
        kept[phase] = ((four - two) / 2, fixed)
    found = runs(gflop)
    print("an estimate: " + ", ".join(f"{phase} {number:.1f} GFLOP an image" for phase, number in gflop.items()))
    print_runs(found, low, high)
    print_memory(kept, api.resolve("mini-imagenet-pretrain", []).batch_size)
    print_loading(gflop, low, high)
    print(json.dumps({"share": [low, high], "runs": found, "kept_gb_an_image": {p: k[0] for p, k in kept.items()}}))


if __name__ == "__main__":
    main()
