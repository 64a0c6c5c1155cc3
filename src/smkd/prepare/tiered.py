"""tieredImageNet: all ILSVRC-12 training images of its 608 classes (Ren et al., ICLR 2018)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from smkd.errors import DataError
from smkd.prepare.build import Plan
from smkd.prepare.classes import ClassEntry
from smkd.prepare.ilsvrc import Ilsvrc, Photo, checked_photos
from smkd.prepare.writing import Item, Writing


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


def _items(photos: dict[str, list[Photo]], entries: Sequence[ClassEntry]) -> Iterator[Item]:
    for entry in entries:
        for photo in photos[entry.folder]:
            yield Item(f"{entry.split}/{entry.folder}/{photo.name}", photo.place)
