"""Other processes: how many may be started, which one speaks, how they end with their parent, and why one died."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import TextIO

from smkd.errors import DataError, SmkdWarning
from smkd.files import printable
from smkd.machine import cores

GUARD = 'start it below `if __name__ == "__main__":` (the main guard), in a script that is a file'
DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (.+?)\.|exited)")
"""PyTorch's message about a loading process that ended."""
CUT_OFF = (ConnectionResetError, ConnectionRefusedError, EOFError)
"""What is seen of a process that ends while it hands an image over."""
BUSY = """import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
print(flush=True)
while True: pass"""
"""A program that keeps a core busy until its parent ends."""
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
    """`count`, or 0 in a daemon process, which may not start processes."""
    return 0 if multiprocessing.current_process().daemon else count


def default_jobs() -> int:
    """Number of processes that read images: one for each core of this process, at most 16. 1 means no other process."""
    return max(1, allowed(min(16, cores())))


def end_with_parent(_: int = 0) -> None:
    """End this process when its parent is killed. Workers call it at their start; the number of the worker is ignored.

    PyTorch's loaders watch their parent too, but they do not notice a kill while they start or while a worker is busy.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def heed_only_parent() -> None:
    """Leave signals to all processes of a job to the one that started this one: it needs batches for its step.

    Its own SIGTERM ends this process. For the start of a worker, before it has other threads.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def follow() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()


def end_where_unguarded() -> None:
    """End this process if it is importing a script without a main guard, which would start processes without end.

    The process that started it sees exit code `NO_GUARD` and prints the message."""
    # set while a new process imports the script, and by nothing else
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(NO_GUARD)


@contextmanager
def deaths_named() -> Iterator[None]:
    """Turn PyTorch's error about a loading process that was killed into one line.

    Raises:
        DataError: a loading process ended; names the process and the signal.
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
    """Hold Ctrl-C back until the block ends. Processes started in it hear it once they call `end_at_interrupts`."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_at_interrupts() -> None:
    """From now on, end this process at Ctrl-C at once and without a message; its parent prints the message."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that keep a core busy each, as other users of the machine would."""
    words = [sys.executable, "-c", BUSY]
    running = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in running:
            process.kill()
            process.communicate()
