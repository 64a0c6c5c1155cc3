"""Reading a file of weights without executing anything in it.

PyTorch takes the size of each tensor from the pickle. It reads past the end of a record that is smaller, and makes room
for what is larger than the file. So the pickle is walked first with stand-ins for everything that it names: nothing is
imported, called or made.
"""

from __future__ import annotations

import argparse
import io
import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import safetensors
import torch
from torch import Tensor

from smkd.config import foreign_text
from smkd.errors import CheckpointError
from smkd.weights import smkd_file

NEWEST_PROTOCOL, USUAL_PROTOCOL = 3, 2
"""Of pickles that `weights_only=True` reads, and as `torch.save` writes them."""
ITEM_SIZES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "ComplexDoubleStorage": 16, "ComplexFloatStorage": 8, "QInt32Storage": 4,
}  # fmt: skip
"""Bytes of an element of each class of storages; of all others 1."""
LEGACY_HEADERS = 3
"""Pickles before the one that counts in files of PyTorch before 1.6."""
_BYTEARRAY8 = pickle.BYTEARRAY8[0]
# what the walk stumbles over where a pickle or an archive is damaged
_DAMAGE = (
    pickle.UnpicklingError, zipfile.BadZipFile, OSError, EOFError, ValueError, TypeError, KeyError, IndexError,
    AttributeError, AssertionError, NotImplementedError, OverflowError, struct.error,
)  # fmt: skip


class _Bounded:
    """A file of which no more is asked than it has: Python makes room for what is asked."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        start = file.tell()
        self.size = file.seek(0, io.SEEK_END)
        file.seek(start)

    def read(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise EOFError
        return self.file.read(count)

    def readline(self) -> bytes:
        return self.file.readline()


class _StandIn:
    """Instead of whatever a pickle names: takes everything, does nothing."""

    place = ("", "")

    def __new__(cls, *_args: Any, **_kwargs: Any) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __setstate__(self, _state: Any) -> None: ...

    def __setitem__(self, _key: Any, _value: Any) -> None: ...

    def append(self, _value: Any) -> None: ...

    def extend(self, _values: Any) -> None: ...

    def add(self, _value: Any) -> None: ...


# the one in C makes room for as many memos as a pickle claims to have
class _Survey(pickle._Unpickler):
    """Collects the storages of a pickle, as bytes by key."""

    # makes room for as many bytes as are claimed; weights have none
    dispatch: ClassVar = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != _BYTEARRAY8}

    def __init__(self, file: _Bounded) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        return type("StandIn", (_StandIn,), {"place": (module, name)})

    def get_extension(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"extension {code}")

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage":
            _, kind, key, _, numel = pid[:5]
            if not isinstance(numel, int) or numel < 0:
                raise pickle.UnpicklingError("a storage without a size")
            self.storages[str(key)] = max(self.storages.get(str(key), 0), numel * _item_size(kind))
        return _StandIn()


def check_claims(path: Path) -> None:
    """Refuse a pickle or archive that claims more than its file holds.

    Raises:
        CheckpointError: it does, or it is damaged.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PK\3\4":
                _check_archive(path, file)
            else:
                file.seek(0)
                _check_legacy(path, file)
    except RecursionError as error:
        raise CheckpointError(f"cannot read '{path}': its pickle is nested too deep") from error
    except _DAMAGE as error:
        raise CheckpointError(f"cannot read '{path}': damaged, or not a file of PyTorch or safetensors") from error


def _check_archive(path: Path, file: BinaryIO) -> None:
    size = path.stat().st_size
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        packed = next((info for info in records.values() if info.compress_type != zipfile.ZIP_STORED), None)
        if packed is not None:
            raise CheckpointError(
                f"cannot read '{path}': its record '{packed.filename}' is compressed; torch.save never"
            )
        if sum(info.file_size for info in archive.infolist()) > size:
            raise CheckpointError(f"cannot read '{path}': its records claim more bytes than the file has")
        name = next((name for name in records if name.endswith("/data.pkl") or name == "data.pkl"), None)
        if name is None:
            raise pickle.UnpicklingError("no pickle")
        root = name.removesuffix("data.pkl")
        for key, needed in _surveyed(path, io.BytesIO(archive.read(name))).items():
            record = records.get(f"{root}data/{key}")
            if record is None or record.file_size < needed:
                there = "is missing" if record is None else f"has {record.file_size} bytes"
                raise CheckpointError(f"cannot read '{path}': tensor data '{key}' {there}, its tensor needs {needed}")


def _check_legacy(path: Path, file: BinaryIO) -> None:
    for _ in range(LEGACY_HEADERS):
        _surveyed(path, file)
    claimed, size = sum(_surveyed(path, file).values()), path.stat().st_size
    if claimed > size:
        raise CheckpointError(
            f"cannot read '{path}': damaged or incomplete, its tensors need {claimed} of {size} bytes"
        )


def _surveyed(path: Path, file: BinaryIO) -> dict[str, int]:
    start = file.read(2)
    file.seek(-len(start), io.SEEK_CUR)
    if start[:1] == b"\x80" and start[1:] > bytes([NEWEST_PROTOCOL]):
        raise CheckpointError(
            f"cannot read '{path}': its pickle is of protocol {start[1]}; "
            f"torch.save writes {USUAL_PROTOCOL}, save it so"
        )
    survey = _Survey(_Bounded(file))
    survey.load()
    return survey.storages


def _item_size(kind: Any) -> int:
    """Bytes of an element of a storage class that a pickle names."""
    return ITEM_SIZES.get(getattr(kind, "place", ("", ""))[1], 1)


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


def read_weights(path: Path) -> dict[str, Any]:
    """What a PyTorch or safetensors file holds, on the CPU; what `smkd export` says of it is under `smkd_file.KEY`.

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
        files = foreign_text.read_json(index).get("weight_map")
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
        weights |= {name: value for name, value in read_weights(path).items() if files.get(name) == file}
    absent = sorted(files.keys() - weights.keys())
    if absent:
        raise CheckpointError(f"cannot read '{index}': '{files[absent[0]]}' lacks {absent[0]} ({len(absent)} weights)")
    return weights


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            exported = smkd_file.header_of(file.metadata(), smkd_file.EXPORT)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors if exported is None else {**tensors, smkd_file.KEY: exported}
    # types that this PyTorch does not have end in the last two
    except (safetensors.SafetensorError, OSError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"cannot read '{path}': the safetensors file is damaged or incomplete") from error


def _pickle(path: Path) -> Any:
    check_claims(path)
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
