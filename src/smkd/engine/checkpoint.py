"""Checkpoints: one file that `torch.load(weights_only=True)` reads, written aside and then renamed.

<run>/checkpoints/step-00001200.pt   kept every `save_every` epochs
                  last.pt            the end of the last finished epoch
                  best.pt            best few-shot accuracy on validation classes
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from smkd.engine.checkpoint_schema import checked
from smkd.errors import CheckpointError
from smkd.weights import read

FORMAT = 1
NO_SPACE = 2**20
"""Bytes; with less left, a failed write is put down to the disk being full."""


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; a failure leaves what was there before.

    Raises:
        CheckpointError: it cannot be written (no space, no permission).
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except (OSError, RuntimeError) as error:
        reason = _write_failure(error, path.parent)
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        kept = "; the checkpoint that was there is kept" if path.exists() else ""
        raise CheckpointError(f"cannot write '{path}': {reason}{kept}") from error


def _write_failure(error: OSError | RuntimeError, folder: Path) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # torch reports a full disk as an internal position that is off
    if folder.exists() and shutil.disk_usage(folder).free < NO_SPACE:
        return os.strerror(errno.ENOSPC)
    return str(error).split("\n")[0]


def link(path: Path, name: str) -> None:
    """Keep a checkpoint under a second name, without copying it where the file system can."""
    aside = path.with_name(f".{name}.partial")
    aside.unlink(missing_ok=True)
    try:
        try:
            os.link(path, aside)
        except OSError:
            aside.write_bytes(path.read_bytes())
        aside.replace(path.with_name(name))
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write '{path.with_name(name)}': {error.strerror}") from error


def find_checkpoint(where: Path) -> Path:
    """Checkpoint file that a run folder or file names: best, else last.

    Raises:
        CheckpointError: there is none.
    """
    if where.is_file():
        return where
    if not where.exists():
        raise CheckpointError(f"'{where}' does not exist; expected a run folder or a checkpoint file")
    for name in ("best.pt", "last.pt"):
        if (where / "checkpoints" / name).is_file():
            return where / "checkpoints" / name
    raise CheckpointError(f"run folder '{where}' holds no checkpoint (checkpoints/best.pt or last.pt)")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without executing anything in it.

    Raises:
        CheckpointError: missing, unreadable, not one of ours, or damaged (`smkd.engine.checkpoint_schema`).
    """
    if not path.exists():
        raise CheckpointError(f"checkpoint '{path}' does not exist")
    state = read.read_weights(path)
    if state.get("format") != FORMAT:
        raise CheckpointError(f"'{path}' is not a checkpoint of smkd (format {FORMAT})")
    return checked(state, str(path))
