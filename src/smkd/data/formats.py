"""Which files are images, and which names belong to the system; everything that lists files uses these rules.

The suffix decides whether a file is a picture. Pictures that the installed Pillow cannot read, such as HEIC without a
plugin, are left out, counted and named.
"""

from __future__ import annotations

import importlib
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from smkd.errors import DataError, SmkdWarning
from smkd.processes import is_first_rank

PICTURES = frozenset({
    # Pillow itself reads these
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp", ".avif", ".avifs",
    ".tif", ".tiff", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga",
    ".pcx", ".sgi", ".rgb", ".rgba", ".bw", ".ras", ".ico", ".icns", ".dds", ".qoi", ".psd", ".xbm", ".xpm",
    # and these with a plugin, or not at all
    ".heic", ".heif", ".heics", ".heifs", ".hif", ".jxl", ".jxr", ".bpg", ".exr", ".hdr", ".svg", ".dcm", ".xcf",
    ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".srf", ".dng", ".orf", ".rw2", ".raf", ".pef", ".srw",
    ".x3f", ".3fr", ".iiq", ".raw",
})  # fmt: skip
"""Suffixes of pictures, in lower case."""
SYSTEM = frozenset({
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "@tmp", "@recycle",
    "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found",
    "lost.dir",
})  # fmt: skip
"""Names, in lower case, that systems and network disks give to files and folders of their own."""


PLUGINS = ("pillow_heif", "pillow_jxl")
"""Modules that teach Pillow further formats where they are installed."""
REMEDY = "convert them to JPEG or PNG, or for HEIC pip install pillow-heif"

SHOWN = 5
"""Names that a line lists."""


class Found(NamedTuple):
    """Pictures anywhere below a folder, relative to it, in the order of their names.

    Attributes:
        images: those that Pillow reads here.
        foreign: the others.
        links: linked folders that were not followed, because they lead to a folder that is read already.
    """

    images: list[str]
    foreign: list[str]
    links: list[str]

    def left_out(self, place: Path) -> list[str]:
        """A line about each kind of what is left out; `place` is what to call the folder."""
        lines = [f"'{place}': left out: {foreign_line(self.foreign)}"] if self.foreign else []
        if self.links:
            shown = ", ".join(self.links[:SHOWN]) + ", ..." * (len(self.links) > SHOWN)
            lines.append(f"'{place}': linked folders that are left out, as they lead to what is read already: {shown}")
        return lines


def nfc(name: str) -> str:
    """The name in Unicode NFC, for comparisons: some systems write é in two characters."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def in_order(paths: Iterable[str]) -> list[str]:
    """Paths sorted folder by folder; the same order however a system writes letters."""
    return sorted(sorted(paths), key=lambda path: nfc(path).split(os.sep))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or the system's own: its name begins with a dot or is in `SYSTEM`."""
    return name.startswith(".") or name.lower() in SYSTEM


def is_hidden_path(path: str) -> bool:
    """Whether a part of a path in an archive is hidden; '.' and '..' are not."""
    return any(is_hidden(part) for part in path.split("/") if part not in (".", ".."))


def is_picture(name: str) -> bool:
    """Whether a file name has the suffix of a picture, readable here or not."""
    return suffix(name) in PICTURES


def is_foreign(name: str) -> bool:
    """Whether a file name has the suffix of a picture that Pillow cannot read here."""
    kind = suffix(name)
    return kind in PICTURES and kind not in _read_here()


def suffix(name: str) -> str:
    """'.jpg' and the like, in lower case; empty if there is none."""
    return os.path.splitext(name)[1].lower()


@lru_cache(maxsize=1)
def _read_here() -> frozenset[str]:
    for name in PLUGINS:
        with suppress(ImportError):
            plugin = importlib.import_module(name)
            getattr(plugin, "register_heif_opener", bool)()  # the other one needs no call
    return PICTURES & Image.registered_extensions().keys()


@lru_cache(maxsize=1)
def pillow_formats() -> list[str]:
    """Names that Pillow gives to the formats of `PICTURES`; what else it opens are documents, some with programs."""
    wanted = {Image.registered_extensions()[each] for each in _read_here()}
    return [name for name in Image.ID if name in wanted]


def find_images(folder: Path) -> Found:
    """Pictures anywhere below a folder; hidden ones left out, linked folders followed.

    Raises:
        DataError: a folder cannot be read.
    """
    links: list[str] = []
    pictures, here = in_order(_pictures(folder, links)), _read_here()
    foreign = [name for name in pictures if suffix(name) not in here]
    return Found([name for name in pictures if suffix(name) in here] if foreign else pictures, foreign, sorted(links))


def holds_pictures(folder: Path) -> bool:
    """Whether there is a picture anywhere below a folder; raises as `find_images` does."""
    return next(_pictures(folder, []), None) is not None


def loose_pictures(folder: Path) -> list[str]:
    """Names of the pictures directly in a folder, sorted."""
    with _readable(folder), os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.is_dir()]
    return in_order(name for name in names if is_picture(name) and not is_hidden(name))


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, hidden ones left out.

    Raises:
        DataError: two names differ only in how a system writes the same letters; the folder cannot be read.
    """
    with _readable(folder), os.scandir(folder) as entries:
        names = in_order(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))
    times = Counter(map(nfc, names))
    for name, count in times.items():
        if count > 1:
            raise DataError(
                f"'{folder}' has {count} folders called '{name}', written with different Unicode characters; put "
                "their images into one of them"
            )
    return names


def counted(names: Iterable[str]) -> str:
    """How many files there are of each suffix, most first: '12 .heic, 3 .cr2'."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(map(suffix, names)).most_common())


def foreign_line(names: list[str]) -> str:
    """How many pictures Pillow cannot read here, of which kinds, and what to do."""
    return f"{counted(names)} (the first: '{names[0]}'), which Pillow cannot read here; {REMEDY}"


def warn(lines: Iterable[str]) -> None:
    """Say what is left out, once a line."""
    if is_first_rank():
        for line in lines:
            warnings.warn(line, SmkdWarning, stacklevel=2)


def _pictures(folder: Path, links: list[str]) -> Iterator[str]:
    """Relative paths of pictures, in no order; adds to `links` the folders that are read under another name."""
    # a link to a folder that this one lies in would bring in its neighbours, and this one again
    seen = {_identity(place) for place in (*folder.absolute().parents, *folder.resolve().parents)}
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        inside = os.path.relpath(place, folder)
        if _identity(place) in seen:
            links.append(inside)
            folders.clear()
            continue
        seen.add(_identity(place))
        start = "" if inside == os.curdir else os.path.join(inside, "")
        # linked folders last: what is read twice is read under its own name
        folders[:] = sorted(
            (name for name in folders if not is_hidden(name)),
            key=lambda name: (os.path.islink(os.path.join(place, name)), name),
        )
        yield from [start + name for name in files if suffix(name) in PICTURES and not is_hidden(name)]


def _identity(place: str | Path) -> tuple[int, int]:
    status = os.stat(place)
    return status.st_dev, status.st_ino


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _unreadable(error)


def _unreadable(error: OSError) -> None:
    raise DataError(f"cannot read folder '{error.filename}': {error.strerror}") from error
