"""All processes of a run see one folder and go on from one state; with one process there is nothing to compare."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from smkd import distributed
from smkd.engine.run_folder import FoundCheckpoint
from smkd.errors import ConfigError
from smkd.files import explained

MARK = ".shared"
"""File that the first process writes for a moment, to see whether the others can read it."""
PATIENCE = 30.0
"""Seconds in which a file that one machine has written must be seen by the others; network disks may show it late."""


class SeenState(NamedTuple):
    """The state of a run that a process sees and would go on from.

    Attributes:
        host: name of its machine.
        path: the checkpoint; none for a new run.
        epoch, step: of the checkpoint.
        digest: of the checksums in it, which its reader has compared with the content.
    """

    host: str
    path: str | None = None
    epoch: int = 0
    step: int = 0
    digest: int = 0


def check_shared(out: Path) -> None:
    """Make sure that all processes see the folder of the run; the first one has made it.

    Raises:
        ConfigError: on all processes, if one does not; names it and its machine.
    """
    if distributed.world_size() == 1:
        return
    mark, word = out / MARK, secrets.token_hex(8)
    if distributed.is_main():
        with explained(mark, ConfigError):
            mark.write_text(word, encoding="ascii")
    word = distributed.gather_object(word)[0]
    sights = distributed.gather_object((socket.gethostname(), _sees(mark, word)))
    if distributed.is_main():
        mark.unlink(missing_ok=True)
    for rank, (host, sees) in enumerate(sights):
        if not sees:
            raise ConfigError(
                f"the run folder is not shared between machines: process {rank} on {host} sees no '{mark.absolute()}', "
                f"which process 0 on {sights[0][0]} has just written; out= must lie on a disk that all machines share"
            )


def _sees(mark: Path, word: str) -> bool:
    until = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError):
            if mark.read_text(encoding="ascii", errors="replace") == word:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def check_start(found: FoundCheckpoint | None) -> None:
    """Make sure that all processes go on from the same state.

    Raises:
        ConfigError: on all processes, if one would go on from another than the first; names both.
    """
    if distributed.world_size() == 1:
        return
    starts = distributed.gather_object(_start(found))
    for rank, start in enumerate(starts):
        if start[1:] != starts[0][1:]:
            raise ConfigError(
                f"the processes see different states of the run: process {rank} on {start.host} sees {_words(start)}, "
                f"process 0 on {starts[0].host} {_words(starts[0])}; nothing was changed, start it again"
            )


def _start(found: FoundCheckpoint | None) -> SeenState:
    host = socket.gethostname()
    if found is None:
        return SeenState(host)
    state, path = found.state, found.path
    with zipfile.ZipFile(path) as archive:
        sums = [(part.filename, part.file_size, part.CRC) for part in archive.infolist()]
    return SeenState(host, str(path), int(state["epoch"]), int(state["step"]), zlib.crc32(repr(sums).encode()))


def _words(start: SeenState) -> str:
    if start.path is None:
        return "no checkpoint"
    return f"'{start.path}' of step {start.step} (content {start.digest:08x})"
