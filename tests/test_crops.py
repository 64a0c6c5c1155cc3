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

from smkd.data.augment import CROP_ASPECT, Box, crop_resize, random_box, resize_center_crop

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "caltech101-mini"
BICUBIC = Image.Resampling.BICUBIC
Pixels = NDArray[np.uint8]
Make = Callable[[int, int, np.random.Generator], Pixels]


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


def photograph(height: int, width: int, rng: np.random.Generator) -> Pixels:
    """Like a photograph: structure of every size, the coarser the stronger."""
    picture = np.zeros((height, width, 3))
    for grain in (1, 2, 4, 8, 16, 32, 64):
        coarse = rng.integers(0, 256, (max(2, height // grain), max(2, width // grain), 3), dtype=np.uint8)
        picture += grain * np.asarray(Image.fromarray(coarse).resize((width, height), BICUBIC)).astype(float)
    return (120 + 60 * (picture - picture.mean()) / picture.std()).clip(0, 255).round().astype(np.uint8)


def assert_near_pillow(differences: list[NDArray[np.int64]], per_million: float) -> None:
    """No value is more than two grey levels away, and so many of a million are two away."""
    counts = sum(np.bincount(d.ravel(), minlength=3) for d in differences)
    assert len(counts) == 3
    assert counts[1] < 0.05 * counts.sum()
    assert counts[2] <= per_million * 1e-6 * counts.sum()


@pytest.mark.parametrize("make", [noise, photograph])
def test_is_pillow_within_one_value_in_a_million(make: Make) -> None:
    """Crops of the recipes, made smaller from photographs of usual sizes."""
    rng = np.random.default_rng(0)
    differences = []
    for _ in range(8):
        image = make(480, 480, rng)
        views = [(224, (0.25, 1.0))] * 6 + [(96, (0.05, 0.25))] * 20
        differences += [difference(image, random_box(480, 480, scale, rng), size) for size, scale in views]
    assert sum(d.size for d in differences) > 10_000_000
    assert_near_pillow(differences, 1)


@pytest.mark.parametrize("make", [noise, photograph, waves])
def test_is_near_pillow_for_any_box(make: Make) -> None:
    """Made larger, and where a smooth image lies at the middle between two levels, more values are two away."""
    rng = np.random.default_rng(0)
    factors, differences = [], []
    for _ in range(300):
        height, width = (int(side) for side in rng.integers(10, 400, 2))
        box, size = random_box(height, width, (0.05, 1.0), rng), int(rng.integers(4, 230))
        differences.append(difference(make(height, width, rng), box, size))
        factors.append(size / box.width)
    assert_near_pillow(differences, 50)
    assert min(factors) < 0.5
    assert max(factors) > 2.0


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
    assert_near_pillow(differences, 50)


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
        (height - min(height, round(width / CROP_ASPECT[0]))) // 2,
        (width - min(width, round(height * CROP_ASPECT[1]))) // 2,
        min(height, round(width / CROP_ASPECT[0])), min(width, round(height * CROP_ASPECT[1])),
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
        assert (w + 0.5) / (h - 0.5) >= CROP_ASPECT[0]
        assert (w - 0.5) / (h + 0.5) <= CROP_ASPECT[1]
    shares = np.array([h * w / (height * width) for _, _, h, w in drawn])
    if scale[1] <= 0.25:  # small boxes always fit, so nothing skews the draws
        assert abs(shares.mean() - sum(scale) / 2) < 0.01
        assert shares.min() < scale[0] + 0.01
        assert shares.max() > scale[1] - 0.01
        logs = np.array([math.log(w / h) for _, _, h, w in drawn])
        assert abs(logs.mean()) < 0.02
        # of a uniform variable from log 3/4 to log 4/3
        assert abs(logs.std() - (math.log(CROP_ASPECT[1]) - math.log(CROP_ASPECT[0])) / math.sqrt(12)) < 0.01
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
