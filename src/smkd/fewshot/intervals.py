"""95 % intervals of accuracies that are counted image by image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959964
POOLED_IMAGES = 2
"""Images of the common share that each class is given before its own spread is worked out."""


class Gain(NamedTuple):
    """Second less first, in percentage points, with its 95 % interval."""

    points: float
    low: float
    high: float


def of_share(right: float, images: float) -> tuple[float, float]:
    """Wilson's interval of a share (JASA 1927), from 0 to 1.

    Args:
        right: how many images are right.
        images: of how many, at least 1.
    """
    share, z = right / images, Z95**2 / images
    middle, half = share + z / 2, math.sqrt(z * (share * (1 - share) + z / 4))
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))


def of_class_mean(right: Sequence[float], images: Sequence[float]) -> tuple[float, float]:
    """Interval of the mean over classes of the share that is right, from 0 to 1; every class counts the same.

    The variance of that mean is the sum over classes of p (1 - p) / n, over the squared number of classes. A class of
    few images says little of its p, and would claim no variance at all where all of them are right or wrong, so p is
    worked out with `POOLED_IMAGES` more images of the share of all images together. The interval is Wilson's of as many
    images of one class as would give this variance (an effective sample size: Korn and Graubard, Survey Methodology
    1998). With classes of 3 to 30 images it covers in 90 to 98 % of simulations (`tests/test_intervals.py`).

    Args:
        right: how many images of each class are right.
        images: of how many, more than 0 of each class; not whole numbers where images count for less than one.
    """
    counts, sizes = np.asarray(right, np.float64), np.asarray(images, np.float64)
    common = (counts.sum() + 1) / (sizes.sum() + 2)
    shares = (counts + POOLED_IMAGES * common) / (sizes + POOLED_IMAGES)
    variance = (shares * (1 - shares) / sizes).sum() / len(sizes) ** 2
    effective = float(shares.mean() * (1 - shares.mean()) / variance)
    return of_share(effective * float((counts / sizes).mean()), effective)


def of_paired_gain(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Gain:
    """How much more of the same images [images] the second gets right.

    The interval is that of Agresti and Min (Statistics in Medicine, 2005): half an image is added to each of the four
    outcomes, so that it is of use for few images too.
    """
    images = len(first)
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    middle = (gained - lost) / (images + 2)
    half = Z95 * math.sqrt((gained + lost + 1) / (images + 2) - middle**2) / math.sqrt(images + 2)
    return Gain(100 * (gained - lost) / images, 100 * max(-1.0, middle - half), 100 * min(1.0, middle + half))
