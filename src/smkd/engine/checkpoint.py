"""Checkpoints: one file that `torch.load(weights_only=True)` reads, written aside and then renamed.

<run>/checkpoints/last.pt            the newest state
                  last-1.pt          the one before it, and so on: `keep` of them
                  step-00001200.pt   kept every `save_every` epochs
                  best.pt            best few-shot accuracy on validation classes

Each is a file of its own, so damage to one leaves the others whole. The archive holds a CRC-32 of each of its parts,
which every load compares with what it reads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from smkd.engine.checkpoint_schema import checked
from smkd.errors import CheckpointError
from smkd.files import explained, written_aside
from smkd.weights import read

FORMAT = 1
CHUNK = 2**20
"""Bytes that are read at a time."""
FOLDER = 0x10
"""Attribute of an archive's part that is a folder."""
DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, KeyError, IndexError, ValueError, RuntimeError,
)  # fmt: skip
"""What Python's reader of archives raises on damaged ones."""


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; a failure leaves what was there before.

    Raises:
        CheckpointError: it cannot be written (no space, no permission).
    """
    with explained(path, CheckpointError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_space(path.parent, bytes_of(state))
        with written_aside(path) as aside, aside.open("wb") as file:
            torch.save(_plain({"format": FORMAT, **state}), file)


def _plain(value: Any) -> Any:
    """The same content in fresh containers and one object per text, since a pickle notes which objects are one.

    So equal states make equal files, whether they were read from a file themselves or not.
    """
    if isinstance(value, dict):
        return {_plain(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return sys.intern(value) if type(value) is str else value


def bytes_of(state: object) -> int:
    """Bytes of all tensors in nested dictionaries and lists."""
    return sum(tensor.nbytes for _, tensor in tensors_in(state))


def tensors_in(state: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested dictionaries and lists, under its dotted name."""
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from tensors_in(value, f"{name}.{key}" if name else str(key))


def first_not_finite(state: object) -> str | None:
    """Dotted name of the first tensor in nested dictionaries and lists that holds infinity or NaN; None if none does.

    A device is waited for once, unless something is not finite.
    """
    named = [(name, tensor) for name, tensor in tensors_in(state) if tensor.is_floating_point()]
    device = next((tensor.device for _, tensor in named if tensor.device.type != "cpu"), torch.device("cpu"))
    sums = [tensor.sum().to(device, torch.float64, non_blocking=True) for _, tensor in named]
    # a finite sum has finite terms, and is quicker than a look at each; a sum may also be too large by itself
    if not sums or torch.stack(sums).isfinite().all():
        return None
    return next((name for name, tensor in named if not tensor.isfinite().all()), None)


@contextlib.contextmanager
def keeping_earlier(path: Path, keep: int) -> Iterator[None]:
    """Around the writing of a new state: what `path` holds becomes `last-1.pt`, that `last-2.pt`, and so on.

    Killed at any moment, `path` holds the state before or the new one.

    Args:
        path: of the newest state.
        keep: states that stay, the new one included.
    """
    older = [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, keep)]
    with explained(path, CheckpointError):
        if older and path.exists():
            with written_aside(older[0]) as before:
                _second_name(path, before)
                yield
                for old, newer in zip(reversed(older[1:]), reversed(older[:-1]), strict=True):
                    if newer.exists():
                        newer.replace(old)
        else:
            yield
        for surplus in earlier(path):
            if surplus not in older:
                surplus.unlink()


def _second_name(path: Path, name: Path) -> None:
    """A file under another name as well, until the first name is given to a new file."""
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError:  # a file system without links
        shutil.copyfile(path, name)


def earlier(path: Path) -> list[Path]:
    """The states before `last.pt` that lie beside it, newest first."""
    found = path.parent.glob(f"{path.stem}-*{path.suffix}")
    numbers = {int(number): file for file in found if (number := file.stem.rpartition("-")[2]).isdigit()}
    return [numbers[number] for number in sorted(numbers)]


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed:,} bytes are needed and {free:,} are free")


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
        CheckpointError: missing, unreadable, not one of ours, or damaged.
    """
    if not path.exists():
        raise CheckpointError(f"checkpoint '{path}' does not exist")
    state = read.read_weights(path)
    if state.get("format") != FORMAT:
        raise CheckpointError(f"'{path}' is not a checkpoint of smkd (format {FORMAT})")
    return trusted(state, path)


def trusted(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """What was read from a checkpoint of ours, if its checksums and each of its parts are right.

    Raises:
        CheckpointError: they are not (`verify`, `smkd.engine.checkpoint_schema.checked`).
    """
    verify_archive(path)
    return checked(state, str(path))


def verify_archive(path: Path) -> None:
    """Compare what a checkpoint holds with the checksums in it; PyTorch's own reader does not.

    Raises:
        CheckpointError: it is missing, damaged, or no archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for part in archive.infolist():
                if part.external_attr & FOLDER:  # for which PyTorch reads nothing and leaves what was in memory
                    raise zipfile.BadZipFile
                with archive.open(part) as file:
                    while file.read(CHUNK):
                        pass
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint '{path}' does not exist") from error
    except DAMAGE as error:
        raise CheckpointError(f"cannot read '{path}': damaged, or not a checkpoint of smkd") from error
