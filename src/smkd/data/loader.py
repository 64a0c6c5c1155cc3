"""Batches of views: CPU workers draw and crop, the next batch is copied ahead, and the device colours."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smkd.config.run_config import RunConfig
from smkd.data.augment import Drawing, Draws, crop_resize
from smkd.data.color import ColorParameters, augment_and_normalize
from smkd.data.datasets import DatasetSpec
from smkd.data.images import Images
from smkd.data.sampler import EpochSampler, Pick
from smkd.device import to_device
from smkd.errors import DataError
from smkd.machine import cores
from smkd.processes import allowed, end_with_parent, heed_only_parent
from smkd.progress import T


class Sample(NamedTuple):
    """One image's views before colour.

    Attributes:
        crops: uint8 [3, size, size], one a view, global views first.
        draws: the random choices behind the crops, with masks and colours.
        label: class index.
        image: number of the image that was read.
        skipped: number of unreadable images that this one replaces.
    """

    crops: list[Tensor]
    draws: Draws
    label: int
    image: int
    skipped: int


@dataclass(frozen=True)
class Batch:
    """Views of a batch before colour, on the CPU; axes [views, batch, ...] as in `Sample`; `images` as in `Views`."""

    global_crops: Tensor
    local_crops: Tensor
    masks: Tensor
    color: Tensor
    labels: Tensor
    skipped: int
    images: Tensor | None = None

    def pin_memory(self) -> Batch:
        """Called by the loader when the device copies from pinned memory."""
        return Batch(
            self.global_crops.pin_memory(), self.local_crops.pin_memory(), self.masks,
            self.color, self.labels, self.skipped, self.images,
        )  # fmt: skip

    def to(self, device: torch.device) -> Batch:
        """With the crops on the device; the host does not wait for the copies."""
        return Batch(
            to_device(self.global_crops, device), to_device(self.local_crops, device), self.masks, self.color,
            self.labels, self.skipped, self.images,
        )  # fmt: skip


@dataclass(frozen=True)
class Views:
    """What the networks see: normalised views on the device.

    Attributes:
        global_views: float [global views, batch, 3, size, size].
        local_views: float [local views, batch, 3, size, size].
        masks: bool [global views, batch, rows, columns], on the CPU, True hides the patch from the student.
        labels: int64 [batch], on the CPU: which pairs exist is worked out there, the device is not waited for.
        images: int64 [batch], on the CPU: number of each image; none if all differ.
    """

    global_views: Tensor
    local_views: Tensor
    masks: Tensor
    labels: Tensor
    images: Tensor | None = None


class MultiCropDataset(Dataset[Sample]):
    """Views of images; an item is asked for as a `Pick`, or (epoch, index), and is a pure function of it and the seed.

    Args:
        images: one split.
        config: crops, masks, colours, seed and what to do with unreadable images.
    """

    def __init__(self, images: Images, config: RunConfig) -> None:
        self.images, self.config, self.draw = images, config, Drawing(config)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int] | tuple[int, int, int]) -> Sample:
        pick = Pick(*item)
        image, chosen, skipped = self._readable(pick.image)
        _, height, width = image.shape
        draws = self.draw(pick.epoch, pick.image, height, width, pick.occurrence)
        kinds = (self.config.global_views, self.config.local_views)
        sizes = [kind.size for kind in kinds for _ in range(kind.count)]
        crops = [crop_resize(image, box, size) for box, size in zip(draws.boxes, sizes, strict=True)]
        return Sample(crops, draws, int(self.images.labels[chosen]), chosen, skipped)

    def _readable(self, index: int) -> tuple[Tensor, int, int]:
        """An image, or with `data.on_error=skip` the next one that can be read; its number, and how many were skipped.

        Raises:
            DataError: the image, or each of them, is unreadable.
        """
        for skipped in range(len(self)):
            chosen = (index + skipped) % len(self)
            try:
                return self.images.load(chosen), chosen, skipped
            except DataError as error:
                if self.config.data.on_error == "raise":
                    raise DataError(f"{error} (data.on_error=skip goes on without it)") from error
        raise DataError("not one image of the training set can be read")


def collate(samples: list[Sample]) -> Batch:
    """Stack samples, views first."""
    num_global = len(samples[0].draws.masks)
    return Batch(
        _stacked([sample.crops[:num_global] for sample in samples]),
        _stacked([sample.crops[num_global:] for sample in samples]),
        torch.from_numpy(np.stack([sample.draws.masks for sample in samples], axis=1)),
        torch.from_numpy(np.stack([sample.draws.color for sample in samples], axis=1)),
        torch.tensor([sample.label for sample in samples]),
        sum(sample.skipped for sample in samples),
        torch.tensor([sample.image for sample in samples]),
    )


def _stacked(crops: list[list[Tensor]]) -> Tensor:
    """uint8 [views, samples, 3, size, size]; the channels of a pixel stay together in memory, which is faster."""
    views = list(zip(*crops, strict=True))
    if not views:
        return torch.empty(0, len(crops), 3, 1, 1, dtype=torch.uint8)
    pixels = torch.stack([crop.permute(1, 2, 0) for view in views for crop in view])
    return pixels.view(len(views), len(crops), *pixels.shape[1:]).movedim(-1, -3)


def worker_count(config: RunConfig, device: torch.device) -> int:
    """Loading processes of this device: the configured number, or with 'auto' a default.

    The default on an accelerator is its share of the cores less one; on the CPU it is 0, since the networks need the
    cores.
    """
    if config.num_workers != "auto":
        return allowed(config.num_workers)
    if device.type == "cpu":
        return 0
    return allowed(min(16, max(1, cores() // config.devices - 1)))


def training_loader(images: Images, config: RunConfig, sampler: EpochSampler, device: torch.device) -> DataLoader[Any]:
    """Loader of a run on this device."""
    dataset = MultiCropDataset(images, config)
    return make_loader(dataset, sampler, worker_count(config, device), pin_memory=device.type == "cuda")


def batches(loader: Iterable[T]) -> Iterator[T]:
    """Iterate over a loader; an error of a worker process comes without the worker's traceback around it."""
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).strip().rsplit("DataError: ", 1)[-1]) from error


def make_loader(
    dataset: Dataset[Sample], sampler: EpochSampler, num_workers: int, *, pin_memory: bool
) -> DataLoader[Any]:  # fmt: skip
    """Loader whose epoch is chosen by `sampler.set_epoch`."""
    return DataLoader(
        dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=collate, pin_memory=pin_memory,
        persistent_workers=num_workers > 0, prefetch_factor=4 if num_workers else None,
        worker_init_fn=_begin_worker,
    )  # fmt: skip


def _begin_worker(_: int) -> None:
    heed_only_parent()
    end_with_parent()
    _return_large_arrays()


def _return_large_arrays() -> None:
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
        batch.images,
    )


def _colored(crops: Tensor, color: Tensor, spec: DatasetSpec, device: torch.device) -> Tensor:
    images = to_device(crops, device).flatten(0, 1).contiguous()
    colored = augment_and_normalize(images, ColorParameters.unpack(color.flatten(0, 1)), spec.mean, spec.std)
    return colored.view(*crops.shape[:2], *crops.shape[2:])


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches with their crops on the device.

    On CUDA the next batch is copied while the device works on the last one, from pinned memory and on a stream of its
    own. On other devices a batch is copied when it is needed.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copying = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            following = batch.to(device), copying.record_event()
        if ahead is not None:
            yield _arrived(*ahead, device)
        ahead = following
    if ahead is not None:
        yield _arrived(*ahead, device)


def _arrived(batch: Batch, copied: torch.cuda.Event, device: torch.device) -> Batch:
    """The batch, once the stream that computes has been told to wait for its copy."""
    computing = torch.cuda.current_stream(device)
    computing.wait_event(copied)
    for crops in (batch.global_crops, batch.local_crops):
        crops.record_stream(computing)
    return batch
