"""Read archives that may be hostile. They are not unpacked: members are checked and read one by one.

Refused: names and links that lead out of the folder, device files, encrypted members, and more content than the bounds.
"""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from smkd.errors import DataError

MIB = 1024 * 1024
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class Bounds:
    """The most an archive may hold once decompressed, in bytes: one member, and all together."""

    member: int
    total: int


@dataclass(frozen=True)
class Member:
    """A file inside an archive; `read` works until the next member is asked for."""

    name: str
    size: int
    read: Callable[[], bytes]


def tar_members(path: Path, bounds: Bounds) -> Iterator[Member]:
    """Files of a tar or tar.gz, in their order.

    Raises:
        DataError: not a tar, damaged, hostile, or more content than `bounds`.
    """
    with reading(path), path.open("rb") as file:
        yield from tar_stream(file, str(path), bounds)


def tar_stream(file: io.BufferedReader | zipfile.ZipExtFile, label: str, bounds: Bounds) -> Iterator[Member]:
    """As `tar_members`, from a stream read once; `label` is what messages call it."""
    is_gzip = file.peek(len(GZIP_MAGIC))[: len(GZIP_MAGIC)] == GZIP_MAGIC
    content = gzip.GzipFile(fileobj=file) if is_gzip else file
    with tarfile.open(fileobj=_Bounded(content, label, bounds.total), mode="r|") as tar:
        for info in tar:
            check_tar_member(info, label, bounds)
            if info.isreg():
                yield Member(info.name, info.size, lambda info=info: _extract(tar, info, label))  # type: ignore[misc]


def zip_members(archive: zipfile.ZipFile, label: str, bounds: Bounds) -> list[zipfile.ZipInfo]:
    """Files of an open zip, after looking at every entry.

    Raises:
        DataError: an entry is hostile, or they are larger than `bounds`.
    """
    found, total = [], 0
    for info in archive.infolist():
        check_name(info.filename, label)
        if stat.S_ISLNK(info.external_attr >> 16):
            raise DataError(f"archive '{label}': member '{info.filename}' is a link; refused")
        if info.flag_bits & 1:
            raise DataError(f"archive '{label}': member '{info.filename}' is encrypted; an open archive is needed")
        total += info.file_size
        _check_size(info.filename, info.file_size, total, label, bounds)
        if not info.is_dir():
            found.append(info)
    return found


def check_tar_member(info: tarfile.TarInfo, label: str, bounds: Bounds) -> None:
    """Raises `DataError` if the member or its link leads out of the folder, is a device, or is too large."""
    check_name(info.name, label)
    if info.issym() or info.islnk():
        folder = PurePosixPath(info.name).parent if info.issym() else PurePosixPath()
        depth = 0
        for part in (folder / info.linkname).parts:
            depth += -1 if part == ".." else part != "."
            if depth < 0 or part == "/":
                raise DataError(
                    f"archive '{label}': link '{info.name}' -> '{info.linkname}' leads out of the folder; refused"
                )
    elif not (info.isreg() or info.isdir()):
        raise DataError(f"archive '{label}': member '{info.name}' is a device or pipe; refused")
    if info.isreg():
        _check_size(info.name, info.size, info.size, label, bounds)


def check_name(name: str, label: str) -> None:
    """Raises `DataError` if a member's name is absolute or climbs out with '..'."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or parts[0].endswith(":") or "\0" in name:
        raise DataError(f"archive '{label}': member '{name}' leads out of the folder; refused")


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Says in one line why an archive cannot be read."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile, NotImplementedError) as error:
        raise DataError(f"archive '{path}' is damaged, cut short or of another kind: {error}") from error
    except FileNotFoundError as error:
        raise DataError(f"archive '{path}' does not exist") from error
    except IsADirectoryError as error:
        raise DataError(f"'{path}' is a folder; an archive file is needed") from error
    except PermissionError as error:
        raise DataError(f"no permission to read archive '{path}'") from error


def _extract(tar: tarfile.TarFile, info: tarfile.TarInfo, label: str) -> bytes:
    with reading(label):
        file = tar.extractfile(info)
        content = file.read() if file is not None else b""
        if len(content) != info.size:
            raise tarfile.ReadError(f"member '{info.name}' is cut short")
        return content


def _check_size(name: str, size: int, total: int, label: str, bounds: Bounds) -> None:
    if size > bounds.member:
        raise DataError(
            f"archive '{label}': member '{name}' would take {size / MIB:.0f} MiB, "
            f"the bound is {bounds.member / MIB:.0f} MiB; refused"
        )
    if total > bounds.total:
        raise DataError(f"archive '{label}' holds more than {bounds.total / MIB:.0f} MiB; refused")


class _Bounded(io.RawIOBase):
    """A stream that ends in a `DataError` after `bound` bytes, whatever the headers inside it claim."""

    def __init__(self, stream: io.BufferedIOBase, label: str, bound: int) -> None:
        self._stream, self._label, self._bound, self._count = stream, label, bound, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._count += len(data)
        if self._count > self._bound:
            raise DataError(f"archive '{self._label}' holds more than {self._bound / MIB:.0f} MiB; refused")
        return data
