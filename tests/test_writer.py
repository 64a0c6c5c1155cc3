"""States are written in the background, as they were when the writing was asked for."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from smkd.engine import writer
from smkd.engine.checkpoint import save_checkpoint
from smkd.engine.writer import Writer
from smkd.errors import CheckpointError

MUCH = 10**12


@pytest.fixture(autouse=True)
def _memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "free_memory", lambda: MUCH)


def state() -> dict[str, Any]:
    shared = torch.arange(6.0)
    return {"a": shared, "b": [shared[2:].view(2, 2).T, 3], "empty": torch.empty(0), "c": {"deep": (torch.ones(2),)}}


def test_the_loop_goes_on_and_may_change_what_is_written() -> None:
    free, seen = threading.Event(), []

    def write(given: dict[str, Any]) -> None:
        free.wait(10)
        seen.append(given)

    ours = state()
    with Writer() as under_way:
        under_way.write(ours, write)
        assert seen == []
        ours["a"].zero_()
        ours["b"][1] = 4
        free.set()
        under_way.wait()
        assert seen[0]["a"].tolist() == [0, 1, 2, 3, 4, 5]
        assert seen[0]["b"][0].tolist() == [[2, 4], [3, 5]]
        assert seen[0]["b"][1] == 3


def test_the_file_is_that_of_the_state_itself(tmp_path: Path) -> None:
    """Also where tensors share their memory."""
    save_checkpoint(state(), tmp_path / "itself" / "a.pt")
    with Writer() as under_way:
        under_way.write(state(), lambda given: save_checkpoint(given, tmp_path / "background" / "a.pt"))
    assert (tmp_path / "background" / "a.pt").read_bytes() == (tmp_path / "itself" / "a.pt").read_bytes()


def test_one_is_written_after_the_other() -> None:
    order: list[int] = []
    with Writer() as under_way:
        for number in range(20):
            under_way.write({}, lambda _, number=number: order.append(number))
    assert order == list(range(20))


def fail(_: dict[str, Any]) -> None:
    raise CheckpointError("full")


@pytest.mark.parametrize("at", ["check", "wait", "write", "end"])
def test_an_error_is_raised_once_in_the_loop(at: str) -> None:
    under_way, written = Writer(), []
    under_way.write({}, fail)
    assert under_way._thread is not None
    under_way._thread.join()
    with pytest.raises(CheckpointError, match="full"):
        {
            "check": under_way.check, "wait": under_way.wait, "write": lambda: under_way.write({}, written.append),
            "end": lambda: under_way.__exit__(None),
        }[at]()  # fmt: skip
    under_way.write({"now": 1}, written.append)
    under_way.wait()
    assert written == [{"now": 1}]


def test_another_error_is_not_hidden() -> None:
    under_way = Writer()
    under_way.write({}, fail)
    under_way.__exit__(KeyError)


@pytest.mark.parametrize("free", [None, 39])
def test_without_memory_for_two_copies_it_is_written_at_once(free: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "free_memory", lambda: free)
    ours, written = {"a": torch.zeros(5)}, []
    Writer().write(ours, written.append)
    assert written[0] is ours
    monkeypatch.setattr(writer, "free_memory", lambda: 40)
    with Writer() as under_way:
        under_way.write(ours, written.append)
    assert written[1] is not ours
