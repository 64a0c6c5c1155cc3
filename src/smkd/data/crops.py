"""Crops: random resized boxes, and cutting and resizing them in uint8."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from smkd.data.resampling import BITS, resize_weights

ASPECT = (3 / 4, 4 / 3)
LOG_ASPECT = math.log(ASPECT[0]), math.log(ASPECT[1])
ATTEMPTS = 10
TENSOR_SHRINK = 1.55
"""From this factor on torch's kernel, several times faster than Pillow's, does both passes.

Its 16-bit weights round a few intermediate values in a thousand the other way. Nearer to 1, two of these carry through
to a second grey level more often; the first pass is done exactly then."""
PILLOW_SHRINK = 1.1
"""Below this factor one intermediate value is enough, and those that float32 rounds the other way matter too."""
VERTICAL_FIRST = int(PIL.__version__.split(".")[0]) >= 13
"""Whether Pillow resizes first along the height where that is reduced by far more."""
THIN = 16
"""How many times as long as wide an image is of which evaluation resizes a part only."""
BLOCK = 16
"""Target pixels whose sources are multiplied at once: more multiply more zeros, fewer are more calls."""


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


class Span(NamedTuple):
    """A rectangle whose edges may lie between pixels."""

    top: float
    left: float
    bottom: float
    right: float


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
    """Cut a box and resize it to a square, bicubic and antialiased like Pillow's.

    Args:
        image: uint8 [3, height, width].
        box: inside the image.
        size: side of the result in pixels.

    Returns:
        uint8 [3, size, size], within one grey level of Pillow's crop and resize; single values, a few in a hundred
        million of noise, are two away where the shrink is just above `TENSOR_SHRINK`.
    """
    part = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
    vertically = vertical_first(box.height, box.width, size)
    if (box.width if vertically else box.height) < PILLOW_SHRINK * size:
        return _pillow_resize(part, (size, size))
    if vertically or box.height < TENSOR_SHRINK * size:
        part = _exact_pass(part, size, vertically)
    # channels-last takes the vectorised uint8 path
    pixels = part[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True, align_corners=False)[0]


def vertical_first(height: int, width: int, size: int) -> bool:
    """Whether Pillow resizes a box to a square of side `size` first along its height."""
    return VERTICAL_FIRST and height > max(size, 2 * width - size)


def _exact_pass(part: Tensor, size: int, vertically: bool) -> Tensor:
    """Resize along one axis, rounding as Pillow does; uint8 [3, h, w] with h or w `size`."""
    height, width = part.shape[1:]
    rows = part.permute(1, 2, 0).to(torch.float32, memory_format=torch.contiguous_format).view(height, width * 3)
    padded = -(-size // BLOCK) * BLOCK
    if vertically:
        lines, resized, channels = rows.T, rows.new_empty(padded, width * 3), 1
        done, (first, weights) = resized.T, _blocks(height, size)
    else:
        lines, resized, channels = rows, rows.new_empty(height, padded * 3), 3
        done, (first, weights) = resized, _blocks(width, size)
        # each channel on its own: [blocks, sources, channels, targets, channels]
        apart = weights.new_zeros(*weights.shape[:2], 3, BLOCK, 3)
        apart.diagonal(dim1=2, dim2=4).copy_(weights[..., None])
        weights = apart.flatten(3).flatten(1, 2)
    for source, into, of_block in zip(first, done.split(BLOCK * channels, dim=1), weights.unbind(), strict=True):
        torch.mm(lines.narrow(1, source * channels, weights.shape[1]), of_block, out=into)
    resized = resized[:size] if vertically else resized[:, : size * 3]
    # int16 on the way to uint8 is vectorised
    pixels = resized.add_(0.5).to(torch.int16).clamp_(0, 255).to(torch.uint8)
    return pixels.view(len(pixels), -1, 3).permute(2, 0, 1)


@lru_cache(maxsize=512)
def _blocks(length: int, size: int) -> tuple[list[int], Tensor]:
    """Weights for one `BLOCK` of target pixels after the other.

    Small, since every process of the loader keeps those of all lengths that occur.

    Args:
        length: pixels that are resized to `size`.

    Returns:
        The first source pixel of each block, and float32 [blocks, source pixels, `BLOCK` target pixels].
    """
    (first,), (weights,) = resize_weights(torch.tensor([length]), size)
    taps = weights.shape[1]
    blocks = -(-size // BLOCK)
    lines = torch.zeros(blocks * BLOCK, length + taps)
    lines[:size].scatter_(1, first[:, None] + torch.arange(taps), weights / 2**BITS)
    starts = first[::BLOCK]
    reach = min(length, math.ceil(BLOCK * length / size) + taps)
    starts = starts.clamp(max=length - reach).tolist()
    parts = lines.view(blocks, BLOCK, -1)
    return starts, torch.stack([part[:, start : start + reach].T for start, part in zip(starts, parts, strict=True)])


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
        box = Span(top * height / h, left * width / w, (top + crop) * height / h, (left + crop) * width / w)
        return _pillow_resize(image, (crop, crop), box)
    return _pillow_resize(image, (h, w))[:, top : top + crop, left : left + crop]


def _pillow_resize(image: Tensor, size: tuple[int, int], span: Span | None = None) -> Tensor:
    """uint8 [3, *size] of an image, or of a part of it."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    box = None if span is None else (span.left, span.top, span.right, span.bottom)
    resized = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
