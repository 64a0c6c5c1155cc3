"""Batches whose crops are cut on the device where the images lie (`data.cache=device`).

Workers only draw: boxes, masks and colours are those of `MultiCropDataset`, from the same streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from smkd.config.schema import RunConfig
from smkd.data.datasets import Images
from smkd.data.device_cache import DeviceImages
from smkd.data.draws import Drawing, Draws
from smkd.data.loader import Batch, MultiCropDataset, batches, first_readable, make_loader, worker_count
from smkd.data.sampler import EpochSampler
from smkd.errors import DataError


@dataclass(frozen=True)
class DrawnBatch:
    """What is drawn for a batch.

    Attributes:
        chosen: int64 [batch], numbers of the images.
        boxes: int64 [views, batch, 4], top, left, height and width, global views first.
        masks, color, labels, skipped: as in `Batch`.
    """

    chosen: Tensor
    boxes: Tensor
    masks: Tensor
    color: Tensor
    labels: Tensor
    skipped: int


class DrawnDataset(Dataset[tuple[int, Draws, int, int]]):
    """The draws of samples; an item is asked for by (epoch, index) as in `MultiCropDataset`.

    Args:
        images: one split.
        shapes: int64 [images, 2], height and width of each, 0 for an unreadable one.
        config: views, masks, colours, seed and what to do with unreadable images.
    """

    def __init__(self, images: Images, shapes: NDArray[np.int64], config: RunConfig) -> None:
        self.images, self.shapes, self.config, self.draw = images, shapes, config, Drawing(config)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> tuple[int, Draws, int, int]:
        epoch, index = item
        (height, width), chosen, skipped = first_readable(self._shape, index, len(self), self.config.data.on_error)
        return chosen, self.draw(epoch, index, height, width), int(self.images.labels[chosen]), skipped

    def _shape(self, index: int) -> tuple[int, int]:
        height, width = self.shapes[index].tolist()
        if not height:
            self.images.load(index)  # says what is wrong
            raise DataError(f"cannot read image '{self.images.name(index)}': it was unreadable when the run began")
        return height, width


class DeviceLoader:
    """Batches whose crops are made on the device; an iteration is the epoch that the sampler was set to.

    Args:
        images: one split, decoded already.
        config: crops, masks, colours, seed and what to do with unreadable images.
        workers: processes that draw.

    Raises:
        DataError: the device has too little memory.
    """

    def __init__(
        self, images: Images, config: RunConfig, sampler: EpochSampler, device: torch.device, workers: int
    ) -> None:
        self.config, self.images = config, DeviceImages(images, device)
        dataset = DrawnDataset(images, self.images.shapes, config)
        self.drawn = make_loader(dataset, sampler, workers, pin_memory=False, collate_fn=collate_draws)

    def __iter__(self) -> Iterator[Batch]:
        drawn: DrawnBatch
        for drawn in batches(self.drawn):
            num_global = len(drawn.masks)
            yield Batch(
                self._cut(drawn, slice(num_global), self.config.global_views.size),
                self._cut(drawn, slice(num_global, None), self.config.local_views.size),
                drawn.masks, drawn.color, drawn.labels, drawn.skipped,
            )  # fmt: skip

    def _cut(self, drawn: DrawnBatch, views: slice, size: int) -> Tensor:
        boxes = drawn.boxes[views]
        crops = self.images.cut(drawn.chosen.repeat(len(boxes)), boxes.flatten(0, 1), size)
        return crops.view(*boxes.shape[:2], *crops.shape[1:])


def collate_draws(samples: list[tuple[int, Draws, int, int]]) -> DrawnBatch:
    """Stack draws, views first."""
    chosen, draws, labels, skipped = zip(*samples, strict=True)
    return DrawnBatch(
        torch.tensor(chosen),
        torch.tensor([of_sample.boxes for of_sample in draws]).transpose(0, 1),
        torch.from_numpy(np.stack([of_sample.masks for of_sample in draws], axis=1)),
        torch.from_numpy(np.stack([of_sample.color for of_sample in draws], axis=1)),
        torch.tensor(labels),
        sum(skipped),
    )


def training_loader(images: Images, config: RunConfig, sampler: EpochSampler, device: torch.device) -> Iterable[Batch]:
    """Batches of one epoch after the other: crops are cut on the device if `data.cache` says so, else by workers."""
    workers = worker_count(config, device)
    if config.data.cache == "device":
        return DeviceLoader(images, config, sampler, device, workers)
    return make_loader(MultiCropDataset(images, config), sampler, workers, pin_memory=device.type == "cuda")
