"""Photographs taken with the camera on its side are looked at upright, everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from made_images import encode, write_splits
from smkd.classify.pictures import Pictures
from smkd.config.schema import DataConfig
from smkd.data.cache import cached
from smkd.data.datasets import open_split
from smkd.data.decoding import decode, shape

UPRIGHT = np.zeros((24, 16, 3), dtype=np.uint8)
UPRIGHT[:12] = (250, 30, 20)  # red above blue
UPRIGHT[12:] = (20, 40, 240)
# what the sensor saw: EXIF's 1 is upright, 3 upside down, 6 and 8 on a side
SENSOR = {1: 0, 3: 2, 6: 1, 8: 3}


def photograph(orientation: int, suffix: str = "JPEG") -> bytes:
    image = Image.fromarray(np.rot90(UPRIGHT, SENSOR[orientation]).copy())
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = orientation
    return encode(image, suffix, exif=exif, **({"quality": 98} if suffix == "JPEG" else {}))


def is_upright(pixels: np.ndarray) -> bool:
    return pixels.shape == UPRIGHT.shape and bool(np.abs(pixels.astype(int) - UPRIGHT)[[2, -3]].max() < 40)


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", SENSOR)
def test_decoded_upright(orientation: int, suffix: str) -> None:
    data = photograph(orientation, suffix)
    assert is_upright(np.asarray(decode(data)))
    assert shape(data) == UPRIGHT.shape[:2]


def test_broken_metadata_is_no_broken_picture() -> None:
    data = photograph(6).replace(b"Exif\0\0MM", b"Exif\0\0??").replace(b"Exif\0\0II", b"Exif\0\0??")
    assert decode(data).size == (24, 16)  # as it lies in the file


@pytest.mark.parametrize("cache", ["none", "memory", "mmap"])
def test_training_images(tmp_path: Path, cache: str) -> None:
    orientations = [*SENSOR]
    photos = write_splits(
        tmp_path / "photos", [[2, 2]] * 3, lambda _, label, number: photograph(orientations[2 * number + label])
    )
    config = DataConfig(root=photos, cache=cache, cache_dir=None if cache != "mmap" else tmp_path / "c")
    images = cached(open_split(config, "train"), config, "train")
    for index in range(len(images)):
        assert is_upright(images.load(index).permute(1, 2, 0).numpy())


def test_pictures_of_a_classifier(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(photograph(8))
    seen = Pictures([file, Image.open(file)])
    assert all(torch.equal(seen.load(index), seen.load(0)) for index in range(2))
    assert is_upright(seen.load(0).permute(1, 2, 0).numpy())
