"""The work of one process: make an image's bytes, write them aside, rename, and return size and hash.

Workers start afresh and import this file, so it stays light.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from smkd.data.decoding import decode, read_file
from smkd.errors import DataError
from smkd.files import write_small

WORK_FOLDER = ".prepare"
JPEG_QUALITY = 95

Record = tuple[str, int, str]
"""Target, size in bytes, SHA-256 in hex."""


@dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes of a member of an uncompressed tar, or, where `size` is None, of a whole image file."""

    path: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes; raises `DataError` if the file is shorter, gone, or none that `read_file` takes."""
        try:
            if self.size is None:
                return read_file(self.path)
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except FileNotFoundError as error:
            raise DataError(f"'{self.path}' is gone; it was there when prepare began") from error
        except ValueError as error:
            raise DataError(f"cannot read image '{self.path}': {error}") from error
        if len(data) != self.size:
            raise DataError(f"'{self.path}' is cut short: {self.size} bytes are wanted at {self.offset}")
        return data


@dataclass(frozen=True, slots=True)
class Pixels:
    """An RGB image as rows of uint8 [height, width, 3], to be written as PNG."""

    data: bytes | FileRange
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Item:
    """One image to write: '<split>/<class>/<image>' and where its content comes from (bytes: an encoded image)."""

    target: str
    source: bytes | FileRange | Pixels


@dataclass(frozen=True)
class Writing:
    """How images are written.

    Attributes:
        size: side in pixels of the square that encoded images are resized to; None keeps them as they are.
        link: link to source files instead of copying them.
    """

    size: int | None = None
    link: bool = False


AS_IT_IS = Writing()


def write_items(out: str, writing: Writing, items: Sequence[Item]) -> list[Record]:
    """Write images below `out`.

    Raises:
        DataError: a source is gone, cut short, or no image.
        OSError: the disk is full, or may not be written.
    """
    for folder in {item.target.rpartition("/")[0] for item in items}:
        Path(out, folder).mkdir(parents=True, exist_ok=True)
    return [_write(out, writing, item) for item in items]


def _write(out: str, writing: Writing, item: Item) -> Record:
    source, target = item.source, f"{out}/{item.target}"
    data = _content(item, writing)
    if writing.link and isinstance(source, FileRange):
        _link(Path(source.path), Path(target))
    else:
        write_small(target, data, f"{out}/{WORK_FOLDER}")
    return item.target, len(data), hashlib.sha256(data).hexdigest()


def _content(item: Item, writing: Writing) -> bytes:
    source = item.source
    if isinstance(source, Pixels):
        raw = source.data.read() if isinstance(source.data, FileRange) else source.data
        image = Image.frombytes("RGB", (source.width, source.height), raw)
        return _encoded(image if writing.size is None else _square(image, writing.size), "PNG")
    encoded = source.read() if isinstance(source, FileRange) else source
    if writing.size is None:
        return encoded
    try:
        image = decode(encoded)
    except (OSError, ValueError) as error:
        where = source.path if isinstance(source, FileRange) else "the archive"
        raise DataError(f"cannot read the image of '{item.target}' in '{where}': {error}") from error
    return _encoded(_square(image, writing.size), "PNG" if item.target.lower().endswith(".png") else "JPEG")


def _square(image: Image.Image, size: int) -> Image.Image:
    # bilinear over the whole area when reducing: nearest to the OpenCV area resize of the published preparations
    return image.resize((size, size), Image.Resampling.BILINEAR)


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": JPEG_QUALITY} if kind == "JPEG" else {}))
    return buffer.getvalue()


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        # another device, or a file system without hard links
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        target.symlink_to(source.resolve())
