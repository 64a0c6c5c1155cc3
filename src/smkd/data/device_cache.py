"""The training images whole on a device, which cuts and resizes crops there in batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smkd.data.cache import CachedImages
from smkd.data.cache_build import ROOM, free_memory, shown
from smkd.data.crops import vertical_first
from smkd.data.datasets import Images
from smkd.data.resampling import BITS, resize_weights
from smkd.errors import DataError
from smkd.transfer import to_device

CHUNK = 1024
"""Images that are copied to the device at once."""
WORKING_BYTES = 256 * 2**20
"""About how much memory of the device cutting may take at once."""
HALF = 11
"""Bits of the lower half of a weight."""
BYTES_OF_A_PIXEL = 96
"""Of a box that is being resized: its three channels before and after a pass, and where they lie."""


class DeviceImages:
    """Decoded images in one array on a device.

    Args:
        images: one split, decoded already. Unreadable images take no room.
        device: where they shall lie.

    Raises:
        DataError: the device has too little memory.
    """

    def __init__(self, images: Images, device: torch.device) -> None:
        self.shapes = _shapes(images)
        lengths = self.shapes.prod(1) * 3
        ends = lengths.cumsum()
        self.offsets, wanted = torch.from_numpy(ends - lengths), int(ends[-1])
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
        if free is not None and wanted > ROOM * free:
            raise DataError(
                f"data.cache=device needs {shown(wanted)}, {shown(free)} are free on {device}; "
                "use data.cache=mmap, or a smaller data.cache_size"
            )
        self.tables: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.pixels = torch.empty(wanted, dtype=torch.uint8, device=device)
        readable = np.flatnonzero(lengths)
        for numbers in np.split(readable, range(CHUNK, len(readable), CHUNK)):
            first, end = ends[numbers[0]] - lengths[numbers[0]], ends[numbers[-1]]
            part = torch.empty(end - first, dtype=torch.uint8)
            for number in numbers:
                try:
                    pixels = images.load(number)
                except DataError:  # damaged in the cache and gone from its source; reported when it is asked for
                    self.shapes[number] = 0
                    continue
                part[ends[number] - lengths[number] - first : ends[number] - first] = pixels.permute(1, 2, 0).flatten()
            self.pixels[first:end] = part

    def cut(self, chosen: Tensor, boxes: Tensor, size: int) -> Tensor:
        """Cut a box out of each image and resize it to a square, bicubic and antialiased like Pillow's.

        Args:
            chosen: int64 [n], images.
            boxes: int64 [n, 4], top, left, height and width.
            size: side of the results in pixels.

        Returns:
            uint8 [n, 3, size, size] on the device, equal to Pillow's crop and resize.
        """
        crops = torch.empty(len(boxes), 3, size, size, dtype=torch.uint8, device=self.pixels.device)
        # where each box begins, and how far apart its rows and its columns are
        row = 3 * torch.from_numpy(self.shapes)[chosen, 1]
        start = self.offsets[chosen] + boxes[:, 0] * row + boxes[:, 1] * 3
        column = torch.full_like(row, 3)
        vertically = torch.tensor(
            [vertical_first(height, width, size) for _, _, height, width in boxes.tolist()], dtype=torch.bool
        )
        by_area = boxes[:, 2:].prod(1).argsort()
        for turned in (False, True):
            rows = by_area[vertically[by_area] == turned]
            if not len(rows):
                continue
            # the axis that is resized first comes last
            order = [1, 0] if turned else [0, 1]
            lengths = boxes[rows, 2:][:, order]
            strides = torch.stack([row, column], dim=1)[rows][:, order]
            side = lengths.amax(0).clamp(min=size)
            at_once = max(1, WORKING_BYTES // (BYTES_OF_A_PIXEL * int(side.prod())))
            for part in torch.arange(len(rows)).split(at_once):
                resized = self._resized(start[rows[part]], lengths[part], strides[part], size)
                crops[to_device(rows[part], crops.device)] = resized.mT if turned else resized
        return crops

    def _resized(self, start: Tensor, lengths: Tensor, strides: Tensor, size: int) -> Tensor:
        """Resize boxes along their last axis, then along their first; uint8 [n, 3, size, size].

        Args:
            start: int64 [n], place of each box's first value.
            lengths, strides: int64 [n, 2], of its axes.
        """
        device = self.pixels.device
        reach = lengths.amax(0).tolist()
        start, lengths, strides = (to_device(values, device) for values in (start, lengths, strides))
        # boxes are padded to the largest one with their last pixels, which weigh nothing
        steps = [
            torch.arange(reach[axis], device=device).minimum(lengths[:, axis, None] - 1) * strides[:, axis, None]
            for axis in (0, 1)
        ]
        place = start[:, None, None] + steps[0][:, :, None] + steps[1][:, None, :]
        box = torch.stack([self.pixels[place + channel] for channel in range(3)], dim=1).float()
        with exact_products(device):
            last = self._weights(lengths[:, 1], reach[1], size)
            box = _descaled(*(box @ part.mT[:, None] for part in last))
            first = self._weights(lengths[:, 0], reach[0], size)
            return _descaled(*(part[:, None] @ box for part in first)).to(torch.uint8)

    def _weights(self, lengths: Tensor, reach: int, size: int) -> tuple[Tensor, Tensor]:
        """Upper and lower half of Pillow's weights, whole numbers as float32 [n, size, reach]."""
        if size not in self.tables:
            self.tables[size] = _table(int(self.shapes.max()), size, self.pixels.device)
        first, *halves = (values[lengths - 1] for values in self.tables[size])
        taps = first[:, :, None] + torch.arange(halves[0].shape[2], device=lengths.device)
        upper, lower = (
            half.new_zeros(len(half), size, reach + half.shape[2]).scatter_(2, taps, half)[:, :, :reach]
            for half in halves
        )
        return upper, lower


def _table(longest: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """First source pixels, upper and lower halves of the weights for every length from 1 to `longest`."""
    first, weights = resize_weights(torch.arange(1, longest + 1), size)
    # float32 holds sums of such halves times grey levels without rounding
    upper = (weights + (1 << HALF - 1)) >> HALF
    lower = weights - (upper << HALF)
    return to_device(first, device), to_device(upper.float(), device), to_device(lower.float(), device)


def _descaled(upper: Tensor, lower: Tensor) -> Tensor:
    """Grey levels, float32, from the sums with the upper and the lower halves of the weights."""
    sums = (upper.int() << HALF) + lower.int() + (1 << BITS - 1)
    return (sums >> BITS).clamp_(0, 255).float()


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices in float32, whatever the training allows."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def _shapes(images: Images) -> NDArray[np.int64]:
    """int64 [images, 2], height and width of each; 0 for an unreadable one."""
    if isinstance(images, CachedImages):
        return np.stack([images.index["height"], images.index["width"]], axis=1).astype(np.int64)
    return np.array([images.load(number).shape[1:] for number in range(len(images))], dtype=np.int64)
