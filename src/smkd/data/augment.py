"""Training samples: their random numbers, boxes, crops and masks; and the crop for evaluation.

A sample depends only on (seed, epoch, index, stream), where a stream is one view of one occurrence. A counter-based
generator is keyed by these numbers, so workers, devices and interruptions do not change a sample.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from smkd.config.run_config import RunConfig
from smkd.config.schema import MaskConfig
from smkd.data.color import draw_color

ORDER = 1 << 20
"""Stream of the order of samples in an epoch."""
OCCURRENCE = 1 << 32
"""Streams 0, 1, 2, ... are the views of a sample; where it comes again in the epoch they begin so much further on."""


def generator(seed: int, epoch: int, index: int, stream: int) -> np.random.Generator:
    """Generator of one stream of one sample; all arguments non-negative."""
    # the lowest counter word advances with each draw, the other three say whose draws these are
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, stream, index, epoch]))


class Streams:
    """The generators of one seed, one at a time: it resets one generator, which takes a fifth of the time of a new one.

    Args:
        seed: non-negative.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=seed)
        self._generator = np.random.Generator(self._bits)
        self._state = self._bits.state  # nothing is drawn yet, so no number is left over in it

    def at(self, epoch: int, index: int, stream: int) -> np.random.Generator:
        """What `generator` gives; valid until the next call."""
        self._state["state"]["counter"][:] = 0, stream, index, epoch
        self._bits.state = self._state
        return self._generator


MASK_ASPECT = (0.3, 1 / 0.3)
LOG_MASK_ASPECT = math.log(MASK_ASPECT[0]), math.log(MASK_ASPECT[1])
TRIES_PER_BLOCK = 10

Mask = NDArray[np.bool_]


def draw_mask(config: MaskConfig, grid: tuple[int, int], epoch: int, rng: np.random.Generator) -> Mask:
    """One mask; True hides the patch.

    Each ratio gets a uniform value within its jitter, then one of them is taken: with ratios (0, 0.3) half of
    all masks are empty.

    Args:
        config: shape and ratios.
        grid: rows and columns of the patch grid.
        epoch: before `start_epoch` masks are empty.

    Returns:
        bool [rows, columns].
    """
    if epoch < config.start_epoch:
        return np.zeros(grid, dtype=bool)
    ratios = [
        ratio + (-jitter + 2 * jitter * rng.random())
        for ratio, jitter in zip(config.ratio, config.ratio_jitter, strict=True)
    ]
    wanted = ratios[rng.integers(len(ratios))] * grid[0] * grid[1]
    return _block_mask(grid, wanted, rng) if config.shape == "block" else _random_mask(grid, wanted, rng)


def _random_mask(grid: tuple[int, int], wanted: float, rng: np.random.Generator) -> Mask:
    mask = np.zeros(grid[0] * grid[1], dtype=bool)
    mask[rng.permutation(mask.size)[: int(wanted)]] = True
    return mask.reshape(grid)


def _block_mask(grid: tuple[int, int], wanted: float, rng: np.random.Generator) -> Mask:
    rows, columns = grid
    mask = np.zeros(grid, dtype=bool)
    smallest = (min(grid) // 3) ** 2
    missing = wanted
    while missing > 0:
        for _ in range(TRIES_PER_BLOCK):
            # not ordered on purpose: near the end the smallest block may exceed what is missing
            area = smallest + rng.random() * (missing - smallest)
            aspect = math.exp(LOG_MASK_ASPECT[0] + (LOG_MASK_ASPECT[1] - LOG_MASK_ASPECT[0]) * rng.random())
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= rows or w >= columns:
                continue
            top, left = int(rng.integers(0, rows - h + 1)), int(rng.integers(0, columns - w + 1))
            block = mask[top : top + h, left : left + w]
            added = h * w - np.count_nonzero(block)
            if 0 < added <= missing:
                block[:] = True
                missing -= added
                break
        else:
            break
    return mask


CROP_ASPECT = (3 / 4, 4 / 3)
LOG_CROP_ASPECT = math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])
ATTEMPTS = 10
THIN = 16
"""How many times as long as wide an image is of which evaluation resizes a part only."""


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def random_box(height: int, width: int, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """Box of torchvision's RandomResizedCrop.

    The area is uniform in `scale` times the image's, the aspect ratio log-uniform in [3/4, 4/3]; after ten
    boxes that do not fit, the largest centred one of an allowed aspect.
    """
    for _ in range(ATTEMPTS):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(LOG_CROP_ASPECT[0] + (LOG_CROP_ASPECT[1] - LOG_CROP_ASPECT[0]) * rng.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w)
    w = min(width, round(height * CROP_ASPECT[1]))
    h = min(height, round(width / CROP_ASPECT[0]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def crop_resize(image: Tensor, box: Box, size: int) -> Tensor:
    """Cut a box and resize it to a square, bicubic and antialiased.

    Args:
        image: uint8 [3, height, width].
        box: inside the image.
        size: side of the result in pixels.

    Returns:
        uint8 [3, size, size], never more than two grey levels from Pillow's crop and resize, since the kernel's weights
        have 16 bits and Pillow's 22. Two levels away is less than one value in a million where a photograph is made
        smaller, and up to thirty in a million where it is made larger or is very smooth.
    """
    part = image[None, :, box.top : box.top + box.height, box.left : box.left + box.width]
    # channels-last takes the vectorised uint8 path
    pixels = part.contiguous(memory_format=torch.channels_last)
    return F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True, align_corners=False)[0]


def resize_center_crop(image: Tensor, resize: int, crop: int) -> Tensor:
    """Evaluation view: shorter side to `resize`, then the centre square of side `crop`.

    Of a `THIN` image only the part in the square is resized, because the whole might take gigabytes. The result
    differs only by the rounding of weights.

    Args:
        image: uint8 [3, height, width].

    Returns:
        uint8 [3, crop, crop].
    """
    height, width = image.shape[1:]
    short = min(height, width)
    h, w = int(resize * height / short), int(resize * width / short)
    top, left = round((h - crop) / 2), round((w - crop) / 2)
    # by Pillow itself: measured accuracies should not depend on how another kernel rounds
    if max(h, w) > THIN * resize:
        box = (left * width / w, top * height / h, (left + crop) * width / w, (top + crop) * height / h)
        return _pillow_resize(image, (crop, crop), box)
    return _pillow_resize(image, (h, w))[:, top : top + crop, left : left + crop]


def _pillow_resize(
    image: Tensor, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> Tensor:
    """uint8 [3, *size] of an image, or of a part of it: left, top, right and bottom edge in pixels."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    resized = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


class Draws(NamedTuple):
    """Random choices of one sample, global views first.

    Attributes:
        boxes: one a view.
        masks: bool [global views, rows, columns].
        color: float32 [views, 13], rows of `draw_color`.
    """

    boxes: list[Box]
    masks: NDArray[np.bool_]
    color: NDArray[np.float32]


class Drawing:
    """Draws samples; a pure function of the configuration's seed and its arguments.

    Args:
        config: views, masks, colours and seed.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config, self.streams = config, Streams(config.seed)
        side = config.global_views.size // config.model.patch_size
        self.grid = (side, side)

    def __call__(self, epoch: int, index: int, height: int, width: int, occurrence: int = 0) -> Draws:
        """Draws of one sample.

        Args:
            epoch: counted from 0.
            index: number of the image.
            height, width: of the image in pixels.
            occurrence: how often the image came before in the epoch.
        """
        config, num_global = self.config, self.config.global_views.count
        boxes, masks, color = [], [], []
        for view in range(num_global + config.local_views.count):
            rng = self.streams.at(epoch, index, occurrence * OCCURRENCE + view)
            kind = config.global_views if view < num_global else config.local_views
            boxes.append(random_box(height, width, kind.scale, rng))
            color.append(draw_color(config.augment, view, num_global, rng))
            if view < num_global:
                masks.append(draw_mask(config.mask, self.grid, epoch, rng))
        return Draws(boxes, np.stack(masks), np.stack(color))
