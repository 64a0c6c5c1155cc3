"""The class lists of the data sets: which class is in which split, and how many images it has."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources

SPLITS = ("train", "val", "test")
PER_CLASS = 600
"""Images of every class of miniImageNet, CIFAR-FS and FC100."""
DRAWERS = 20
"""Images of every Omniglot character: each was drawn by twenty people."""


@dataclass(frozen=True)
class ClassEntry:
    """One class: its folder, its split, and the number of images it has there."""

    folder: str
    split: str
    images: int
    title: str = ""
    group: str = ""
    """Super-class, category or alphabet; no group of FC100 or tieredImageNet is in two splits."""
    label: int = -1
    """CIFAR-100 fine label; -1 elsewhere."""


@dataclass(frozen=True)
class SplitCount:
    """Size of one split."""

    classes: int
    images: int


def table(name: str) -> list[dict[str, str]]:
    """Rows of one of the lists in `splits/`, whose README names their sources."""
    text = resources.files("smkd.prepare").joinpath("splits", f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


@cache
def ilsvrc_counts() -> dict[str, int]:
    """Number of ILSVRC-12 training images of each of the 1,000 classes."""
    return {row["wnid"]: int(row["images"]) for row in table("ilsvrc12_train_counts")}


@cache
def class_list(name: str) -> tuple[ClassEntry, ...]:
    """Classes of one data set, sorted by folder within each split."""
    return tuple(_LISTS[name]())


def count(entries: Iterable[ClassEntry]) -> dict[str, SplitCount]:
    """Classes and images of each split."""
    sizes: dict[str, list[int]] = {split: [] for split in SPLITS}
    for entry in entries:
        sizes[entry.split].append(entry.images)
    return {split: SplitCount(len(found), sum(found)) for split, found in sizes.items()}


def _mini_imagenet() -> Iterable[ClassEntry]:
    for row in table("mini_imagenet"):
        yield ClassEntry(row["wnid"], row["split"], PER_CLASS, row["class_name"])


def _tiered_imagenet() -> Iterable[ClassEntry]:
    counts = ilsvrc_counts()
    for row in table("tiered_imagenet"):
        wnid = row["wnid"]
        yield ClassEntry(wnid, row["split"], counts[wnid], row["class_name"], row["category_wnid"])


def _cifar_fs() -> Iterable[ClassEntry]:
    for row in table("cifar_fs"):
        yield ClassEntry(row["class_name"], row["split"], PER_CLASS, label=int(row["fine_label_id"]))


def _fc100() -> Iterable[ClassEntry]:
    for row in table("fc100"):
        group, label = row["superclass"], int(row["fine_label_id"])
        yield ClassEntry(row["class_name"], row["split"], PER_CLASS, group=group, label=label)


def _caltech101() -> Iterable[ClassEntry]:
    for row in table("caltech101"):
        yield ClassEntry(row["class"], row["split"], int(row["count"]))


def _omniglot() -> Iterable[ClassEntry]:
    for row in table("omniglot"):
        for number in range(1, int(row["characters"]) + 1):
            folder = f"{row['alphabet']}-character{number:02}"
            yield ClassEntry(folder, row["split"], DRAWERS, group=row["alphabet"])


_LISTS = {
    "mini-imagenet": _mini_imagenet,
    "tiered-imagenet": _tiered_imagenet,
    "cifar-fs": _cifar_fs,
    "fc100": _fc100,
    "caltech101": _caltech101,
    "omniglot": _omniglot,
}
