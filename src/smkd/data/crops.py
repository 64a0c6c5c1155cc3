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
ATTEMPTS = 10
TENSOR_SHRINK = 1.5
"""From this factor on the tensor kernel, several times faster than Pillow, rounds within one grey level of it.

Below, an intermediate value that rounds the other way can carry through to a second level."""


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
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w)
    w = min(width, round(height * ASPECT[1]))
    h = min(height, round(width / ASPECT[0]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def crop_resize(image: Tensor, box: Box, size: int) -> Tensor:
    """Cut a box and resize it to a square, bicubic and antialiased like Pillow's.

    Args:
        image: uint8 [3, height, width].
        box: inside the image.
        size: side of the result in pixels.

    Returns:
        uint8 [3, size, size], within one grey level of Pillow's crop and resize.
    """
    part = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
    if min(box.height, box.width) < TENSOR_SHRINK * size:
        return _pillow_resize(part, (size, size))
    # channels-last takes the vectorised uint8 path
    pixels = part[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True, align_corners=False)[0]


def resize_center_crop(image: Tensor, resize: int, crop: int) -> Tensor:
    """Evaluation view: shorter side to `resize`, then the centre square of side `crop`.

    Args:
        image: uint8 [3, height, width].

    Returns:
        uint8 [3, crop, crop].
    """
    height, width = image.shape[1:]
    short = min(height, width)
    h, w = int(resize * height / short), int(resize * width / short)
    # by Pillow itself: measured accuracies should not depend on how another kernel rounds
    pixels = _pillow_resize(image, (h, w))
    top, left = round((h - crop) / 2), round((w - crop) / 2)
    return pixels[:, top : top + crop, left : left + crop]


def _pillow_resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    resized = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
