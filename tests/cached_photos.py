"""Caches of image folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from smkd.config.schema import DataConfig
from smkd.data.cache import CachedImages, cached
from smkd.data.datasets import open_split
from smkd.data.images import Images, StoredImages


def settings(root: Path, kind: str = "mmap", **changes: Any) -> DataConfig:
    return DataConfig.model_validate({"root": root, "cache": kind, **changes})


def train_images(config: DataConfig) -> StoredImages:
    images = open_split(config, "train")
    assert isinstance(images, StoredImages)
    return images


def make(config: DataConfig) -> CachedImages:
    images = cached(train_images(config), config, "train")
    assert isinstance(images, CachedImages)
    return images


def assert_same(one: Images, other: Images) -> None:
    assert len(one) == len(other)
    assert one.class_names == other.class_names
    assert np.array_equal(one.labels, other.labels)
    for index in range(len(one)):
        assert one.name(index) == other.name(index)
        assert torch.equal(one.load(index), other.load(index))
