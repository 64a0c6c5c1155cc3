"""A few-shot split of Caltech-101 from its zip, or from the 101_ObjectCategories.tar.gz inside; read twice, in order.

`splits/README.md` says how classes are split and images chosen.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from smkd.errors import DataError
from smkd.prepare.archives import MIB, Bounds, Member, reading, tar_members, tar_stream, zip_members
from smkd.prepare.build import Plan
from smkd.prepare.registry import ClassEntry, class_table
from smkd.prepare.writing import Item

INNER = "101_ObjectCategories.tar.gz"
MOST = 120
"""Images kept of a class: the first by name."""
CALTECH_BOUNDS = Bounds(member=512 * MIB, total=1024 * MIB)
"""The true zip takes 131 MiB, of photographs that hardly compress."""
CALTECH_NAME = re.compile(r"image_\d{4}\.jpg")


def repeats() -> dict[str, set[str]]:
    """Images of each class that show the same picture as another one that is kept."""
    found: dict[str, set[str]] = {}
    for row in class_table("caltech101_repeats"):
        found.setdefault(row["class"], set()).add(row["removed"])
    return found


def plan_caltech(
    archive: Path, entries: Sequence[ClassEntry], repeated: Mapping[str, set[str]], most: int = MOST
) -> Plan:
    """The chosen images under their own names, as `<split>/<class>/image_<number>.jpg`.

    Args:
        archive: the zip or the tar.
        entries: the classes, with the number of images that remain of each.
        repeated: names left out of each class.
        most: how many are kept of a class.

    Raises:
        DataError: the archive is another one, damaged, hostile, or lacks classes or images.
    """
    names: dict[str, list[str]] = {}
    for folder, name, _ in _images(archive):
        names.setdefault(folder, []).append(name)
    missing = [entry.folder for entry in entries if entry.folder not in names]
    if missing:
        raise DataError(
            f"archive '{archive}' lacks {len(missing)} of the {len(entries)} classes of Caltech-101: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )
    chosen: dict[tuple[str, str], str] = {}
    for entry in entries:
        kept = sorted(set(names[entry.folder]) - repeated.get(entry.folder, set()))[:most]
        if len(kept) != entry.images:
            raise DataError(
                f"archive '{archive}': {len(kept)} images of class '{entry.folder}' remain, expected {entry.images}"
            )
        chosen |= {(entry.folder, name): entry.split for name in kept}
    return Plan(_items(archive, chosen), len(chosen))


def _items(archive: Path, chosen: Mapping[tuple[str, str], str]) -> Iterator[Item]:
    for folder, name, member in _images(archive):
        if split := chosen.get((folder, name)):
            yield Item(f"{split}/{folder}/{name}", member.read())


def _images(archive: Path) -> Iterator[tuple[str, str, Member]]:
    """Class folder, file name and content of every image."""
    for member in _members(archive):
        path = PurePosixPath(member.name)
        if len(path.parts) >= 2 and CALTECH_NAME.fullmatch(path.name):
            yield path.parts[-2], path.name, member


def _members(archive: Path) -> Iterator[Member]:
    with reading(archive):
        if not zipfile.is_zipfile(archive):
            yield from tar_members(archive, CALTECH_BOUNDS)
            return
        with zipfile.ZipFile(archive) as file:
            inner = [info for info in zip_members(file, str(archive), CALTECH_BOUNDS) if info.filename.endswith(INNER)]
            if not inner:
                raise DataError(f"archive '{archive}' holds no {INNER}; caltech-101.zip or that file is needed")
            with file.open(inner[0]) as stream:
                assert isinstance(stream, zipfile.ZipExtFile)
                yield from tar_stream(stream, f"{archive}: {inner[0].filename}", CALTECH_BOUNDS)
