"""Reading a file of weights without executing anything in it."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from smkd.errors import CheckpointError
from smkd.interop import header


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
STARTS = {
    b"<": "it is a web page, not weights; the link may need a browser",
    b"version https://git-lfs": "it is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    b"\x89HDF": "it is an HDF5 file, not weights",
    b"\x1f\x8b": "it is a gzip archive; unpack it first",
}


def read(path: Path) -> dict[str, Any]:
    """What a PyTorch or safetensors file holds, on the CPU; what `smkd export` says of it is under `header.KEY`.

    Raises:
        CheckpointError: not weights, damaged, or it would execute code or names a class that weights do not need.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror}") from error
    if not start:
        raise CheckpointError(f"cannot read '{path}': it is empty")
    for first, meaning in STARTS.items():
        if start.lstrip().startswith(first):
            raise CheckpointError(f"cannot read '{path}': {meaning}")
    # a safetensors file begins with the length of its JSON header
    content = _safetensors(path) if start[8:9] == b"{" else _pickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"cannot read '{path}': it holds a {type(content).__name__}, not a dictionary of weights")
    return content


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            exported = header.found(file.metadata() or {})
        tensors = dict(safetensors.torch.load_file(path))
        return tensors if exported is None else {**tensors, header.KEY: exported}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read '{path}': the safetensors file is damaged or incomplete") from error


def _pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"cannot read '{path}': {_refusal(str(error))}") from error
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise CheckpointError(f"cannot read '{path}': it is a TorchScript program, not weights") from error
        raise CheckpointError(f"cannot read '{path}': damaged or incomplete") from error
    # a damaged pickle can make the reader stumble in many ways
    except (OSError, EOFError, KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read '{path}': damaged, or not a file of PyTorch or safetensors") from error


def _refusal(message: str) -> str:
    named = re.search(r"GLOBAL (\S+)|unrecognized function (.+)|but got (<class '[^']+'>)", message)
    if named is None:
        return "damaged, or not a file of PyTorch or safetensors"
    what = next(filter(None, named.groups())).strip()
    return f"its pickle wants to load {what}, which weights do not need; nothing of it was executed"
