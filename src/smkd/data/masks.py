"""Masks over the patch grid for masked-image modelling (BEiT's blocks, as iBOT draws them)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from smkd.config.schema import MaskConfig

ASPECT = (0.3, 1 / 0.3)
LOG_ASPECT = math.log(ASPECT[0]), math.log(ASPECT[1])
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
            aspect = math.exp(LOG_ASPECT[0] + (LOG_ASPECT[1] - LOG_ASPECT[0]) * rng.random())
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
