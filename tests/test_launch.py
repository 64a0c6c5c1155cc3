"""Waiting for the processes of a run."""

from __future__ import annotations

import gc
import importlib
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from smkd import api
from smkd.engine import launch
from smkd.engine.launch import _first_end
from smkd.engine.step import Learner
from smkd.engine.train import train


class Ending:
    """A process that ends between two looks at it; its sentinel is ready then, as a closed pipe is."""

    def __init__(self, code: int | None = 0) -> None:
        self.code, self.looks = code, 0
        self.sentinel, other = os.pipe()
        os.close(other)

    @property
    def exitcode(self) -> int | None:
        self.looks += 1
        return None if self.looks == 1 else self.code


def test_all_may_end_between_two_looks() -> None:
    workers: list[Any] = [Ending(), Ending()]
    assert _first_end(workers) == [0, 0]


def test_one_that_failed_ends_the_wait() -> None:
    workers: list[Any] = [Ending(None), Ending(2)]
    assert _first_end(workers) == [None, 2]


def test_networks_are_gone_when_training_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the garbage collector: a wrapper that outlives its process group may abort the process."""
    made, create = [], Learner.create

    def noted(*args: Any) -> Learner:
        learner = create(*args)
        made.append(weakref.ref(learner))
        return learner

    monkeypatch.setattr(Learner, "create", noted)
    words = ["epochs=1", "batch_size=8", "data.limit_per_class=1", "validation.every=0", f"out={tmp_path / 'run'}"]
    importlib.import_module("torch._dynamo")  # the first optimiser's; it leaves frames to the collector
    gc.disable()
    try:
        train(api.resolve("debug-pretrain", words))
        assert [reference() for reference in made] == [None]
    finally:
        gc.enable()


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [launch._threads_each(processes) for processes in (2, 3, 16)] == [4, 2, 1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as the user set it
    assert launch._threads_each(2) == 1
