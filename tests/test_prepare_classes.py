"""The class lists: counts, disjoint splits, and that they are the published ones."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from smkd.errors import DataError
from smkd.prepare.registry import BENCHMARKS, benchmark, class_list, class_table, ilsvrc_counts

SHARED = Path(__file__).parents[2] / "shared"
COUNTS = {
    "mini-imagenet": ((64, 38_400), (16, 9_600), (20, 12_000)),
    "tiered-imagenet": ((351, 448_695), (97, 124_261), (160, 206_209)),
    "cifar-fs": ((64, 38_400), (16, 9_600), (20, 12_000)),
    "fc100": ((60, 36_000), (20, 12_000), (20, 12_000)),
    "caltech101": ((64, 4_011), (16, 957), (20, 1_316)),
    "omniglot": ((883, 17_660), (81, 1_620), (659, 13_180)),
}
GROUPS = {"tiered-imagenet": (20, 6, 8), "fc100": (12, 4, 4), "omniglot": (25, 5, 20)}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    counts = BENCHMARKS[name].counts
    assert tuple((c.classes, c.images) for c in counts.values()) == COUNTS[name]
    assert set(BENCHMARKS) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_no_class_or_group_is_in_two_splits(name: str) -> None:
    entries = class_list(name)
    assert len({entry.folder for entry in entries}) == len(entries)
    splits_of = {}
    for entry in entries:
        if entry.group:
            splits_of.setdefault(entry.group, set()).add(entry.split)
    assert all(len(splits) == 1 for splits in splits_of.values())
    if name in GROUPS:
        per_split = Counter(next(iter(splits)) for splits in splits_of.values())
        assert tuple(per_split[split] for split in ("train", "val", "test")) == GROUPS[name]


@pytest.mark.parametrize("name", ["cifar-fs", "fc100"])
def test_cifar_labels_are_ranks(name: str) -> None:
    entries = class_list(name)
    assert [e.folder for e in sorted(entries, key=lambda e: e.label)] == sorted(e.folder for e in entries)
    assert sorted(e.label for e in entries) == list(range(100))


def test_tiered_categories_agree_with_the_classes() -> None:
    entries = class_list("tiered-imagenet")
    for row in class_table("tiered_imagenet_categories"):
        found = [entry for entry in entries if entry.group == row["category_wnid"]]
        assert {entry.split for entry in found} == {row["split"]}
        assert (len(found), sum(e.images for e in found)) == (int(row["classes"]), int(row["images"]))


def test_ilsvrc_has_its_known_total() -> None:
    assert len(ilsvrc_counts()) == 1000
    assert sum(ilsvrc_counts().values()) == 1_281_167


def test_caltech_split_is_the_documented_shuffle() -> None:
    entries = class_list("caltech101")
    names = sorted(entry.folder for entry in entries)
    random.Random(234).shuffle(names)
    splits = {name: "train" if i < 64 else "val" if i < 80 else "test" for i, name in enumerate(names)}
    assert {entry.folder: entry.split for entry in entries} == splits


def test_omniglot_val_are_the_smallest_background_alphabets() -> None:
    background = [row for row in class_table("omniglot") if row["part"] == "background"]
    smallest = sorted(background, key=lambda row: int(row["characters"]))[:5]
    assert {row["alphabet"] for row in background if row["split"] == "val"} == {row["alphabet"] for row in smallest}


def test_lists_are_the_shared_ones() -> None:
    if not SHARED.is_dir():
        pytest.skip("no shared data here")
    package = Path(__file__).parents[1] / "src" / "smkd" / "prepare" / "splits"
    published = sorted((SHARED / "splits").glob("*.csv"))
    assert published
    for path in published:
        assert (package / path.name).read_bytes() == path.read_bytes()
    caltech = SHARED / "data" / "caltech101-fs"
    assert (package / "caltech101.csv").read_bytes() == (caltech / "splits.csv").read_bytes()
    assert (package / "caltech101_repeats.csv").read_bytes() == (caltech / "duplicates_removed.csv").read_bytes()


def test_unknown_name_has_a_hint() -> None:
    with pytest.raises(DataError, match=r"unknown data set 'cifarfs'; did you mean 'cifar-fs'\?"):
        benchmark("cifarfs")
