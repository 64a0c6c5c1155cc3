"""What holds for any names, any split, any image size and any grid of patches."""

from __future__ import annotations

import csv
import os
import random
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.profiler import profile

from smkd.config.schema import MaskConfig
from smkd.data.augment import crop_resize, draw_mask, random_box, resize_center_crop
from smkd.data.formats import find_images, is_hidden, nfc
from smkd.data.images import SPLITS, FolderImages
from smkd.data.sources import open_dataset
from smkd.data.splits import FEWEST, split_by_file, split_by_seed, split_of_images

bounded = settings(
    max_examples=50, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)

ODD = st.sampled_from([*"éüñ日本🦉 '\"\n\r\t,;:|\\.*?%$#@~-_()[]{}abcXYZ019", "e\u0301", "\u212b", "\u1e9b\u0323"])
LETTERS = st.characters(exclude_characters="/\0", exclude_categories=("Cs",))
TEXTS = st.lists(ODD | LETTERS, min_size=1, max_size=8).map("".join)


def same(name: str) -> str:
    """Equal for names that some file system takes for one."""
    return nfc(unicodedata.normalize("NFD", name).casefold()).strip()


def is_file_name(name: str) -> bool:
    return name not in (".", "..") and not is_hidden(name) and bool(name.strip()) and len(os.fsencode(name)) < 200


CLASS_NAMES = st.lists(TEXTS.filter(is_file_name), min_size=3, max_size=6, unique_by=same)
FILE_NAMES = st.lists(
    TEXTS.map(lambda name: f"{name}.png").filter(is_file_name), min_size=1, max_size=5, unique_by=same
)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@bounded
@given(st.lists(st.text(min_size=1, max_size=6), min_size=3, max_size=60, unique_by=nfc), st.integers(0, 9), st.data())
def test_classes_are_split_once_whatever_their_order(names: list[str], seed: int, data: st.DataObject) -> None:
    split = split_by_seed(names, seed)
    assert set(split) == set(names)
    assert set(split.values()) == set(SPLITS)
    assert split == split_by_seed(data.draw(st.permutations(names)), seed)
    apart = [unicodedata.normalize("NFD", name) for name in names]
    assert list(split_by_seed(apart, seed).values()).count("test") == list(split.values()).count("test")
    assert {nfc(name): part for name, part in split_by_seed(apart, seed).items()} == {
        nfc(name): part for name, part in split.items()
    }


@bounded
@given(st.text(max_size=6), st.integers(FEWEST, 300), st.integers(0, 9))
def test_images_of_a_class_are_split_once(name: str, count: int, seed: int) -> None:
    split = split_of_images(name, count, seed)
    assert set(split) == set(SPLITS)
    assert all(len(part) and list(part) == sorted(part) for part in split.values())
    assert sorted(np.concatenate(list(split.values())).tolist()) == list(range(count))


@bounded
@given(CLASS_NAMES, st.data())
def test_a_split_file_is_followed_whatever_its_order(names: list[str], data: st.DataObject) -> None:
    names = list({name.strip(): name for name in names})
    wanted = {name: data.draw(st.sampled_from(SPLITS)) for name in names}
    with folder() as place:
        with (place / "splits.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("class", "split"), *data.draw(st.permutations(list(wanted.items())))])
        assert split_by_file(names, place / "splits.csv") == wanted


@bounded
@given(CLASS_NAMES, FILE_NAMES, st.data())
def test_a_folder_is_read_whatever_its_names(classes: list[str], files: list[str], data: st.DataObject) -> None:
    written: dict[str, dict[str, bytes]] = {}
    with folder() as place:
        for number, name in enumerate(data.draw(st.permutations(classes))):
            inside = data.draw(st.sampled_from(["", "deeper", "._hidden", ".thumbnails"]))
            (place / name / inside).mkdir(parents=True)
            (place / name / f".{files[0]}").write_bytes(b"hidden")
            for file in files:
                (place / name / inside / file).write_bytes(f"{number} {file}".encode())
                if is_hidden(inside):
                    (place / name / file).write_bytes(f"{number} {file}".encode())
            written[nfc(name)] = {file: f"{number} {file}".encode() for file in files}
        images = FolderImages(place)
        assert images.class_names == sorted(written)
        for label, name in enumerate(images.class_names):
            rows = np.flatnonzero(images.labels == label).tolist()
            assert {os.path.basename(images.name(row)): images.encoded(row) for row in rows} == written[name]
        parts = [open_dataset(place).open(split) for split in SPLITS]
        assert sorted(name for part in parts for name in part.class_names) == images.class_names
        assert find_images(place).images == sorted(find_images(place).images, key=lambda p: (nfc(p).split(os.sep), p))


@bounded
@given(CLASS_NAMES, FILE_NAMES, st.sampled_from(["NFC", "NFD", "as it is"]), st.integers(0, 99))
def test_a_table_is_read_whatever_its_names(classes: list[str], files: list[str], form: str, seed: int) -> None:
    content = {}
    with folder() as place:
        rows = []
        for number, label in enumerate(classes):
            (place / str(number)).mkdir()
            for file in files:
                (place / str(number) / file).write_bytes(f"{number} {file}".encode())
                path = f"{number}/{file}"
                rows.append((path if form == "as it is" else unicodedata.normalize(form, path), label))
                content[f"{number} {file}".encode()] = nfc(label.strip())
        random.Random(seed).shuffle(rows)
        with (place / "labels.csv").open("w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows([("path", "label"), *rows])
        source = open_dataset(place / "labels.csv")
        read = {}
        for split in SPLITS:
            images = source.open(split)
            for row in range(len(images)):
                read[images.encoded(row)] = images.class_names[images.labels[row]]
        assert read == content


SIDES = st.integers(1, 3_000)


@bounded
@given(SIDES, SIDES, st.floats(0.01, 1), st.floats(0, 1), st.integers(0, 2**32))
def test_boxes_lie_inside_any_image(height: int, width: int, low: float, more: float, seed: int) -> None:
    scale = (low, low + (1 - low) * more)
    box = random_box(height, width, scale, np.random.default_rng(seed))
    assert box.height >= 1
    assert box.width >= 1
    assert 0 <= box.top <= height - box.height
    assert 0 <= box.left <= width - box.width


@bounded
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(0, 2**32))
def test_a_crop_has_its_size_and_the_colours_of_its_image(height: int, width: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    colour = torch.from_numpy(rng.integers(0, 256, (3, 1, 1), dtype=np.uint8))
    image = colour.expand(3, height, width)
    for cut in (
        crop_resize(image, random_box(height, width, (0.1, 1), rng), size),
        resize_center_crop(image, size, size),
    ):
        assert cut.dtype == torch.uint8
        assert torch.equal(cut, colour.expand(3, size, size))


@bounded
@given(
    st.integers(1, 4), st.integers(1_000, 20_000), st.booleans(), st.integers(1, 96), st.floats(0.01, 1), st.integers(0)
)
def test_a_training_view_of_a_thin_image_takes_little_memory(
    short: int, long: int, upright: bool, size: int, low: float, seed: int
) -> None:
    height, width = (long, short) if upright else (short, long)
    image = torch.full((3, 1, 1), 7, dtype=torch.uint8).expand(3, height, width)
    box = random_box(height, width, (low, 1), np.random.default_rng(seed))
    assert max(box.height, box.width) <= 2 * min(box.height, box.width)
    with profile(profile_memory=True) as memory:
        view = crop_resize(image, box, size)
    assert torch.equal(view, torch.full((3, size, size), 7, dtype=torch.uint8))
    taken = sum(max(0, each.self_cpu_memory_usage) for each in memory.key_averages())
    assert taken <= 50_000 + 30 * size * size


@bounded
@given(st.integers(1, 3_000), st.integers(1, 3_000), st.integers(1, 48), st.integers(0, 16))
def test_evaluation_views_of_any_image(height: int, width: int, crop: int, more: int) -> None:
    view = resize_center_crop(torch.full((3, height, width), 7, dtype=torch.uint8), crop + more, crop)
    assert torch.equal(view, torch.full((3, crop, crop), 7, dtype=torch.uint8))


@bounded
@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from(["block", "random"]), st.floats(0, 1), st.floats(0, 1),
    st.integers(0, 5), st.integers(0, 2**32),
)  # fmt: skip
def test_masks_hide_no_more_than_they_may(
    rows: int, columns: int, shape: str, ratio: float, jitter: float, start: int, seed: int
) -> None:
    config = MaskConfig(shape=shape, ratio=(0.0, ratio), ratio_jitter=(0.0, ratio * jitter), start_epoch=start)
    mask = draw_mask(config, (rows, columns), 2, np.random.default_rng(seed))
    assert mask.dtype == np.bool_
    assert mask.shape == (rows, columns)
    assert mask.sum() <= np.ceil(rows * columns * ratio * (1 + jitter))
    if start > 2:
        assert not mask.any()
