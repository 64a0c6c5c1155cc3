"""Reading a file of weights without executing anything in it."""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from smkd.errors import CheckpointError
from smkd.interop import header, jsontext, pickled


def _number(dtype: np.dtype[Any], raw: bytes) -> bool | int | float:
    """Stands in for NumPy's maker of scalars: a plain number, and nothing else."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biuf":
        raise pickle.UnpicklingError(f"a number of type {dtype}")
    value: bool | int | float = np.frombuffer(raw, dtype)[0].item()
    return value


ALLOWED: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]
"""What a pickle may name besides tensors and plain containers: settings of argparse, and numbers of NumPy."""
INDEX_ENDING = ".index.json"
REPEATS = 8
"""All tensors of a file may have so many times its bytes; tensors that share numbers, as those of tied layers, do."""
STARTS = {
    b"<": "it is a web page, not weights; the link may need a browser",
    b"version https://git-lfs": "it is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    b"\x89HDF": "it is an HDF5 file, not weights",
    b"\x1f\x8b": "it is a gzip archive; unpack it first",
}


def read(path: Path) -> dict[str, Any]:
    """What a PyTorch or safetensors file holds, on the CPU; what `smkd export` says of it is under `header.KEY`.

    Of weights in several files `path` is the index, whose name ends in `.index.json`.

    Raises:
        CheckpointError: not weights, damaged, of parts that are missing, claiming more than the file holds, or it would
            execute code or names a class that weights do not need.
    """
    start = _start(path)
    for first, meaning in STARTS.items():
        if start.lstrip().startswith(first):
            raise CheckpointError(f"cannot read '{path}': {meaning}")
    if path.name.endswith(INDEX_ENDING):
        return _shards(path)
    # a safetensors file begins with the length of its JSON header
    content = _safetensors(path) if start[8:9] == b"{" else _pickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"cannot read '{path}': it holds a {type(content).__name__}, not a dictionary of weights")
    _check_sizes(content, path)
    return content


def shard_names(index: Path) -> list[str]:
    """Names of the files, beside an index, in which its weights are.

    Raises:
        CheckpointError: it is no such index, or names files elsewhere.
    """
    return sorted(set(_weight_map(index).values()))


def _start(path: Path) -> bytes:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise CheckpointError(f"cannot read '{path}': it is not a regular file")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror}") from error
    if not start:
        raise CheckpointError(f"cannot read '{path}': it is empty")
    return start


def _weight_map(index: Path) -> dict[str, str]:
    try:
        files = jsontext.read(index).get("weight_map")
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise CheckpointError(f"cannot read '{index}': {reason}") from error
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"cannot read '{index}': it has no weight_map")
    for name, file in files.items():
        if not isinstance(file, str) or file in ("", ".", "..") or re.search(r"[/\\:\0]", file):
            raise CheckpointError(f"cannot read '{index}': {name} is in {str(file)[:80]!r}, which is no file beside it")
        if file.endswith(INDEX_ENDING):
            raise CheckpointError(f"cannot read '{index}': {name} is in another index, '{file}'")
    return files


def _shards(index: Path) -> dict[str, Any]:
    files = _weight_map(index)
    weights: dict[str, Any] = {}
    for file in sorted(set(files.values())):
        path = index.with_name(file)
        if not path.is_file():
            raise CheckpointError(f"cannot read '{index}': '{path}' is missing")
        weights |= {name: value for name, value in read(path).items() if files.get(name) == file}
    absent = sorted(files.keys() - weights.keys())
    if absent:
        raise CheckpointError(f"cannot read '{index}': '{files[absent[0]]}' lacks {absent[0]} ({len(absent)} weights)")
    return weights


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            exported = header.found(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors if exported is None else {**tensors, header.KEY: exported}
    # types that this PyTorch does not have end in the last two
    except (safetensors.SafetensorError, OSError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"cannot read '{path}': the safetensors file is damaged or incomplete") from error


def _pickle(path: Path) -> Any:
    pickled.check_claims(path)
    try:
        # an open file, as PyTorch goes by the names of others
        with torch.serialization.safe_globals(ALLOWED), path.open("rb") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"cannot read '{path}': {_refusal(str(error))}") from error
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise CheckpointError(f"cannot read '{path}': it is a TorchScript program, not weights") from error
        raise CheckpointError(f"cannot read '{path}': damaged or incomplete") from error
    # a damaged pickle can make the reader stumble in many ways
    except (
        OSError,
        EOFError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        AssertionError,
        struct.error,
    ) as error:
        raise CheckpointError(f"cannot read '{path}': damaged, or not a file of PyTorch or safetensors") from error


def _check_sizes(content: dict[str, Any], path: Path) -> None:
    """Refuse tensors that repeat few numbers over and over: as plain numbers they could fill any memory."""
    room = REPEATS * path.stat().st_size
    waiting, seen = list[Any](content.items()), set[int]()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            numbers = 0 if value.is_nested or value.layout != torch.strided else value.numel() * value.element_size()
            room -= numbers
            if room < 0:
                raise CheckpointError(
                    f"cannot read '{path}': {name} is {list(value.shape)}, with which its tensors would have more than "
                    f"{REPEATS} times the bytes of the file"
                )
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [
                (f"{name}.{key}", item) for key, item in inner if isinstance(item, Tensor | dict | list | tuple)
            ]


def _refusal(message: str) -> str:
    named = re.search(r"GLOBAL (\S+)|unrecognized function (.+)|but got (<class '[^']+'>)", message)
    if named is None:
        return "damaged, or not a file of PyTorch or safetensors"
    what = next(filter(None, named.groups())).strip()
    return f"its pickle wants to load {what}, which weights do not need; nothing of it was executed"
