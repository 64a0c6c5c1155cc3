"""Waiting for the processes of a run."""

from __future__ import annotations

import os
from typing import Any

from smkd.engine.launch import _first_end


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
