"""Worker processes: how many may be started, that they end with the process that started them, what one died of, and
which of them speaks, how."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import TextIO

from smkd.errors import DataError, SmkdWarning
from smkd.files import cores, printable

GUARD = 'start it below `if __name__ == "__main__":` (the main guard), in a script that is a file'
DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (.+?)\.|exited)")
"""What PyTorch says of it."""
CUT_OFF = (ConnectionResetError, ConnectionRefusedError, EOFError)
"""What is seen of a process that ends while it hands an image over."""
NO_GUARD = 3
"""Exit code of a process that found itself in a script without a main guard."""


def is_first_rank() -> bool:
    """Whether this process speaks to the user: of several that train together one does."""
    return os.environ.get("RANK", "").strip() in ("", "0")


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:  # fmt: skip
    """For `warnings.showwarning`: ours as one line, as the command line prints them; others in Python's form."""
    ours = issubclass(category, SmkdWarning)
    text = warnings.formatwarning(message, category, filename, lineno, line)
    print(f"smkd: {printable(str(message))}\n" if ours else text, file=file or sys.stderr, end="", flush=True)


def allowed(count: int) -> int:
    """As many processes as this one may start: none from a daemon process, which may have no children."""
    return 0 if multiprocessing.current_process().daemon else count


def default_jobs() -> int:
    """Processes that look at images: one for each core this process may use, at most 16; 1 is this process alone."""
    return max(1, allowed(min(16, cores())))


def end_with_parent(_: int = 0) -> None:
    """End this process when its parent is killed; nobody else would. For the start of a worker, whatever its number.

    The watch of PyTorch's loaders misses a kill while they start, and one while a worker is busy for long.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def end_where_unguarded() -> None:
    """End a process that a script without a main guard would start again and again; who started it says so."""
    # set while a new process imports the script, and by nothing else
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(NO_GUARD)


@contextmanager
def deaths_named() -> Iterator[None]:
    """Turn PyTorch's account of a loading process that was killed into one line.

    Raises:
        DataError: names the process and the signal.
    """
    try:
        yield
    except (RuntimeError, *CUT_OFF) as error:
        found = DEATH.search(str(error)) or (_death() if isinstance(error, CUT_OFF) else None)
        if found is None:
            raise
        fault = f"was killed ({found[2].strip()})" if found[2] else "ended"
        hint = "out of memory? use fewer with num_workers="
        if multiprocessing.get_start_method() != "fork":
            hint += f"; or {GUARD}"
        raise DataError(f"process {found[1]}, which reads images, {fault}: {hint}") from error


def _death() -> re.Match[str] | None:
    """What PyTorch says of a loading process that is gone, if one is."""
    import torch

    for _ in range(20):
        try:
            # also from the handler of the system's signal, whenever that comes
            torch._C._error_if_any_worker_fails()
            time.sleep(0.02)
        except RuntimeError as error:
            return DEATH.search(str(error))
    return None


@contextmanager
def interrupts_later() -> Iterator[None]:
    """Ctrl-C waits; processes that are started meanwhile hear it from `end_at_interrupts` on."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_at_interrupts() -> None:
    """End this process at Ctrl-C at once and without a word: the process that started it answers."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
