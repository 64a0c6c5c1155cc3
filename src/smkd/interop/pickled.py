"""What a file of `torch.save` claims to hold, before PyTorch makes room for it.

PyTorch takes the size of each tensor from the pickle. It reads past the end of a record that is smaller, and makes room
for what is larger than the file. Here the pickle is walked with stand-ins for everything that it names: nothing is
imported, called or made.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from smkd.errors import CheckpointError

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
