"""Crops against Pillow, and the statistics of random boxes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from smkd.data import crops
from smkd.data.crops import ASPECT, Box, crop_resize, random_box, resize_center_crop
from smkd.data.resampling import BITS, resize_weights

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "caltech101-mini"
BICUBIC = Image.Resampling.BICUBIC
Pixels = NDArray[np.uint8]


def with_pillow(image: Pixels, box: Box, size: int) -> NDArray[np.int64]:
    part = Image.fromarray(image).crop((box.left, box.top, box.left + box.width, box.top + box.height))
    resized = part.resize((size, size), BICUBIC)
    return np.asarray(resized).astype(np.int64)


def with_ours(image: Pixels, box: Box, size: int) -> NDArray[np.int64]:
    result = crop_resize(torch.from_numpy(image).permute(2, 0, 1), box, size)
    assert result.dtype == torch.uint8
    assert result.shape == (3, size, size)
    return result.permute(1, 2, 0).numpy().astype(np.int64)


def difference(image: Pixels, box: Box, size: int) -> NDArray[np.int64]:
    return np.abs(with_ours(image, box, size) - with_pillow(image, box, size))


def noise(height: int, width: int, rng: np.random.Generator) -> Pixels:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def waves(height: int, width: int, rng: np.random.Generator) -> Pixels:
    """A smooth image: one slow wave per channel."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    channels = [
        127.5 + 127.5 * np.sin(2 * np.pi * (x * fx + y * fy) + phase) for fx, fy, phase in rng.uniform(0.3, 3.0, (3, 3))
    ]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def assert_equal_to_pillow(differences: list[NDArray[np.int64]]) -> None:
    assert max(int(d.max()) for d in differences) <= 1


@pytest.mark.parametrize("make", [noise, waves])
def test_equals_pillow(make: Callable[[int, int, np.random.Generator], Pixels]) -> None:
    rng = np.random.default_rng(0)
    factors, differences = [], []
    for _ in range(200):
        height, width = (int(side) for side in rng.integers(10, 400, 2))
        box, size = random_box(height, width, (0.05, 1.0), rng), int(rng.integers(4, 130))
        differences.append(difference(make(height, width, rng), box, size))
        factors.append(size / box.width)
    assert_equal_to_pillow(differences)
    assert min(factors) < 0.5
    assert max(factors) > 2.0


@pytest.mark.parametrize(("size", "scale"), [(224, (0.25, 1.0)), (96, (0.05, 0.25)), (96, (0.02, 0.06))])
def test_equals_pillow_at_the_sizes_of_the_recipes(size: int, scale: tuple[float, float]) -> None:
    """Noise, with boxes of both orders of passes and of both kernels."""
    rng = np.random.default_rng(8)
    image = noise(480, 480, rng)
    boxes = [random_box(480, 480, scale, rng) for _ in range(60)]
    assert_equal_to_pillow([difference(image, box, size) for box in boxes])
    if crops.VERTICAL_FIRST:
        assert len({crops.vertical_first(box.height, box.width, size) for box in boxes}) == 2


@pytest.mark.parametrize("size", [24, 31, 48])
def test_order_of_passes_is_pillows(size: int) -> None:
    rng = np.random.default_rng(9)
    for height, width in rng.integers(8, 120, (150, 2)).tolist():
        if size in (height, width):
            continue
        picture = Image.fromarray(noise(height, width, rng))
        middle = (width, size) if crops.vertical_first(height, width, size) else (size, height)
        in_turn = picture.resize(middle, BICUBIC).resize((size, size), BICUBIC)
        assert np.array_equal(np.asarray(in_turn), np.asarray(picture.resize((size, size), BICUBIC)))


@pytest.mark.parametrize(("length", "size"), [(125, 96), (97, 96), (336, 224), (10, 48), (3, 50), (1, 7), (400, 33)])
def test_weights_are_pillows(length: int, size: int) -> None:
    """Computing with them in whole numbers, as Pillow does, gives its pixels."""
    (first,), (weights,) = resize_weights(torch.tensor([length]), size)
    line = np.random.default_rng(10).integers(0, 256, (200, length), dtype=np.uint8)
    padded = np.pad(line, ((0, 0), (0, weights.shape[1]))).astype(np.int64)
    sums = [padded[:, f : f + len(w)] @ w.numpy() for f, w in zip(first.tolist(), weights, strict=True)]
    expected = np.asarray(Image.fromarray(line).resize((size, 200), BICUBIC))
    assert np.array_equal(((np.stack(sums, axis=1) + 2 ** (BITS - 1)) >> BITS).clip(0, 255), expected)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photographs are not here")
def test_equals_pillow_on_photographs() -> None:
    rng = np.random.default_rng(1)
    files = sorted(PHOTOS.rglob("*.jpg"))
    differences = []
    for number in rng.choice(len(files), 50, replace=False):
        with Image.open(files[number]) as file:
            photo = np.array(file.convert("RGB"))
        for scale, size in (((0.05, 0.25), 96), ((0.25, 1.0), 224), ((0.05, 1.0), 48), ((0.01, 0.05), 128)):
            differences.append(difference(photo, random_box(*photo.shape[:2], scale, rng), size))
    assert_equal_to_pillow(differences)


def test_whole_image_at_its_own_size_is_left_alone() -> None:
    image = noise(32, 32, np.random.default_rng(2))
    assert np.array_equal(with_ours(image, Box(0, 0, 32, 32), 32), image)


def test_crop_is_cut_where_the_box_says() -> None:
    image = noise(40, 50, np.random.default_rng(3))
    assert np.array_equal(with_ours(image, Box(7, 11, 16, 16), 16), image[7:23, 11:27])


@pytest.mark.parametrize("scale", [(0.05, 0.25), (0.25, 1.0), (0.4, 0.4)])
@pytest.mark.parametrize(("height", "width"), [(224, 224), (300, 200), (240, 400)])
def test_random_boxes(height: int, width: int, scale: tuple[float, float]) -> None:
    rng = np.random.default_rng(4)
    boxes = [random_box(height, width, scale, rng) for _ in range(2000)]
    fallback = Box(
        (height - min(height, round(width / ASPECT[0]))) // 2,
        (width - min(width, round(height * ASPECT[1]))) // 2,
        min(height, round(width / ASPECT[0])), min(width, round(height * ASPECT[1])),
    )  # fmt: skip
    drawn = [box for box in boxes if box != fallback]
    assert len(drawn) > 1900
    for top, left, h, w in boxes:
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
    # sides are rounded to whole pixels, by at most a half
    for _, _, h, w in drawn:
        assert (h + 0.5) * (w + 0.5) >= scale[0] * height * width
        assert (h - 0.5) * (w - 0.5) <= scale[1] * height * width
        assert (w + 0.5) / (h - 0.5) >= ASPECT[0]
        assert (w - 0.5) / (h + 0.5) <= ASPECT[1]
    shares = np.array([h * w / (height * width) for _, _, h, w in drawn])
    if scale[1] <= 0.25:  # small boxes always fit, so nothing skews the draws
        assert abs(shares.mean() - sum(scale) / 2) < 0.01
        assert shares.min() < scale[0] + 0.01
        assert shares.max() > scale[1] - 0.01
        logs = np.array([math.log(w / h) for _, _, h, w in drawn])
        assert abs(logs.mean()) < 0.02
        # of a uniform variable from log 3/4 to log 4/3
        assert abs(logs.std() - (math.log(ASPECT[1]) - math.log(ASPECT[0])) / math.sqrt(12)) < 0.01
        place = np.array([(top / (height - h), left / (width - w)) for top, left, h, w in drawn])
        assert np.abs(place.mean(axis=0) - 0.5).max() < 0.03


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (10, 1000, Box(0, 493, 10, 13)),
        (1000, 10, Box(493, 0, 13, 10)),
        (1, 500, Box(0, 249, 1, 1)),
    ],
)
def test_extreme_images_take_the_centre(height: int, width: int, expected: Box) -> None:
    rng = np.random.default_rng(5)
    # no box of an allowed aspect has half of the area of a ribbon
    boxes = {random_box(height, width, (0.5, 1.0), rng) for _ in range(50)}
    assert len(boxes) == 1
    box = boxes.pop()
    assert (box.height, box.width) == (expected.height, expected.width)
    assert abs(box.top - expected.top) <= 1
    assert abs(box.left - expected.left) <= 1


@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (32, 32), (360, 320), (37, 20)])
@pytest.mark.parametrize(("height", "width"), [(300, 200), (200, 300), (84, 84), (33, 500), (17, 19)])
def test_resize_center_crop(height: int, width: int, resize: int, crop: int) -> None:
    image = waves(height, width, np.random.default_rng(6))
    result = resize_center_crop(torch.from_numpy(image).permute(2, 0, 1), resize, crop)
    assert result.shape == (3, crop, crop)
    assert result.dtype == torch.uint8
    # what torchvision's Resize and CenterCrop do, in Pillow
    short = min(height, width)
    size = (int(resize * width / short), int(resize * height / short))
    resized = Image.fromarray(image).resize(size, BICUBIC)
    left, top = round((size[0] - crop) / 2), round((size[1] - crop) / 2)
    expected = np.asarray(resized.crop((left, top, left + crop, top + crop))).astype(np.int64)
    apart = np.abs(result.permute(1, 2, 0).numpy().astype(np.int64) - expected)
    assert apart.max() == 0
