"""Batches of views: crops and random parameters are made by CPU workers, colour on the device."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smkd.config.schema import RunConfig, ViewConfig
from smkd.data.color import ColorParameters, augment, draw_color, normalize
from smkd.data.crops import crop_resize, random_box
from smkd.data.datasets import DatasetSpec, Images
from smkd.data.masks import draw_mask
from smkd.data.randomness import generator
from smkd.data.sampler import EpochSampler
from smkd.errors import DataError

T = TypeVar("T")


class Sample(NamedTuple):
    """One image's views before colour.

    Attributes:
        global_crops: uint8 [global views, 3, size, size].
        local_crops: uint8 [local views, 3, size, size].
        masks: bool [global views, rows, columns].
        color: float32 [views, 13], rows of `draw_color`, global views first.
        label: class index.
        skipped: unreadable images that this one stands in for.
    """

    global_crops: Tensor
    local_crops: Tensor
    masks: NDArray[np.bool_]
    color: NDArray[np.float32]
    label: int
    skipped: int


@dataclass(frozen=True)
class Batch:
    """Views of a batch before colour, on the CPU; axes [views, batch, ...] as in `Sample`."""

    global_crops: Tensor
    local_crops: Tensor
    masks: Tensor
    color: Tensor
    labels: Tensor
    skipped: int

    def pin_memory(self) -> Batch:
        """Called by the loader when the device copies from pinned memory."""
        return Batch(
            self.global_crops.pin_memory(), self.local_crops.pin_memory(), self.masks,
            self.color, self.labels, self.skipped,
        )  # fmt: skip


@dataclass(frozen=True)
class Views:
    """What the networks see: normalised views on the device.

    Attributes:
        global_views: float [global views, batch, 3, size, size].
        local_views: float [local views, batch, 3, size, size].
        masks: bool [global views, batch, rows, columns], on the CPU, True hides the patch from the student.
        labels: int64 [batch], on the CPU: which pairs exist is worked out there, the device is not waited for.
    """

    global_views: Tensor
    local_views: Tensor
    masks: Tensor
    labels: Tensor


class MultiCropDataset(Dataset[Sample]):
    """Views of images; an item is asked for by (epoch, index) and is a pure function of it and the seed.

    Args:
        images: one split.
        config: crops, masks, colours, seed and what to do with unreadable images.
    """

    def __init__(self, images: Images, config: RunConfig) -> None:
        self.images, self.config = images, config

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, index = item
        config = self.config
        image, label, skipped = self._load(index)
        grid = config.global_views.size // config.model.patch_size
        num_global = config.global_views.count
        crops: list[Tensor] = []
        masks, color = [], []
        for view in range(num_global + config.local_views.count):
            rng = generator(config.seed, epoch, index, view)
            kind: ViewConfig = config.global_views if view < num_global else config.local_views
            box = random_box(image.shape[1], image.shape[2], kind.scale, rng)
            crops.append(crop_resize(image, box, kind.size))
            color.append(draw_color(config.augment, view, num_global, rng))
            if view < num_global:
                masks.append(draw_mask(config.mask, (grid, grid), epoch, rng))
        local = crops[num_global:]
        return Sample(
            _stacked(crops[:num_global]),
            _stacked(local) if local else torch.empty(0, 3, 1, 1, dtype=torch.uint8),
            np.stack(masks), np.stack(color), label, skipped,
        )  # fmt: skip

    def _load(self, index: int) -> tuple[Tensor, int, int]:
        for skipped in range(len(self.images)):
            chosen = (index + skipped) % len(self.images)
            try:
                return self.images.load(chosen), int(self.images.labels[chosen]), skipped
            except DataError as error:
                if self.config.data.on_error == "raise":
                    raise DataError(f"{error} (data.on_error=skip goes on without it)") from error
        raise DataError("not one image of the training set can be read")


def collate(samples: list[Sample]) -> Batch:
    """Stack samples, views first."""
    return Batch(
        _stacked([s.global_crops for s in samples], dim=1),
        _stacked([s.local_crops for s in samples], dim=1),
        torch.from_numpy(np.stack([s.masks for s in samples], axis=1)),
        torch.from_numpy(np.stack([s.color for s in samples], axis=1)),
        torch.tensor([s.label for s in samples]),
        sum(s.skipped for s in samples),
    )


def _stacked(crops: list[Tensor], dim: int = 0) -> Tensor:
    """Stack crops [..., 3, height, width] whose channels lie together in memory, which stay together: it is faster."""
    return torch.stack([crop.movedim(-3, -1) for crop in crops], dim=dim).movedim(-1, -3)


def worker_count(config: RunConfig, device: torch.device) -> int:
    """Loading processes of this device: the configured number, or a sensible one.

    On an accelerator all of its share of cores but one; on the CPU none, since the networks need the cores.
    """
    if config.num_workers != "auto":
        return config.num_workers
    if device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, max(1, cores // config.devices - 1))


def batches(loader: Iterable[T]) -> Iterator[T]:
    """Iterate over a loader; an error of a worker process comes without the worker's traceback around it."""
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).strip().rsplit("DataError: ", 1)[-1]) from error


def make_loader(
    dataset: MultiCropDataset, sampler: EpochSampler, num_workers: int, *, pin_memory: bool
) -> DataLoader[Sample]:
    """Loader whose epoch is chosen by `sampler.set_epoch`."""
    return DataLoader(
        dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=collate, pin_memory=pin_memory,
        persistent_workers=num_workers > 0, prefetch_factor=4 if num_workers else None,
        worker_init_fn=_return_large_arrays,
    )  # fmt: skip


def _return_large_arrays(_: int) -> None:
    """Have glibc give freed arrays of 1 MB and more back at once; kept ones grow to 100 MB a worker (small batches)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mmap_threshold = -3  # malloc.h
        mallopt(mmap_threshold, 2**20)


def make_views(batch: Batch, spec: DatasetSpec, device: torch.device) -> Views:
    """Copy a batch to the device and do its colour work there."""
    num_global = batch.global_crops.shape[0]
    return Views(
        _colored(batch.global_crops, batch.color[:num_global], spec, device),
        _colored(batch.local_crops, batch.color[num_global:], spec, device),
        batch.masks,
        batch.labels,
    )


def _colored(crops: Tensor, color: Tensor, spec: DatasetSpec, device: torch.device) -> Tensor:
    images = crops.to(device, non_blocking=True).flatten(0, 1).contiguous()
    colored = augment(images, ColorParameters.unpack(color.flatten(0, 1)))
    return normalize(colored, spec.mean, spec.std).view(*crops.shape[:2], *crops.shape[2:])
