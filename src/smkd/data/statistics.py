"""Mean and standard deviation of each channel, exact: from integer counts of pixel values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smkd.data.images import StoredImages
from smkd.data.scan import LEVELS, scan
from smkd.errors import DataError
from smkd.progress import Track

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel on the 0-1 scale, every pixel weighing alike.

    Attributes:
        mean, std: red, green, blue.
        images: how many were read.
        pixels: how many there are in them.
        unreadable: images left out.
    """

    mean: Channels
    std: Channels
    images: int
    pixels: int
    unreadable: int = 0


def channel_statistics(histogram: NDArray[np.int64]) -> tuple[Channels, Channels]:
    """Mean and population standard deviation of each channel on the 0-1 scale.

    Args:
        histogram: int64 [3, 256], how many pixels of a channel have each value.
    """
    means, deviations = [], []
    for row in histogram:
        counts = [int(count) for count in row]  # Python's integers do not overflow
        pixels = sum(counts)
        total = sum(value * count for value, count in enumerate(counts))
        squares = sum(value * value * count for value, count in enumerate(counts))
        top = LEVELS - 1
        means.append(total / (top * pixels))
        deviations.append(math.sqrt(pixels * squares - total * total) / (top * pixels))
    return (means[0], means[1], means[2]), (deviations[0], deviations[1], deviations[2])


def image_statistics(images: StoredImages, jobs: int = 1, track: Track | None = None) -> Statistics:
    """Statistics of every readable image of a split.

    Args:
        images: the split, for normalisation the training images.
        jobs: processes.
        track: shows progress.

    Raises:
        DataError: not one image can be read.
    """
    seen = scan(images, jobs, track, "train")
    pixels = int(seen.histogram[0].sum())
    if not pixels:
        raise DataError(f"not one image can be read; the first: {seen.unreadable[0][1]}")
    mean, std = channel_statistics(seen.histogram)
    unreadable = len(seen.unreadable)
    return Statistics(mean, std, len(images) - unreadable, pixels, unreadable)
