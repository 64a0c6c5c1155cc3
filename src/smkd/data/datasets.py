"""The table of data sets, and opening one split of the configured one as a sequence of uint8 images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from smkd.config.run_config import RunConfig
from smkd.config.schema import DataConfig
from smkd.data import patterns
from smkd.data.color import Channels
from smkd.data.images import SPLITS, FolderImages, Images, UnlabelledImages
from smkd.data.sources import DatasetSource, once, open_dataset
from smkd.data.torch_dataset import DatasetImages, LabelledImages
from smkd.errors import DataError
from smkd.extensions import Registry
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

    mean: Channels
    std: Channels
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


OWN = Registry("data set", "smkd.datasets", {}, taken=tuple(DATASETS))
"""Data sets of others, each a function of the split's name that gives a `LabelledImages`, or None for no such split."""
GIVEN = "given"
"""What a data set is called that `give_images` made known."""


def register_dataset(name: str, open_split: Callable[[str], LabelledImages | None]) -> None:
    """Make a data set known to `data.dataset` in this process (docs/extending.md).

    Args:
        name: for the setting.
        open_split: called with 'train', 'val' or 'test'; returns a data set of (image, label), or None for a split that
            it does not have. Images are Pillow images, uint8 arrays [height, width, 3] or uint8 tensors [3, height,
            width].

    Raises:
        ConfigError: the name is one of smkd's own.
    """
    OWN.register(name, open_split)


def give_images(images: LabelledImages | Mapping[str, LabelledImages]) -> None:
    """Make images known as the data set `given`: those to train on, or a data set for each split.

    Raises:
        DataError: they are none, or a key is no split.
    """
    parts = dict(images) if isinstance(images, Mapping) else {"train": images}
    for split, dataset in parts.items():
        if split not in SPLITS:
            raise DataError(f"images={{'{split}': ...}}: unknown split{nearest(split, SPLITS)} ({', '.join(SPLITS)})")
        DatasetImages(dataset, _called(GIVEN, split))
    register_dataset(GIVEN, parts.get)


@lru_cache(maxsize=8)
def _drawn(split: str, per_class: int) -> Tensor:
    """Patterns, which are drawn once in a process."""
    return torch.from_numpy(patterns.generate(split, per_class))


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
        return _drawn(self.split, self.per_class)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Tensor:
        """See `Images.load`."""
        return self.images[index].contiguous(memory_format=torch.contiguous_format)

    def name(self, index: int) -> str:
        """Class and number of the image."""
        return f"patterns/{self.split}/{self.class_names[int(self.labels[index])]}/{index % self.per_class}"


def dataset_spec(name: str) -> DatasetSpec:
    """Row of the table, ImageNet's for a data set of others; raises `DataError` with the nearest name if unknown."""
    if name not in DATASETS:
        known = [*DATASETS, *OWN.names()]
        if name in known:
            return DatasetSpec(*IMAGENET)
        raise DataError(f"data.dataset={name}: unknown data set{nearest(name, known)} (known: {', '.join(known)})")
    return DATASETS[name]


def configured_spec(config: DataConfig) -> DatasetSpec:
    """Row of the configured data set, with the configured normalisation where there is one.

    Raises:
        DataError: unknown data set, and no normalisation.
    """
    if config.mean is None or config.std is None:
        return dataset_spec(config.dataset)
    # a run that brings its constants is read where its data set is not known
    return replace(DATASETS.get(config.dataset, DATASETS["folder"]), mean=config.mean, std=config.std)


def open_split(config: DataConfig, split: str, *, labelled: bool = True) -> Images:
    """One split of the configured data set.

    Args:
        config: which data set, and where.
        split: 'train', 'val' or 'test'.
        labelled: refuse images without classes.

    Raises:
        DataError: unknown data set, a root of no known form, or a split that is missing or empty.
    """
    configured_spec(config)  # refuses an unknown name
    limit = config.limit_per_class if split == "train" else None
    if config.embedded:
        return PatternImages(split, limit)
    if is_of_others(config):
        return once(("own", config.dataset, split, limit), lambda: _open_own(config.dataset, split, limit))
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
    configured_spec(config)  # refuses an unknown name
    if config.embedded:
        return "patterns: embedded, drawn by formula"
    if is_of_others(config):
        return f"{config.dataset}: a data set of your own"
    return open_source(config, labelled=False).description


def is_of_others(config: DataConfig) -> bool:
    """Whether the images are those of a data set that is registered or announced; with a root they are that root's."""
    return config.root is None and config.dataset not in DATASETS and config.dataset in OWN.names()


def _open_own(name: str, split: str, limit: int | None) -> DatasetImages:
    dataset = OWN.load(name)(split)
    if dataset is None:
        here = f"give images={{'train': ..., '{split}': ...}}" if name == GIVEN else "its function gives None"
        more = ", validation.data=<labelled folder> or validation.every=0" if split == "val" else ""
        raise DataError(f"data set '{name}' has no {split} split; {here}{more}")
    return DatasetImages(dataset, _called(name, split), limit)


def _called(name: str, split: str) -> str:
    return f"{name}/{split}"


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
