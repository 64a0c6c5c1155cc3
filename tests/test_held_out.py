"""Held-out images: how they are chosen, and what may be said of a gain on them; and when a run stops."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from image_forms import CLASSES, FORMS, PER_CLASS, pixels
from made_images import photographs
from smkd.config.schema import DataConfig
from smkd.data.datasets import describe, open_split
from smkd.data.splits import split_of_images
from smkd.engine.run_folder import Selection
from smkd.errors import DataError
from smkd.fewshot.intervals import of_paired_gain

SPLITS = ("train", "val", "test")


@pytest.mark.parametrize("count", [4, 5, 17, 100])
def test_every_image_is_in_one_split(count: int) -> None:
    parts = split_of_images("ant", count, 0)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(count))
    assert len(parts["val"]) == max(1, math.floor(0.16 * count + 0.5))
    assert len(parts["test"]) == max(1, math.floor(0.20 * count + 0.5))
    again, other = split_of_images("ant", count, 0), split_of_images("ant", count, 1)
    assert all(np.array_equal(parts[split], again[split]) for split in SPLITS)
    assert count < 10 or not np.array_equal(parts["test"], other["test"])


def test_the_order_of_the_hash_is_kept() -> None:
    # written down once: a run that resumes elsewhere must hold out the same images
    found = {split: part.tolist() for split, part in split_of_images("ant", 8, 0).items()}
    assert found == {"val": [0], "test": [4, 7], "train": [1, 2, 3, 5, 6]}


def test_all_classes_are_in_every_split_wherever_the_folder_lies(tmp_path: Path) -> None:
    photographs(tmp_path / "a", (10, 7, 4))
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
    names = []
    for root in (tmp_path / "a", tmp_path / "elsewhere" / "b"):
        config = DataConfig(root=root, split_by="images")
        opened = [open_split(config, split) for split in SPLITS]
        assert {tuple(images.class_names) for images in opened} == {tuple(sorted(p.name for p in root.iterdir()))}
        assert [np.bincount(images.labels).tolist() for images in opened] == [[6, 5, 2], [2, 1, 1], [2, 1, 1]]
        names.append([[Path(images.name(i)).relative_to(root) for i in range(len(images))] for images in opened])
        assert describe(config).endswith("images of each class split with seed 0; classes: 3")
    assert names[0] == names[1]
    assert len({path for split in names[0] for path in split}) == 21
    limited = open_split(DataConfig(root=tmp_path / "a", split_by="images", limit_per_class=2), "train")
    assert np.bincount(limited.labels).tolist() == [2, 2, 2]


@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith(("Parquet", "hub"))])
def test_every_form_is_split_the_same(tmp_path: Path, form: str) -> None:
    config = DataConfig(root=FORMS[form](tmp_path / "data set"), split_by="images")
    opened = {split: open_split(config, split) for split in SPLITS}
    if "splits of its own (data.split_by is not used)" in describe(config):
        assert sum(len(images.class_names) for images in opened.values()) == len(CLASSES)
        return
    for label, name in enumerate(CLASSES):
        places = split_of_images(name, PER_CLASS, 0)
        for split, images in opened.items():
            assert images.class_names == CLASSES
            found = [images.load(index).permute(1, 2, 0) for index in np.flatnonzero(images.labels == label)]
            expected = {pixels(label, number).tobytes() for number in range(PER_CLASS)}
            assert {each.contiguous().numpy().tobytes() for each in found} < expected
            assert len(found) == len(places[split])


def test_a_class_too_small_to_split_is_named(tmp_path: Path) -> None:
    photographs(tmp_path / "a", (10, 3))
    with pytest.raises(DataError, match=r"has 3 images; splitting the images of every class needs at least 4"):
        open_split(DataConfig(root=tmp_path / "a", split_by="images"), "val")


def test_the_interval_of_a_paired_gain_holds_its_level() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        first = rng.random(30) < 0.6
        second = np.where(rng.random(30) < 0.8, first, rng.random(30) < 0.75)
        gain = of_paired_gain(first, second)
        # 0.2 of the images are drawn anew: 0.6 becomes 0.75 there
        inside += gain.low <= 100 * 0.2 * (0.75 - 0.6) <= gain.high
    assert inside / 400 > 0.93
    same = of_paired_gain(first, first)
    assert same.points == 0
    assert same.low < 0 < same.high
    assert of_paired_gain(np.zeros(50, bool), np.ones(50, bool)).low > 80


def test_patience_counts_validations_without_a_gain() -> None:
    selection = Selection(patience=2)
    taken = [selection.take(value, step) for step, value in enumerate((30.0, None, 30.0, 31.0, 29.0))]
    assert taken == [True, False, False, True, False]
    assert (selection.best, selection.stale, selection.exhausted) == (31.0, 1, False)
    selection.take(31.0, 5)
    assert selection.exhausted
    endless = Selection(stale=99)
    assert not endless.exhausted
