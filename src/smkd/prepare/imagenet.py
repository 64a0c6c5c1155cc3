"""miniImageNet and tieredImageNet from the ILSVRC-12 training images, a folder or the tar of tars.

miniImageNet follows the three published lists of Ravi and Larochelle (ICLR 2017): a name such as
n0153282900000005.jpg is a wnid and an ordinal, the 5th image of the class in increasing order of the number in the
ILSVRC-12 names; alphabetical order gives other images. tieredImageNet takes all images of its 608 classes (Ren et al.,
ICLR 2018).
"""

from __future__ import annotations

import csv
import hashlib
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from smkd.data.formats import is_hidden
from smkd.errors import DataError
from smkd.prepare.archives import MIB, Bounds, check_tar_member, reading
from smkd.prepare.build import Plan
from smkd.prepare.registry import SPLITS, ClassEntry, benchmark, class_table
from smkd.prepare.writing import FileRange, Item, Writing

WNID = re.compile(r"n\d{8}")
ILSVRC_NAME = re.compile(r"(n\d{8})_(\d+)\.JPEG")
ILSVRC_BOUNDS = Bounds(member=64 * MIB, total=64 * MIB)
"""For one image; the tar is not compressed, so it holds no more than its own size."""
CLASS_BOUNDS = Bounds(member=4096 * MIB, total=4096 * MIB)
"""For the tar of one class."""


@dataclass(frozen=True, slots=True)
class IlsvrcPhoto:
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

    def photos(self, wnid: str) -> list[IlsvrcPhoto]:
        """Images of one class, in increasing order of the number in their names."""


class IlsvrcFolder:
    """`<path>/<wnid>/<wnid>_<number>.JPEG`."""

    stays = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def wnids(self) -> set[str]:
        """See `Ilsvrc.wnids`."""
        return {entry.name for entry in self.path.iterdir() if WNID.fullmatch(entry.name) and entry.is_dir()}

    def photos(self, wnid: str) -> list[IlsvrcPhoto]:
        """See `Ilsvrc.photos`."""
        folder = self.path / wnid
        names = (entry.name for entry in folder.iterdir())
        return photos_in_order(wnid, folder, ((name, FileRange(str(folder / name))) for name in names))


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

    def photos(self, wnid: str) -> list[IlsvrcPhoto]:
        """See `Ilsvrc.photos`."""
        outer = self.members[wnid]
        label = f"{self.path}: {outer.name}"
        with reading(self.path), tarfile.open(fileobj=self.tar.extractfile(outer), mode="r:") as inner:
            found = []
            for info in inner:
                check_tar_member(info, label, ILSVRC_BOUNDS)
                if info.isreg() and not info.issparse():
                    at = outer.offset_data + info.offset_data
                    found.append((Path(info.name).name, FileRange(str(self.path), at, info.size)))
        return photos_in_order(wnid, label, found)


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


def photos_in_order(wnid: str, label: object, files: Iterable[tuple[str, FileRange]]) -> list[IlsvrcPhoto]:
    """The .JPEG files of a class in increasing order of the number in their names; `label` is where they are.

    Raises:
        DataError: a .JPEG file has no ILSVRC-12 name of this class.
    """
    photos = []
    for name, place in files:
        if not name.endswith(".JPEG") or is_hidden(name):
            continue
        match = ILSVRC_NAME.fullmatch(name)
        if match is None or match[1] != wnid:
            raise DataError(f"'{label}' holds '{name}', which is no ILSVRC-12 name such as {wnid}_28.JPEG; remove it")
        photos.append(IlsvrcPhoto(int(match[2]), name, place))
    return sorted(photos, key=lambda photo: photo.number)


def checked_photos(ilsvrc: Ilsvrc, wnids: Iterable[str], counts: Mapping[str, int]) -> dict[str, list[IlsvrcPhoto]]:
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


PUBLISHED = re.compile(r"(n\d{8})(\d{8})\.jpg")
LIST_DIGESTS: Mapping[str, str] = {
    download.name.removesuffix(".csv"): download.digest.removeprefix("sha256:")
    for download in benchmark("mini-imagenet").downloads
}


def read_lists(
    folder: Path, entries: Sequence[ClassEntry], digests: Mapping[str, str] = LIST_DIGESTS
) -> dict[str, list[str]]:
    """Published image names of each split, from train.csv, val.csv and test.csv (`filename,label`).

    Args:
        folder: where the three files are.
        entries: the classes and how many images each must have.
        digests: SHA-256 of each file with its line ends as '\\n'; a split without one is not compared.

    Raises:
        DataError: a list is missing, is not the published one, or has other classes or counts.
    """
    return {split: _read_list(folder / f"{split}.csv", split, entries, digests.get(split)) for split in SPLITS}


def known_pairs() -> dict[str, str]:
    """300 published names and the ILSVRC-12 names they stand for, three of every class."""
    return {row["published_name"]: row["ilsvrc_name"] for row in class_table("mini_imagenet_name_check")}


def plan_mini(
    ilsvrc: Ilsvrc,
    entries: Sequence[ClassEntry],
    lists: Mapping[str, Sequence[str]],
    counts: Mapping[str, int],
    size: int | None,
    pairs: Mapping[str, str],
) -> Plan:
    """The listed images, as `<split>/<wnid>/<published name>`.

    Args:
        ilsvrc: the training images.
        entries: the classes.
        lists: published names of each split.
        counts: ILSVRC-12's number of images of each class.
        size: side of the square they are resized to, or None for their original size.
        pairs: published names whose ILSVRC-12 names are known, to test the mapping with.

    Raises:
        DataError: a class is missing or has other images than ILSVRC-12, or a list names images that are not there.
    """
    photos = checked_photos(ilsvrc, [entry.folder for entry in entries], counts)
    absent = [name for names in lists.values() for name in names if ordinal_of(name) > len(photos[name[:9]])]
    if absent:
        raise DataError(
            f"the lists name {len(absent)} images that '{ilsvrc.path}' does not have: {', '.join(absent[:5])}"
            f"{', ...' if len(absent) > 5 else ''}"
        )
    items = []
    for split, names in lists.items():
        for name in names:
            photo = find_photo(photos[name[:9]], name)
            if pairs.get(name, photo.name) != photo.name:
                raise DataError(
                    f"'{ilsvrc.path}' is not the original training set: '{name}' must be '{pairs[name]}', "
                    f"but is '{photo.name}' there; compare the files of class {name[:9]}"
                )
            items.append(Item(f"{split}/{name[:9]}/{name}", photo.place))
    return Plan(items, len(items), Writing(size=size))


def ordinal_of(name: str) -> int:
    """Place of a published name's image in its class, from 1."""
    return int(name[9:17])


def find_photo(photos: Sequence[IlsvrcPhoto], name: str) -> IlsvrcPhoto:
    """The image a published name stands for; `photos` as `Ilsvrc.photos` gives them."""
    return photos[ordinal_of(name) - 1]


def _read_list(path: Path, split: str, entries: Sequence[ClassEntry], digest: str | None) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")  # line ends become '\n'
    except FileNotFoundError as error:
        raise DataError(f"--lists: '{path}' does not exist; train.csv, val.csv and test.csv are needed") from error
    except ValueError as error:
        raise DataError(f"'{path}' is not text: {error}") from error
    rows = list(csv.reader(text.splitlines()))
    if not rows or rows[0] != ["filename", "label"]:
        raise DataError(f"'{path}': the first line is not 'filename,label'")
    names = []
    for number, row in enumerate(rows[1:], 2):
        match = PUBLISHED.fullmatch(row[0]) if len(row) == 2 else None
        if match is None or match[1] != row[1] or int(match[2]) == 0:
            raise DataError(f"'{path}', line {number}: expected a row such as n0153282900000005.jpg,n01532829")
        names.append(row[0])
    expected = {entry.folder: entry.images for entry in entries if entry.split == split}
    found = Counter(name[:9] for name in names)
    other = sorted(found.keys() ^ expected.keys())
    if other:
        raise DataError(f"'{path}': class {other[0]} and {len(other) - 1} more differ from Ravi and Larochelle's split")
    for wnid, count in expected.items():
        if found[wnid] != count or len({n for n in names if n.startswith(wnid)}) != count:
            raise DataError(f"'{path}': class {wnid} has {found[wnid]} rows, {count} different ones are needed")
    if digest is not None and hashlib.sha256(text.encode()).hexdigest() != digest:
        raise DataError(f"'{path}' is not the published list: its SHA-256 is not {digest}")
    return names


def plan_tiered(ilsvrc: Ilsvrc, entries: Sequence[ClassEntry], size: int | None, link: bool) -> Plan:
    """The images under their own names, as `<split>/<wnid>/<wnid>_<number>.JPEG`.

    Args:
        ilsvrc: the training images.
        entries: the classes, with the number of images each must have.
        size: side of the square they are resized to, or None for their original size.
        link: hard links (symbolic ones across devices) instead of copies.

    Raises:
        DataError: a class is missing or has another number of images, or links cannot be made.
    """
    if link and not ilsvrc.stays:
        raise DataError(f"--link: '{ilsvrc.path}' is an archive; links need the folder of images")
    if link and size is not None:
        raise DataError("--link keeps the images as they are; leave out --size")
    photos = checked_photos(ilsvrc, [entry.folder for entry in entries], {e.folder: e.images for e in entries})
    total = sum(len(found) for found in photos.values())
    return Plan(_items(photos, entries), total, Writing(size=size, link=link))


def _items(photos: dict[str, list[IlsvrcPhoto]], entries: Sequence[ClassEntry]) -> Iterator[Item]:
    for entry in entries:
        for photo in photos[entry.folder]:
            yield Item(f"{entry.split}/{entry.folder}/{photo.name}", photo.place)
