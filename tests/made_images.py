"""Images for the tests: encoded ones, and folders of them. Every test that needs a folder of images makes it here."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from smkd.data.datasets import PatternImages

SPLITS = ("train", "val", "test")


def encode(image: Image.Image | NDArray[Any], kind: str = "PNG", **options: object) -> bytes:
    """The bytes of a file of this kind."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(size: tuple[int, int], seed: int | Sequence[int] = 0) -> NDArray[np.uint8]:
    """Colours without any order, uint8 [height, width, 3]; `size` is (width, height), as Pillow has it."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def write_classes(root: Path, counts: Mapping[str, int], picture: Callable[[int, int], bytes], names: str) -> Path:
    """A folder of so many images for each class; `picture` is given the class's and the image's number."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / names.format(number)).write_bytes(picture(label, number))
    return root


def write_splits(
    root: Path, counts: Sequence[Sequence[int]], picture: Callable[[int, int, int], bytes], names: str = "{:03}.jpg"
) -> Path:
    """`write_classes` in train, val and test; `picture` is given the split's number before the other two."""
    for place, (split, sizes) in enumerate(zip(SPLITS, counts, strict=True)):
        classes = {f"{split}-{label}": count for label, count in enumerate(sizes)}
        write_classes(root / split, classes, lambda label, number, place=place: picture(place, label, number), names)
    return root


def noisy_splits(root: Path, classes: int = 6, images: int = 12) -> Path:
    """Noisy JPEG files of 40 x 36 pixels, so many of each of so many classes in each split, which differ in colour."""

    def picture(*seed: int) -> bytes:
        tint = np.random.default_rng(seed[:2]).integers(40, 216, 3)
        values = tint + np.random.default_rng(seed).normal(0, 25, (36, 40, 3))
        return encode(np.clip(values, 0, 255).astype(np.uint8), "JPEG")

    return write_splits(root, [[images] * classes] * 3, picture)


def sized_splits(root: Path, images: int = 14, side: int = 60) -> Path:
    """Smooth JPEG files whose sides are `side / 2` to `side` pixels; 5, 1 and 1 classes in the splits."""

    def picture(*seed: int) -> bytes:
        width, height = np.random.default_rng(seed).integers(side // 2, side, 2).tolist()
        return encode(Image.fromarray(noise((5, 4), seed)).resize((width, height)), "JPEG")

    return write_splits(root, [[images] * 5, [images], [images]], picture)


def photographs(root: Path, counts: Sequence[int], *, split: str = "test", skip: int = 0) -> Path:
    """Class folders of PNG files of embedded patterns: so many of each of the first classes, after the first `skip`."""
    images = PatternImages(split, skip + max(counts))

    def picture(label: int, number: int) -> bytes:
        index = int(np.flatnonzero(images.labels == label)[skip + number])
        return encode(images.load(index).permute(1, 2, 0).numpy())

    return write_classes(root, dict(zip(images.class_names, counts, strict=False)), picture, "{:02}.png")
