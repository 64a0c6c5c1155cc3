"""Splitting the images of every class into train, val and test, for data whose classes are all wanted in training."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from smkd.data.class_split import TEST_PERCENT, VAL_PERCENT
from smkd.data.formats import nfc
from smkd.data.images import StoredImages
from smkd.errors import DataError

FEWEST = 4
"""Images of a class that can be split: one selects, one measures, and training compares two."""


def split_of_images(name: str, count: int, seed: int) -> dict[str, NDArray[np.int64]]:
    """Places of the images of each split among the images of a class, ascending.

    Images are ordered by the SHA-256 of '<seed>:<class>:<place>'; of this order the first 16 % are val, the next 20 %
    test (each rounded to the nearest number, at least one), the rest train. So a class's split depends on its name,
    the number of its images and the seed alone.

    Args:
        name: of the class.
        count: its images, at least `FEWEST`.
        seed: another one, another split.
    """
    order = sorted(range(count), key=lambda place: hashlib.sha256(_encoded(seed, name, place)).digest())
    val, test = (max(1, (count * share + 50) // 100) for share in (VAL_PERCENT, TEST_PERCENT))
    cuts = np.split(np.array(order, dtype=np.int64), [val, val + test])
    return {split: np.sort(part) for split, part in zip(("val", "test", "train"), cuts, strict=True)}


def part_of_each_class(whole: StoredImages, split: str, seed: int, limit: int | None = None) -> StoredImages:
    """One split's images of every class.

    Args:
        whole: all images, class after class.
        split: 'train', 'val' or 'test'.
        seed: see `split_of_images`.
        limit: at most this many images of each class, the first ones.

    Raises:
        DataError: a class has fewer than `FEWEST` images.
    """
    rows = []
    for label, name in enumerate(whole.class_names):
        members = np.flatnonzero(whole.labels == label)
        if len(members) < FEWEST:
            raise DataError(
                f"class '{name}' has {len(members)} images; splitting the images of every class needs at least {FEWEST}"
            )
        rows.append(members[split_of_images(name, len(members), seed)[split][:limit]])
    chosen = np.concatenate(rows)
    return StoredImages(whole.store, whole.items[chosen], whole.labels[chosen], whole.class_names, whole.left_out)


def _encoded(seed: int, name: str, place: int) -> bytes:
    return f"{seed}:{nfc(name)}:{place}".encode(errors="surrogateescape")
