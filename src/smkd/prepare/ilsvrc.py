"""The ILSVRC-12 training images, from the folder of class folders or from the tar of tars, which is never unpacked."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from smkd.data.formats import is_hidden
from smkd.errors import DataError
from smkd.prepare.archives import MIB, Bounds, check_tar_member, reading
from smkd.prepare.writing import FileRange

WNID = re.compile(r"n\d{8}")
PHOTO = re.compile(r"(n\d{8})_(\d+)\.JPEG")
BOUNDS = Bounds(member=64 * MIB, total=64 * MIB)
"""For one image; the tar is not compressed, so it holds no more than its own size."""
CLASS_BOUNDS = Bounds(member=4096 * MIB, total=4096 * MIB)
"""For the tar of one class."""


@dataclass(frozen=True, slots=True)
class Photo:
    """One training image: the number in its name, its name, and where its bytes are."""

    number: int
    name: str
    place: FileRange


class Ilsvrc(Protocol):
    """Where the training images are."""

    path: Path
    stays: bool
    """Whether images are files of their own, which links can point to."""

    def wnids(self) -> set[str]:
        """Classes that are there."""

    def photos(self, wnid: str) -> list[Photo]:
        """Images of one class, in increasing order of the number in their names."""


class IlsvrcFolder:
    """`<path>/<wnid>/<wnid>_<number>.JPEG`."""

    stays = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def wnids(self) -> set[str]:
        """See `Ilsvrc.wnids`."""
        return {entry.name for entry in self.path.iterdir() if WNID.fullmatch(entry.name) and entry.is_dir()}

    def photos(self, wnid: str) -> list[Photo]:
        """See `Ilsvrc.photos`."""
        folder = self.path / wnid
        names = (entry.name for entry in folder.iterdir())
        return in_order(wnid, folder, ((name, FileRange(str(folder / name))) for name in names))


class IlsvrcTar:
    """ILSVRC2012_img_train.tar, which holds `<wnid>.tar` for each class.

    Raises:
        DataError: it is another archive, damaged or hostile.
    """

    stays = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.members: dict[str, tarfile.TarInfo] = {}
        with reading(path):
            self.tar = tarfile.open(path, "r:")  # noqa: SIM115 - kept open for `photos`
            for info in self.tar:
                check_tar_member(info, str(path), CLASS_BOUNDS)
                stem = Path(info.name).stem
                if info.isreg() and not info.issparse() and WNID.fullmatch(stem) and info.name.endswith(".tar"):
                    self.members[stem] = info
        if not self.members:
            raise DataError(f"archive '{path}' holds no <wnid>.tar; ILSVRC2012_img_train.tar is needed")

    def wnids(self) -> set[str]:
        """See `Ilsvrc.wnids`."""
        return set(self.members)

    def photos(self, wnid: str) -> list[Photo]:
        """See `Ilsvrc.photos`."""
        outer = self.members[wnid]
        label = f"{self.path}: {outer.name}"
        with reading(self.path), tarfile.open(fileobj=self.tar.extractfile(outer), mode="r:") as inner:
            found = []
            for info in inner:
                check_tar_member(info, label, BOUNDS)
                if info.isreg() and not info.issparse():
                    at = outer.offset_data + info.offset_data
                    found.append((Path(info.name).name, FileRange(str(self.path), at, info.size)))
        return in_order(wnid, label, found)


def open_ilsvrc(source: Path) -> Ilsvrc:
    """The training images at `source`: the tar, or a folder that holds the class folders or has them in `train/`.

    Raises:
        DataError: there is nothing of the kind.
    """
    if source.is_file():
        return IlsvrcTar(source)
    if not source.is_dir():
        raise DataError(f"--source: '{source}' does not exist")
    for folder in (source, source / "train", source / "ILSVRC" / "Data" / "CLS-LOC" / "train"):
        if folder.is_dir() and any(WNID.fullmatch(entry.name) and entry.is_dir() for entry in folder.iterdir()):
            return IlsvrcFolder(folder)
    raise DataError(
        f"--source: '{source}' holds no class folders such as n01532829/; ILSVRC-12's train folder is needed"
    )


def in_order(wnid: str, label: object, files: Iterable[tuple[str, FileRange]]) -> list[Photo]:
    """The .JPEG files of a class in increasing order of the number in their names; `label` is where they are.

    Raises:
        DataError: a .JPEG file has no ILSVRC-12 name of this class.
    """
    photos = []
    for name, place in files:
        if not name.endswith(".JPEG") or is_hidden(name):
            continue
        match = PHOTO.fullmatch(name)
        if match is None or match[1] != wnid:
            raise DataError(f"'{label}' holds '{name}', which is no ILSVRC-12 name such as {wnid}_28.JPEG; remove it")
        photos.append(Photo(int(match[2]), name, place))
    return sorted(photos, key=lambda photo: photo.number)


def checked_photos(ilsvrc: Ilsvrc, wnids: Iterable[str], counts: Mapping[str, int]) -> dict[str, list[Photo]]:
    """Images of the classes, once their numbers agree with the published ones.

    Raises:
        DataError: classes are missing, or a class has more or fewer images, which would shift the names after it.
    """
    wanted = list(wnids)
    there = ilsvrc.wnids()
    missing = [wnid for wnid in wanted if wnid not in there]
    if missing:
        raise DataError(
            f"'{ilsvrc.path}' lacks {len(missing)} of the {len(wanted)} classes: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}"
        )
    photos = {}
    for wnid in wanted:
        found = ilsvrc.photos(wnid)
        if len(found) != counts[wnid]:
            raise DataError(
                f"class '{wnid}' of '{ilsvrc.path}' holds {len(found)} .JPEG files, ILSVRC-12 has {counts[wnid]}; "
                "one missing or extra file gives the images after it wrong names"
            )
        photos[wnid] = found
    return photos
