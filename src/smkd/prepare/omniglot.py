"""Omniglot from images_background.zip and images_evaluation.zip: a class per character, split by alphabet."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from smkd.errors import DataError
from smkd.prepare.archives import MIB, Bounds, reading, zip_members
from smkd.prepare.build import Plan
from smkd.prepare.registry import ClassEntry
from smkd.prepare.writing import Item

PARTS = ("images_background", "images_evaluation")
OMNIGLOT_BOUNDS = Bounds(member=1 * MIB, total=256 * MIB)
"""The true zips take less than 20 MB."""


def plan_omniglot(archives: Sequence[Path], entries: Sequence[ClassEntry]) -> Plan:
    """The drawings as they are, as `<split>/<alphabet>-character<number>/<image>.png`.

    Args:
        archives: the two zips, in any order.
        entries: the classes, with the number of drawings each must have.

    Raises:
        DataError: an archive is missing, another one, damaged, hostile, or lacks classes or images.
    """
    splits = {entry.folder: entry.split for entry in entries}
    targets: dict[Path, dict[str, str]] = {}
    parts = set()
    for archive in archives:
        with reading(archive), zipfile.ZipFile(archive) as file:
            names = [info.filename for info in zip_members(file, str(archive), OMNIGLOT_BOUNDS)]
        images = {name: place for name in names if (place := _place(name))}
        found = {PurePosixPath(name).parts[-4] for name in images}
        if not found:
            raise DataError(f"archive '{archive}' is not of Omniglot; {PARTS[0]}.zip and {PARTS[1]}.zip are needed")
        parts |= found
        strange = sorted(folder for folder, _ in images.values() if folder not in splits)
        if strange:
            raise DataError(f"archive '{archive}' holds '{strange[0]}', which is no character of Omniglot")
        targets[archive] = {name: f"{splits[folder]}/{folder}/{image}" for name, (folder, image) in images.items()}
    for part in PARTS:
        if part not in parts:
            raise DataError(f"no archive holds {part}/; give both: --archive {PARTS[0]}.zip --archive {PARTS[1]}.zip")
    counts = Counter(target.split("/")[1] for of_archive in targets.values() for target in set(of_archive.values()))
    for entry in entries:
        if counts[entry.folder] != entry.images:
            raise DataError(
                f"the archives hold {counts[entry.folder]} images of class '{entry.folder}', expected {entry.images}"
            )
    return Plan(_items(targets), sum(counts.values()))


def _place(name: str) -> tuple[str, str] | None:
    """Class and file of a member such as images_background/Greek/character01/0394_01.png."""
    parts = PurePosixPath(name).parts
    if len(parts) < 4 or parts[-4] not in PARTS or not name.endswith(".png"):
        return None
    return f"{parts[-3]}-{parts[-2]}", parts[-1]


def _items(targets: Mapping[Path, Mapping[str, str]]) -> Iterator[Item]:
    for archive, of_archive in targets.items():
        with reading(archive), zipfile.ZipFile(archive) as file:
            for name, target in of_archive.items():
                yield Item(target, file.read(name))
