"""Checkpoints are written in the background: the training waits only until its state is copied."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Self

import torch

from smkd.engine.checkpoint import bytes_of
from smkd.machine import free_memory

State = dict[str, Any]

SPARE = 2
"""Copies of the state that must fit into the free memory."""


class Writer:
    """Writes one state after another in a thread; where memory does not allow a copy, at once.

    Leaving it waits for the last one.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is not None:
            self._thread.join()
        if kind is None:
            self.check()

    def write(self, state: State, write: Callable[[State], None]) -> None:
        """Write a state, after the one before is written.

        Args:
            state: nested dictionaries, lists and tuples; they and their tensors may change at once.
            write: called with the state, or with a copy on the CPU.

        Raises:
            SmkdError: the one before, or this one where it is written at once, could not be written.
        """
        self.wait()
        free = free_memory()
        if free is None or free < SPARE * bytes_of(state):
            write(state)
            return
        self._thread = threading.Thread(target=self._run, args=(copied(state, {}), write), name="checkpoint")
        self._thread.start()

    def _run(self, state: State, write: Callable[[State], None]) -> None:
        try:
            write(state)
        except BaseException as error:  # raised in the loop
            self._error = error

    def wait(self) -> None:
        """Wait until everything is written; raises as `check`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the error of a state that could not be written, once."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def copied(value: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
    """Nested containers with copies of their tensors on the CPU; tensors that share memory share it in the copy, too.

    Args:
        value: dictionaries, lists, tuples, tensors, and values that do not change.
        storages: copies so far, by the place in memory of what they are copies of.
    """
    if isinstance(value, dict):
        return {key: copied(part, storages) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(part, storages) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    storage = value.untyped_storage()
    if storage.data_ptr() not in storages:
        storages[storage.data_ptr()] = storage.clone() if value.device.type == "cpu" else storage.cpu()
    copy = torch.empty(0, dtype=value.dtype)
    return copy.set_(storages[storage.data_ptr()], value.storage_offset(), value.size(), value.stride())
