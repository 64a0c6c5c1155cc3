"""Draws against a plain twin that asks numpy for one number after the other: equal to the last bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from smkd.config.loading import check
from smkd.config.run_config import RunConfig
from smkd.config.schema import AugmentConfig, MaskConfig
from smkd.data import augment
from smkd.data.augment import Drawing, Draws, Streams, generator


def make_config(**changes: Any) -> RunConfig:
    return check(
        {
            "phase": "pretrain", "epochs": 2, "batch_size": 8, "seed": 5, "model": {"patch_size": 16},
            "global_views": {"count": 2, "size": 224, "scale": [0.25, 1.0]},
            "local_views": {"count": 10, "size": 96, "scale": [0.05, 0.25]},
            **changes,
        }
    )  # fmt: skip


def plain_box(height: int, width: int, scale: tuple[float, float], rng: np.random.Generator) -> tuple[int, ...]:
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    w, h = min(width, round(height * augment.CROP_ASPECT[1])), min(height, round(width / augment.CROP_ASPECT[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def plain_color(config: AugmentConfig, view: int, num_global: int, rng: np.random.Generator) -> NDArray[np.float32]:
    blur = [config.blur_first_global, *[config.blur_other_global] * (num_global - 1)][view : view + 1]
    solarize = config.solarize_other_global if 0 < view < num_global else 0.0
    order = rng.permutation(4)
    strength = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    factor = rng.uniform(-strength, strength)
    factor[:3] = np.maximum(0, 1 + factor[:3])
    flip, jitter, gray, blurred, solarized = rng.random(5)
    radius = rng.uniform(*config.blur_radius)
    sigma = radius if blurred < (blur or [config.blur_local])[0] else 0.0
    flags = [jitter < config.jitter, gray < config.grayscale, solarized < solarize]
    return np.array([flip < config.flip, *order, *factor, *flags, sigma], dtype=np.float32)


def plain_mask(config: MaskConfig, grid: tuple[int, int], epoch: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    mask = np.zeros(grid, dtype=bool)
    if epoch < config.start_epoch:
        return mask
    pairs = zip(config.ratio, config.ratio_jitter, strict=True)
    missing = float(rng.choice([ratio + rng.uniform(-jitter, jitter) for ratio, jitter in pairs])) * mask.size
    if config.shape == "random":
        mask.reshape(-1)[rng.permutation(mask.size)[: int(missing)]] = True
        return mask
    smallest = (min(grid) // 3) ** 2
    found = True
    while missing > 0 and found:
        found = False
        for _ in range(augment.TRIES_PER_BLOCK):
            area = smallest + rng.random() * (missing - smallest)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= grid[0] or w >= grid[1]:
                continue
            top, left = int(rng.integers(0, grid[0] - h + 1)), int(rng.integers(0, grid[1] - w + 1))
            added = int((~mask[top : top + h, left : left + w]).sum())
            if 0 < added <= missing:
                mask[top : top + h, left : left + w] = True
                missing -= added
                found = True
                break
    return mask


def plain_draws(config: RunConfig, epoch: int, index: int, height: int, width: int) -> Draws:
    boxes, colors, of_masks = [], [], []
    side = config.global_views.size // config.model.patch_size
    for view in range(config.global_views.count + config.local_views.count):
        rng = np.random.Generator(np.random.Philox(key=config.seed, counter=[0, view, index, epoch]))
        kind = config.global_views if view < config.global_views.count else config.local_views
        boxes.append(augment.Box(*plain_box(height, width, kind.scale, rng)))
        colors.append(plain_color(config.augment, view, config.global_views.count, rng))
        if view < config.global_views.count:
            of_masks.append(plain_mask(config.mask, (side, side), epoch, rng))
    return Draws(boxes, np.stack(of_masks), np.stack(colors))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed": 2**40 + 3, "mask": {"shape": "random", "ratio": [0.2, 0.3, 0.6], "ratio_jitter": [0.0, 0.2, 0.1]}},
        {"mask": {"ratio": [0.5], "ratio_jitter": [0.5], "start_epoch": 1}, "model": {"patch_size": 8}},
        {"augment": {"brightness": 2.0, "hue": 0.0, "blur_radius": [0.7, 0.7], "solarize_other_global": 0.9},
         "global_views": {"count": 3, "size": 32, "scale": [0.3, 0.3]},
         "local_views": {"count": 0, "size": 16, "scale": [0.1, 0.1]}, "model": {"patch_size": 4}},
    ],
)  # fmt: skip
def test_draws_are_those_of_the_plain_twin(changes: dict[str, Any]) -> None:
    config = make_config(**changes)
    draw = Drawing(config)
    numbers = np.random.default_rng(0)
    masked = 0
    for _ in range(300):
        epoch, index = int(numbers.integers(0, 2000)), int(numbers.integers(0, 10**6))
        # long ribbons too, whose boxes do not fit
        height, width = (int(side) for side in numbers.choice([1, 17, 84, 333, 480, 2500], 2))
        drawn, expected = draw(epoch, index, height, width), plain_draws(config, epoch, index, height, width)
        assert drawn.boxes == expected.boxes
        assert np.array_equal(drawn.masks, expected.masks)
        assert drawn.color.tobytes() == expected.color.tobytes()
        assert drawn.color.dtype == np.float32
        masked += int(drawn.masks.sum())
    assert masked > 0


def test_one_set_of_streams_gives_what_a_generator_each_gives() -> None:
    streams = Streams(7)
    for epoch, index, stream in ((0, 0, 0), (3, 5, 1), (3, 5, 1), (2**40, 2**41, 2**42), (0, 0, 0)):
        rng, expected = streams.at(epoch, index, stream), generator(7, epoch, index, stream)
        # an odd number of 32-bit draws leaves a half word over, which must not reach the next stream
        assert rng.integers(0, 10, 3).tolist() == expected.integers(0, 10, 3).tolist()
        assert rng.random(5).tolist() == expected.random(5).tolist()
