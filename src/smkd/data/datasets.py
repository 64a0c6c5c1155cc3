"""The table of data sets, and opening one split of the configured one as a sequence of uint8 images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from smkd.config.run_config import RunConfig
from smkd.config.schema import DataConfig
from smkd.data import patterns
from smkd.data.images import FolderImages, Images, UnlabelledImages
from smkd.data.sources import DatasetSource, open_dataset
from smkd.errors import DataError
from smkd.files import nearest

__all__ = [
    "DATASETS", "DatasetSpec", "FolderImages", "Images", "PatternImages", "Sizes", "UnlabelledImages",
    "configured_spec", "dataset_spec", "describe", "open_source", "open_split", "open_validation",
]  # fmt: skip

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = (
    (129.37731888 / 255, 124.10583864 / 255, 112.47758569 / 255),
    (68.20947949 / 255, 65.43124043 / 255, 70.45866994 / 255),
)
PATTERNS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Sizes(NamedTuple):
    """Evaluation view in pixels: shorter side to `resize`, then the centre square of side `crop`."""

    resize: int
    crop: int


FULL = Sizes(360, 320)
TRAINING = Sizes(256, 224)


@dataclass(frozen=True)
class DatasetSpec:
    """Facts about a data set.

    Attributes:
        mean, std: of each channel on the 0-1 scale, for normalisation.
        evaluation: sizes at which its accuracy is reported; recipes state the same.
        validation: sizes while training.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    evaluation: Sizes = FULL
    validation: Sizes = TRAINING


DATASETS = {
    "mini-imagenet": DatasetSpec(*IMAGENET),
    "tiered-imagenet": DatasetSpec(*IMAGENET),
    "cifar-fs": DatasetSpec(*CIFAR, evaluation=TRAINING),
    "fc100": DatasetSpec(*CIFAR, evaluation=TRAINING),
    "caltech101": DatasetSpec(*IMAGENET, evaluation=Sizes(48, 48), validation=Sizes(48, 48)),
    "omniglot": DatasetSpec(*IMAGENET),
    "folder": DatasetSpec(*IMAGENET),
    "patterns": DatasetSpec(*PATTERNS, evaluation=Sizes(32, 32), validation=Sizes(32, 32)),
}


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
        raise DataError(
            f"data.dataset={name}: unknown data set{nearest(name, DATASETS)} (known: {', '.join(DATASETS)})"
        )
    return DATASETS[name]


def configured_spec(config: DataConfig) -> DatasetSpec:
    """Row of the configured data set, with the configured normalisation where there is one."""
    spec = dataset_spec(config.dataset)
    return spec if config.mean is None or config.std is None else replace(spec, mean=config.mean, std=config.std)


def open_split(config: DataConfig, split: str, *, labelled: bool = True) -> Images:
    """One split of the configured data set.

    Args:
        config: which data set, and where.
        split: 'train', 'val' or 'test'.
        labelled: refuse images without classes.

    Raises:
        DataError: unknown data set, a root of no known form, or a split that is missing or empty.
    """
    dataset_spec(config.dataset)
    limit = config.limit_per_class if split == "train" else None
    if config.embedded:
        return PatternImages(split, limit)
    return open_source(config, labelled=labelled).open(split, limit)


def open_validation(config: RunConfig) -> Images:
    """The validation images: the val split of the run's data or of `validation.data`, or all of the latter.

    Raises:
        DataError: as `open_split`.
    """
    root = config.validation.data
    if root is None:
        return open_split(config.data, config.validation.split)
    # what splits the training data says nothing of these
    source = open_source(DataConfig(root=root, split_by="images", label_column=config.data.label_column))
    return source.open(config.validation.split) if source.own_splits else source.whole()


def describe(config: DataConfig) -> str:
    """One line for the user: which form the configured data set has, and how it is split.

    Raises:
        DataError: unknown data set, or a root of no known form.
    """
    dataset_spec(config.dataset)
    if config.embedded:
        return "patterns: embedded, drawn by formula"
    return open_source(config, labelled=False).description


def open_source(config: DataConfig, *, labelled: bool = True) -> DatasetSource:
    """Open the configured root.

    Args:
        labelled: refuse images without classes.

    Raises:
        DataError: the root is missing, has no known form, or has no classes.
    """
    if config.root is None:
        raise DataError(f"data set '{config.dataset}' needs its folder: data=<folder with train/, val/, test/>")
    source = open_dataset(
        config.root, split_by=config.split_by, split_seed=config.split_seed, split_file=config.split_file,
        label_column=config.label_column, labelled=labelled,
    )  # fmt: skip
    if labelled and not source.labelled:
        raise DataError(
            f"'{source.root}': its images lie in it directly, without a class folder, which is enough for phase 1 "
            "alone; give each class a folder: <root>/<class>/<image>"
        )
    return source
