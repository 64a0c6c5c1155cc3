"""Short runs and their files, for tests of what interrupts and damages them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smkd import api
from smkd.engine.step import Learner

OUT = Path("run")
"""Relative: a checkpoint names its folder, and those of two places are to be equal."""
WORDS = (
    f"out={OUT}", "data.limit_per_class=3", "batch_size=64", "epochs=3", "head.num_prototypes=16", "head.hidden_dim=16",
)  # fmt: skip
UNMEASURED = "validation.every=0"
MEASURED = ("validation.every=1", "validation.episodes=9", "validation.query=2", "validation.shots=[1]")
STEPS = 3
"""Of an epoch."""


def settings(*words: str) -> list[str]:
    """Of a short run with these words, measured unless they say otherwise."""
    return [*WORDS, *(() if UNMEASURED in words else MEASURED), *words]


def run(*words: str, recipe: str = "debug-pretrain") -> Path:
    config = api.resolve(recipe, settings(*words))
    return api.pretrain(config) if config.phase == "pretrain" else api.distill(config)


def two_phases(folder: Path) -> None:
    """Short runs of both phases on patterns: `one` and `two`."""
    words = ("data.limit_per_class=4", "batch_size=64", "epochs=2", "validation.episodes=20", "log_every=2")
    with contextlib.chdir(folder):
        api.pretrain(api.resolve("patterns-pretrain", ["out=one", *words]))
        api.distill(api.resolve("patterns-distill", ["out=two", "init=one", *words]))


def files() -> dict[str, bytes]:
    """The checkpoints."""
    return {path.name: path.read_bytes() for path in (OUT / "checkpoints").iterdir()}


def records() -> list[dict[str, Any]]:
    """What metrics.jsonl says, but for times."""
    lines = [json.loads(line) for line in (OUT / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "seconds", "images_per_second")} for line in lines]


def same(first: Any, second: Any) -> bool:
    """Whether nested containers hold equal tensors and values."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Do something in the midst of a step of the next run, counted from 1."""
    real, count = Learner.step, 0

    def counted(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count == step:
            act()
        return real(*given)

    monkeypatch.setattr(Learner, "step", counted)
