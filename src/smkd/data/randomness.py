"""Randomness of a sample as a pure function of (seed, epoch, index, stream).

A counter-based generator keyed by those numbers: what a sample looks like depends neither on the number of
workers or devices nor on where a run was interrupted.
"""

from __future__ import annotations

import numpy as np

ORDER = 1 << 20
"""Stream of the order of samples in an epoch; streams 0, 1, 2, ... are the views of a sample."""


def generator(seed: int, epoch: int, index: int, stream: int) -> np.random.Generator:
    """Generator of one stream of one sample; all arguments non-negative."""
    # the lowest counter word advances with each draw, the other three say whose draws these are
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, stream, index, epoch]))
