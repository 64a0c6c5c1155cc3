"""When a run stops or saves between two steps: signals, and the time."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

from smkd import distributed
from smkd.errors import Stopped

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
SAVE, TIME_IS_UP = 1, 75
"""What `Watch.asked` answers besides 128 + a signal's number; 75 is the exit code of sysexits.h for 'try again'."""
TOGETHER = 2.0
"""Seconds; a signal so soon after the first is the same request, which several senders have passed on."""


class Interrupted(Exception):  # noqa: N818  # it went as asked
    """A signal came in a part of the run that a signal may cut short."""


class Listener:
    """While it is entered, the first SIGTERM, SIGUSR1 or SIGINT is a request; a later one does what it did before.

    In another thread than the main one signals stay as they are.

    Attributes:
        received: number of the signal that was the request; 0 if none came.
    """

    def __init__(self) -> None:
        self.received, self.received_at = 0, 0.0
        self.before: dict[int, Any] = {}

    def heard(self, number: int) -> None:
        """Called with the request."""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self.received_at = number, time.monotonic()
            self.heard(number)
        elif time.monotonic() - self.received_at > TOGETHER:
            self.__exit__()
            signal.raise_signal(number)


class Watch(Listener):
    """Listens for signals and looks at the clock; all processes of a run get the same answer.

    Args:
        save_minutes: between two checkpoints.
        max_hours: after which the run stops; none is never.
    """

    def __init__(self, save_minutes: float, max_hours: float | None) -> None:
        super().__init__()
        self.save_after, self.saved_at = 60 * save_minutes, time.monotonic()
        self.end = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self.may_interrupt = False

    def heard(self, number: int) -> None:
        """End what may be interrupted."""
        if self.may_interrupt:
            raise Interrupted

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A part that a signal ends with `Interrupted`."""
        self.may_interrupt = True
        try:
            if self.received:
                raise Interrupted
            yield
        finally:
            self.may_interrupt = False

    def asked(self) -> int:
        """Answer of all processes together: 0 to go on, SAVE, or an exit code to stop with after saving."""
        now = time.monotonic()
        own = 0
        if distributed.is_main():
            if self.end is not None and now > self.end:
                own = TIME_IS_UP
            elif now - self.saved_at > self.save_after:
                own = SAVE
        if self.received:
            own = 128 + self.received
        return distributed.largest(own)

    def saved(self) -> None:
        """A checkpoint has been written."""
        self.saved_at = time.monotonic()


def stopped(code: int, done: str) -> Stopped:
    """The exception that ends a run.

    Args:
        code: as `Watch.asked` answers.
        done: what is saved, such as 'step 12 of 300'.
    """
    cause = "max_hours is over" if code == TIME_IS_UP else f"stopped by {signal.Signals(code - 128).name}"
    return Stopped(f"{cause}: {done} is saved, and the same command goes on from there", code)
