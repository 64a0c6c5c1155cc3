"""Splitting a data set into train, val and test: whole classes, or the images of every class."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smkd.data.formats import nfc
from smkd.data.images import SPLITS, StoredImages, rows_by_label
from smkd.errors import DataError
from smkd.files import listed

VAL_PERCENT, TEST_PERCENT = 16, 20
"""Shares of the classes, as in miniImageNet (64/16/20); train gets the rest."""
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
"""What some programs put between the cells of a CSV instead of commas."""


def split_by_seed(classes: Iterable[str], seed: int) -> dict[str, str]:
    """Split of each class: a pure function of the class names and the seed.

    Classes are ordered by the SHA-256 of '<seed>:<name>'; the first 16 % are val, the next 20 % test (each rounded to
    the nearest number, at least one), the rest train. No random generator: the same on every machine and version.

    Raises:
        DataError: fewer than three classes.
    """
    names = sorted(set(classes))
    if len(names) < len(SPLITS):
        raise DataError(
            f"found {len(names)} classes ({listed(names)}); splitting by class needs at least 3, "
            "and 5-way episodes on val and test about 30"
        )
    order = sorted(names, key=lambda name: hashlib.sha256(_encoded(seed, name)).digest())
    val, test = (max(1, (len(names) * share + 50) // 100) for share in (VAL_PERCENT, TEST_PERCENT))
    return {name: "val" if n < val else "test" if n < val + test else "train" for n, name in enumerate(order)}


def _encoded(seed: int, name: str) -> bytes:
    return f"{seed}:{nfc(name)}".encode(errors="surrogateescape")


def split_by_file(classes: Iterable[str], path: Path) -> dict[str, str]:
    """Split of each class from a CSV with the columns class and split; further columns and classes are ignored.

    Raises:
        DataError: the file is missing or not such a CSV, names a class twice, or lacks a class.
    """
    given: dict[str, str] = {}
    for line, row in read_csv(path, ("class", "split")):
        name, split = nfc(row["class"].strip()), check_split(row["split"].strip(), path, line)
        if given.get(name, split) != split:
            raise DataError(f"'{path}', line {line}: class '{name}' is in {given[name]} and in {split}")
        given[name] = split
    names = sorted(set(classes))
    missing = [name for name in names if nfc(name) not in given]
    if missing:
        raise DataError(f"'{path}' has no split for {len(missing)} of {len(names)} classes: {listed(missing)}")
    return {name: given[nfc(name)] for name in names}


def read_csv(path: Path, needed: tuple[str, ...] = ()) -> Iterable[tuple[int, dict[str, str]]]:
    """Rows of a CSV with their line numbers; column names in lower case, values as they are.

    Raises:
        DataError: unreadable, not UTF-8, not separated by commas, a needed column is missing, two have one name, or a
            row has another number of cells.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            check_columns(header, path)
            absent = [name for name in needed if name not in header]
            if absent:
                raise DataError(f"'{path}' has no column '{absent[0]}'; its columns are {', '.join(header) or 'none'}")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(f"'{path}', line {reader.line_num}: {len(cells)} cells, expected {len(header)}")
                yield reader.line_num, dict(zip(header, cells, strict=True))
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"'{path}' is not a CSV file in UTF-8: {error}") from error


def check_columns(header: list[str], path: Path) -> None:
    """Raise `DataError` if two columns have one name, or something else than commas separates them."""
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"'{path}' has two columns called '{twice}'; rename or remove one")
    for mark, shown in SEPARATORS.items():
        if len(header) == 1 and mark in header[0]:
            raise DataError(f"'{path}' separates its columns with {shown}; save it with commas")


def check_split(split: str, path: Path, line: int) -> str:
    """The split if it is one; raises `DataError` naming the line otherwise."""
    if split not in SPLITS:
        raise DataError(f"'{path}', line {line}: split '{split}' should be one of {', '.join(SPLITS)}")
    return split


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
        seed: a different seed gives a different split.
    """
    order = sorted(range(count), key=lambda place: hashlib.sha256(_place_of(seed, name, place)).digest())
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
    for name, members in zip(whole.class_names, rows_by_label(whole.labels, len(whole.class_names)), strict=True):
        if len(members) < FEWEST:
            raise DataError(
                f"class '{name}' has {len(members)} images; splitting the images of every class needs at least {FEWEST}"
            )
        rows.append(members[split_of_images(name, len(members), seed)[split][:limit]])
    chosen = np.concatenate(rows)
    return StoredImages(whole.store, whole.items[chosen], whole.labels[chosen], whole.class_names, whole.left_out)


def _place_of(seed: int, name: str, place: int) -> bytes:
    return f"{seed}:{nfc(name)}:{place}".encode(errors="surrogateescape")
