"""Looking at data once: within a run, what was found in a root or a folder is remembered and not looked for again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

Found = TypeVar("Found")
_remembered: ContextVar[dict[Hashable, Any] | None] = ContextVar("remembered", default=None)


@contextmanager
def opened_once() -> Iterator[None]:
    """Within this, also as a decorator, each data set is looked at once; one inside another adds nothing.

    Training, validation and measuring see the same images so, whatever is added to the folder meanwhile.
    """
    if _remembered.get() is not None:
        yield
        return
    token = _remembered.set({})
    try:
        yield
    finally:
        _remembered.reset(token)


def once(key: Hashable, look: Callable[[], Found]) -> Found:
    """What `look` finds; within `opened_once`, what it found at the first call with this key."""
    known = _remembered.get()
    if known is None:
        return look()
    if key not in known:
        known[key] = look()
    found: Found = known[key]
    return found
