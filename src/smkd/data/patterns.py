"""The embedded data set: woven and printed patterns drawn by formula, a pure function of a seed.

A class is a kind of pattern with its own scale, orientation, duty and two hues; a sample varies them a little
and adds its own position, saturation, brightness, light gradient and noise. 100 classes (64 train, 16 val, 20 test).
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float64]
Inside = NDArray[np.bool_]
Kind = Callable[[Field, Field, float], Inside]

SIZE = 32
IMAGES_PER_CLASS = {"train": 100, "val": 60, "test": 60}
CLASSES = {"train": range(0, 64), "val": range(64, 80), "test": range(80, 100)}
OVERSAMPLING = 2


def _frac(x: Field) -> Field:
    return x - np.floor(x)


def _stripes(u: Field, v: Field, duty: float) -> Inside:
    return _frac(u) < duty


def _checks(u: Field, v: Field, duty: float) -> Inside:
    return (_frac(u) < duty) ^ (_frac(v) < duty)


def _dots(u: Field, v: Field, duty: float) -> Inside:
    return np.hypot(_frac(u) - 0.5, _frac(v) - 0.5) < 0.6 * duty


def _waves(u: Field, v: Field, duty: float) -> Inside:
    return _frac(u + 0.3 * np.sin(2 * np.pi * v)) < duty


def _bricks(u: Field, v: Field, duty: float) -> Inside:
    mortar = 0.35 * (1 - duty)
    return (_frac(v) > mortar) & (_frac(u / 2 + 0.5 * (np.floor(v) % 2)) > mortar / 2)


def _rings(u: Field, v: Field, duty: float) -> Inside:
    return _frac(np.hypot(u, v)) < duty


def _grid(u: Field, v: Field, duty: float) -> Inside:
    return (_frac(u) < duty / 2) | (_frac(v) < duty / 2)


def _dashes(u: Field, v: Field, duty: float) -> Inside:
    return (_frac(v) < 0.5) & (_frac(u / 2 + 0.5 * (np.floor(v) % 2)) < duty)


def _hexagons(u: Field, v: Field, duty: float) -> Inside:
    # distance to the nearest cell border of a hexagonal lattice, from its three directions
    first, second, third = (
        np.cos(2 * np.pi * (u * np.cos(a) + v * np.sin(a))) for a in (0.0, 2 * np.pi / 3, 4 * np.pi / 3)
    )
    inside: Inside = first + second + third > 3.0 * (0.5 - duty)
    return inside


def _zigzags(u: Field, v: Field, duty: float) -> Inside:
    return _frac(u + np.abs(2 * _frac(v) - 1)) < duty


KINDS: tuple[Kind, ...] = (
    _stripes,
    _checks,
    _dots,
    _waves,
    _bricks,
    _rings,
    _grid,
    _dashes,
    _hexagons,
    _zigzags,
)


def class_names(split: str, seed: int = 0) -> list[str]:
    """Names of a split's classes, such as `waves-37`."""
    order = _class_order(seed)
    return [f"{KINDS[order[c] % len(KINDS)].__name__.strip('_')}-{order[c]}" for c in CLASSES[split]]


def generate(split: str, images_per_class: int, seed: int = 0) -> NDArray[np.uint8]:
    """Draw a split.

    Args:
        split: 'train', 'val' or 'test'; their classes are disjoint.
        images_per_class: the first so many images of each class.
        seed: of the classes and the images.

    Returns:
        uint8 [classes * images_per_class, 3, 32, 32], class after class.
    """
    order = _class_order(seed)
    return np.concatenate([_draw_class(int(order[c]), images_per_class, seed) for c in CLASSES[split]])


def _class_order(seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, 1]).permutation(100)


def _draw_class(number: int, count: int, seed: int) -> NDArray[np.uint8]:
    of_class = np.random.default_rng([seed, 2, number])
    period = float(np.exp(of_class.uniform(np.log(5.0), np.log(14.0))))
    angle = of_class.uniform(0, np.pi)
    duty = of_class.uniform(0.35, 0.65)
    hues = of_class.uniform(0, 1) + np.array([0.0, of_class.uniform(0.15, 0.5)])
    images = [
        _draw_sample(KINDS[number % len(KINDS)], period, angle, duty, hues, np.random.default_rng([seed, 3, number, i]))
        for i in range(count)
    ]
    return np.stack(images)


def _draw_sample(
    kind: Kind, period: float, angle: float, duty: float, hues: Field, rng: np.random.Generator
) -> NDArray[np.uint8]:
    period *= float(np.exp(rng.normal(0, 0.12)))
    angle += rng.normal(0, 0.15)
    duty = float(np.clip(duty + rng.normal(0, 0.04), 0.2, 0.8))
    side = SIZE * OVERSAMPLING
    y, x = np.meshgrid(np.arange(side) + 0.5, np.arange(side) + 0.5, indexing="ij")
    x, y = x / OVERSAMPLING - rng.uniform(0, SIZE), y / OVERSAMPLING - rng.uniform(0, SIZE)
    u = (np.cos(angle) * x + np.sin(angle) * y) / period
    v = (np.cos(angle) * y - np.sin(angle) * x) / period
    inside = kind(u, v, duty).astype(np.float64)
    share = inside.reshape(SIZE, OVERSAMPLING, SIZE, OVERSAMPLING).mean(axis=(1, 3))

    saturation, value = rng.uniform(0.25, 1.0, 2), rng.uniform(0.35, 1.0, 2)
    hues = hues + rng.normal(0, 0.05, 2)
    inks = [np.array(colorsys.hsv_to_rgb(h % 1, s, b)) for h, s, b in zip(hues, saturation, value, strict=True)]
    image = share[..., None] * inks[0] + (1 - share[..., None]) * inks[1]

    slope = rng.normal(0, 0.25, 2)
    ramp = np.linspace(-1, 1, SIZE)
    light = 1 + slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    image = image * light[..., None] + rng.normal(0, rng.uniform(0.02, 0.12), image.shape)
    pixels: NDArray[np.uint8] = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    return pixels.transpose(2, 0, 1)
