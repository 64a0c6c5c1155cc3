"""One writer for a folder: a lock of the operating system that ends with the process that holds it, however it ends.

It is a record lock (`fcntl.lockf`), which NFS carries from machine to machine where its lock service runs and which
worker processes do not inherit. It cannot see a second start within the same process, and where a file system or
system has no such locks (a line says so) nothing keeps two processes apart.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from smkd.errors import ConfigError

NAME = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)


@contextlib.contextmanager
def held(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Be the only writer of a folder, which is made if need be, and taken away again if it is still empty.

    Args:
        folder: the folder.
        say: told in one line where there are no locks.

    Raises:
        ConfigError: another process writes there; names its host and process.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={folder} is a file, not a folder")
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    file = _locked(folder / NAME, say)
    try:
        yield
    finally:
        if file is not None:
            # gone before it is free, so that nobody locks a file that no longer has a name
            with contextlib.suppress(OSError):
                (folder / NAME).unlink(missing_ok=True)
            os.close(file)
        with contextlib.suppress(OSError):  # one that holds something stays
            for place in missing:
                place.rmdir()


def _locked(path: Path, say: Callable[[str], None]) -> int | None:
    try:
        import fcntl
    except ImportError:
        path.parent.mkdir(parents=True, exist_ok=True)
        say("this system has no file locks: see to it that no other process writes to this run")
        return None
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another start has just taken its empty folder away
            continue
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is(file, path):  # its last holder has just removed it
                os.close(file)
                continue
            os.ftruncate(file, 0)
            os.write(file, f"{socket.gethostname()} {os.getpid()}\n".encode())
        except OSError as error:
            holder = os.pread(file, 1000, 0).decode(errors="replace").split()
            os.close(file)
            if error.errno in HELD:
                who = f"process {holder[1]} on {holder[0]}" if len(holder) == 2 else "another process"
                raise ConfigError(
                    f"'{path.parent}' is being written by {who}; wait for its end, or choose another out="
                ) from error
            say(f"no lock on '{path}' ({error.strerror}): see to it that no other process writes to this run")
            return None
        return file


def _is(file: int, path: Path) -> bool:
    """Whether an open file is the one that has this name."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file), there)
