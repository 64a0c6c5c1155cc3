"""miniImageNet from the ILSVRC-12 training images and the three published lists of Ravi and Larochelle (ICLR 2017).

A published name such as n0153282900000005.jpg is a wnid and an ordinal: the 5th image of the class in increasing order
of the number in the ILSVRC-12 names. Alphabetical order gives other images.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from smkd.errors import DataError
from smkd.prepare.build import Plan
from smkd.prepare.classes import SPLITS, ClassEntry, table
from smkd.prepare.ilsvrc import Ilsvrc, Photo, checked_photos
from smkd.prepare.registry import benchmark
from smkd.prepare.writing import Item, Writing

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
    return {row["published_name"]: row["ilsvrc_name"] for row in table("mini_imagenet_name_check")}


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


def find_photo(photos: Sequence[Photo], name: str) -> Photo:
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
