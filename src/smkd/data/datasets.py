"""The table of data sets, and opening one split of one of them as a sequence of uint8 images.

A folder data set is `<root>/<train|val|test>/<class>/<image>`; `patterns` needs no files.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from smkd.config.schema import DataConfig
from smkd.data import patterns
from smkd.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = (
    (129.37731888 / 255, 124.10583864 / 255, 112.47758569 / 255),
    (68.20947949 / 255, 65.43124043 / 255, 70.45866994 / 255),
)
PATTERNS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@dataclass(frozen=True)
class DatasetSpec:
    """Facts about a data set: channel mean and standard deviation on the 0-1 scale."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


DATASETS = {
    "mini-imagenet": DatasetSpec(*IMAGENET),
    "tiered-imagenet": DatasetSpec(*IMAGENET),
    "cifar-fs": DatasetSpec(*CIFAR),
    "fc100": DatasetSpec(*CIFAR),
    "caltech101": DatasetSpec(*IMAGENET),
    "folder": DatasetSpec(*IMAGENET),
    "patterns": DatasetSpec(*PATTERNS),
}


class Images(Protocol):
    """One split: labelled uint8 images, loaded one at a time."""

    labels: NDArray[np.int64]
    """[len] class index of each image."""
    class_names: list[str]

    def __len__(self) -> int: ...

    def load(self, index: int) -> Tensor:
        """RGB image as uint8 [3, height, width]; raises `DataError` naming the file if it is unreadable."""

    def name(self, index: int) -> str:
        """What to call the image in a message."""


class FolderImages:
    """Images of one split folder, one sub-folder per class, in sorted order.

    Raises:
        DataError: the folder, its class folders or their images are missing.
    """

    def __init__(self, folder: Path, limit_per_class: int | None = None) -> None:
        if not folder.is_dir():
            raise DataError(
                f"folder '{folder}' does not exist; expected <root>/<train|val|test>/<class>/<image>, "
                "set with data=<root>"
            )
        classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        files = {entry.name: _image_files(entry)[:limit_per_class] for entry in classes}
        if not any(files.values()):
            raise DataError(f"folder '{folder}' holds no images; expected <class>/<image> inside it")
        empty = [name for name, found in files.items() if not found]
        if empty:
            raise DataError(f"class folder '{folder / empty[0]}' holds no images")
        self.class_names = list(files)
        self.paths = [path for found in files.values() for path in found]
        self.labels = np.repeat(np.arange(len(files), dtype=np.int64), [len(found) for found in files.values()])

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Tensor:
        """See `Images.load`."""
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                pixels = np.array(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read image '{path}': {error}") from error
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def name(self, index: int) -> str:
        """Path of the image file."""
        return str(self.paths[index])


class PatternImages:
    """One split of the embedded `patterns` data set, made when first looked at."""

    def __init__(self, split: str, limit_per_class: int | None = None) -> None:
        self.split = split
        per_class = patterns.IMAGES_PER_CLASS[split]
        self.per_class = min(per_class, limit_per_class or per_class)
        self.class_names = patterns.class_names(split)
        self.labels = np.repeat(np.arange(len(self.class_names), dtype=np.int64), self.per_class)

    @cached_property
    def images(self) -> Tensor:
        """uint8 [len, 3, 32, 32]."""
        return torch.from_numpy(patterns.generate(self.split, self.per_class))

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Tensor:
        """See `Images.load`."""
        return self.images[index].contiguous(memory_format=torch.contiguous_format)

    def name(self, index: int) -> str:
        """Class and number of the image."""
        return f"patterns/{self.split}/{self.class_names[int(self.labels[index])]}/{index % self.per_class}"


def dataset_spec(name: str) -> DatasetSpec:
    """Row of the table; raises `DataError` with the nearest name if there is none."""
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise DataError(f"data.dataset={name}: unknown data set{hint} (known: {', '.join(DATASETS)})")
    return DATASETS[name]


def open_split(config: DataConfig, split: str) -> Images:
    """One split of the configured data set.

    Args:
        config: which data set, and where.
        split: 'train', 'val' or 'test'.

    Raises:
        DataError: unknown data set, or folders missing or empty.
    """
    dataset_spec(config.dataset)
    limit = config.limit_per_class if split == "train" else None
    if config.dataset == "patterns":
        return PatternImages(split, limit)
    if config.root is None:
        raise DataError(f"data set '{config.dataset}' needs its folder: data=<folder with train/, val/, test/>")
    if not config.root.is_dir():
        raise DataError(f"data folder '{config.root}' does not exist")
    return FolderImages(config.root / split, limit)


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
