"""Crops: random resized boxes, and cutting and resizing them in uint8."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

ASPECT = (3 / 4, 4 / 3)
LOG_ASPECT = math.log(ASPECT[0]), math.log(ASPECT[1])
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
        aspect = math.exp(LOG_ASPECT[0] + (LOG_ASPECT[1] - LOG_ASPECT[0]) * rng.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w)
    w = min(width, round(height * ASPECT[1]))
    h = min(height, round(width / ASPECT[0]))
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

    Of an image that is `THIN` only the part that is in the square is resized: all of it might take gigabytes. The
    result is the same but for the rounding of weights.

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
