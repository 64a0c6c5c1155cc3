"""CIFAR-FS and FC100 from the CIFAR-100 python archive: both parts merged, split by class."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smkd.errors import DataError
from smkd.prepare.archives import MIB, Bounds, tar_members
from smkd.prepare.build import Plan
from smkd.prepare.pickles import PickledArray, Span, read_pickle
from smkd.prepare.registry import ClassEntry
from smkd.prepare.writing import Item, Pixels

CIFAR_SIDE = 32
PART_SIZES: Mapping[str, int] = {"train": 500, "test": 100}
"""Images of each class in the two parts of CIFAR-100."""
CIFAR_BOUNDS = Bounds(member=256 * MIB, total=512 * MIB)
"""The true archive holds a file of 148 MiB, 178 MiB in all."""
EXPECTED = "cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html is needed"
OTHER_ARCHIVES = {
    "data_batch_1": "CIFAR-10",
    "batches.meta": "CIFAR-10",
    "train.bin": "the binary version of CIFAR-100",
    "train.mat": "the Matlab version of CIFAR-100",
}


@dataclass(frozen=True)
class CifarPart:
    """One of the two parts: images as uint8 [n, 3, 32, 32] and their fine labels."""

    name: str
    images: NDArray[np.uint8]
    labels: list[int]


def plan_cifar(archive: Path, entries: Sequence[ClassEntry], part_sizes: Mapping[str, int] = PART_SIZES) -> Plan:
    """The images of the archive, as `<split>/<class>/<part>-<row>.png`.

    Args:
        archive: CIFAR-100's python archive.
        entries: the classes, with their fine labels (and super-classes, which are then checked).
        part_sizes: images of each class in each part.

    Raises:
        DataError: the archive is another one, damaged, hostile, or lacks classes or images.
    """
    files = _read_files(archive)
    meta = read_pickle(io.BytesIO(files["meta"]), f"{archive}: meta")
    _check_names(archive, _names(archive, meta, "fine_label_names"), entries)
    groups = _names(archive, meta, "coarse_label_names")
    parts = []
    for name in part_sizes:
        content = files.pop(name)
        parts.append(_part(archive, name, content, {e.label: e for e in entries}, groups))
    for part in parts:
        _check_sizes(archive, part, entries, part_sizes[part.name])
    return Plan(_items(parts, entries), total=sum(len(part.labels) for part in parts))


def _read_files(archive: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for member in tar_members(archive, CIFAR_BOUNDS):
        name = PurePosixPath(member.name).name
        if name in OTHER_ARCHIVES:
            raise DataError(f"archive '{archive}' is {OTHER_ARCHIVES[name]}; {EXPECTED}")
        if name in ("meta", *PART_SIZES):
            found[name] = member.read()
    missing = [name for name in ("meta", *PART_SIZES) if name not in found]
    if missing:
        raise DataError(f"archive '{archive}' holds no file '{missing[0]}'; {EXPECTED}")
    return found


def _names(archive: Path, meta: dict[str, Any], field: str) -> list[str]:
    names = meta.get(field)
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise DataError(f"archive '{archive}': meta has no list '{field}'; {EXPECTED}")
    return [name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names]


def _check_names(archive: Path, names: list[str], entries: Sequence[ClassEntry]) -> None:
    for entry in entries:
        if entry.folder not in names:
            raise DataError(f"archive '{archive}' lacks class '{entry.folder}'; {EXPECTED}")
        if names.index(entry.folder) != entry.label:
            label = names.index(entry.folder)
            raise DataError(f"archive '{archive}': class '{entry.folder}' has label {label}, expected {entry.label}")


def _part(archive: Path, name: str, content: bytes, entries: dict[int, ClassEntry], groups: list[str]) -> CifarPart:
    values = read_pickle(io.BytesIO(content), f"{archive}: {name}")
    data, labels, coarse = (values.get(key) for key in ("data", "fine_labels", "coarse_labels"))
    if not isinstance(data, PickledArray) or data.dtype != "u1" or data.shape[1:] != (3 * CIFAR_SIDE * CIFAR_SIDE,):
        raise DataError(f"archive '{archive}': part '{name}' has no uint8 'data' of 3072 columns; {EXPECTED}")
    count = data.shape[0]
    for field, given, most in (("fine_labels", labels, len(entries)), ("coarse_labels", coarse, len(groups))):
        right = isinstance(given, list) and len(given) == count
        if not right or not all(isinstance(label, int) and 0 <= label < most for label in given or ()):
            raise DataError(f"archive '{archive}': part '{name}' needs {count} '{field}' from 0 to {most - 1}")
    assert isinstance(labels, list)
    assert isinstance(coarse, list)
    for label, group in zip(labels, coarse, strict=True):
        entry = entries[label]
        if entry.group and entry.group != groups[group]:
            raise DataError(
                f"archive '{archive}': class '{entry.folder}' is in super-class '{groups[group]}', "
                f"expected '{entry.group}'"
            )
    at = data.content
    raw = memoryview(content)[at.offset : at.offset + at.size] if isinstance(at, Span) else at
    return CifarPart(name, np.frombuffer(raw, np.uint8).reshape(count, 3, CIFAR_SIDE, CIFAR_SIDE), labels)


def _check_sizes(archive: Path, part: CifarPart, entries: Sequence[ClassEntry], expected: int) -> None:
    counts = Counter(part.labels)
    for entry in entries:
        if counts[entry.label] != expected:
            raise DataError(
                f"archive '{archive}': part '{part.name}' holds {counts[entry.label]} images of class "
                f"'{entry.folder}', expected {expected}; {EXPECTED}"
            )


def _items(parts: Sequence[CifarPart], entries: Sequence[ClassEntry]) -> Iterator[Item]:
    by_label = {entry.label: entry for entry in entries}
    for part in parts:
        for row, label in enumerate(part.labels):
            entry = by_label[label]
            pixels = part.images[row].transpose(1, 2, 0).tobytes()
            yield Item(f"{entry.split}/{entry.folder}/{part.name}-{row:05}.png", Pixels(pixels, CIFAR_SIDE, CIFAR_SIDE))
