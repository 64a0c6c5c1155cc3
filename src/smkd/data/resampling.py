"""Weights of Pillow's bicubic, antialiased resizing: the same whole numbers that it computes with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CUBIC = -0.5
"""The parameter of Keys' cubic convolution kernel."""
SUPPORT = 2
"""Radius of the kernel in pixels of the source or of the target, whichever are larger."""
BITS = 22
"""Weights are whole numbers of 2 ** -22."""


def resize_weights(lengths: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which source pixels are in each target pixel, and how much of them, along one axis.

    Args:
        lengths: int64 [n] on the CPU, numbers of source pixels.
        size: number of target pixels.

    Returns:
        int64 [n, size], the first of the source pixels, and int64 [n, size, taps], weights in units of 2 ** -22 of it
        and those behind it; taps that are not needed weigh nothing, and may lie behind the end.
    """
    scale = lengths[:, None, None].double() / size
    width = scale.clamp(min=1.0)
    taps = 2 * math.ceil(SUPPORT * float(width.max())) + 1
    middle = (torch.arange(size)[:, None] + 0.5) * scale
    first = (middle - SUPPORT * width + 0.5).long().clamp(min=0)
    source = first + torch.arange(taps)
    end = (middle + SUPPORT * width + 0.5).long().minimum(lengths[:, None, None])
    weights = _cubic(((source - middle + 0.5) / width).abs()) * (source < end)
    weights = weights / weights.sum(-1, keepdim=True) * 2**BITS
    # halves away from zero, as Pillow rounds
    return first[:, :, 0], (weights + 0.5 * weights.sign()).long()


def _cubic(x: Tensor) -> Tensor:
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * CUBIC
    return torch.where(x < 1, near, torch.where(x < SUPPORT, far, 0.0))
