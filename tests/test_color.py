"""Colour operations against Pillow, Python's colorsys and a slow Gaussian; each image has its own parameters."""

from __future__ import annotations

import colorsys
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from smkd.config.schema import AugmentConfig
from smkd.data import color
from smkd.data.color import BRIGHTNESS, CONTRAST, HUE, SATURATION, ColorParameters, augment_color, draw_color

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "caltech101-mini"
Pixels = NDArray[np.uint8]
SIDE = 24


def noise(images: int, seed: int = 0, side: int = SIDE) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (images, 3, side, side), dtype=np.uint8))


def neutral(images: int) -> ColorParameters:
    """Parameters that leave every image as it is."""
    no = torch.zeros(images, dtype=torch.bool)
    return ColorParameters(
        flip=no, order=torch.arange(4).repeat(images, 1), factor=torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(images, 1),
        jitter=no, grayscale=no, solarize=no, blur=torch.zeros(images),
    )  # fmt: skip


def to_pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def levels_apart(ours: Tensor, theirs: list[Image.Image]) -> float:
    """Largest difference in grey levels."""
    expected = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in theirs])
    return float((ours * 255 - expected).abs().max())


def jitter_of(number: int, factors: Tensor) -> ColorParameters:
    """Only jitter operation `number`, with one factor per image."""
    base = neutral(len(factors))
    factor = base.factor.clone()
    factor[:, number] = factors
    return replace(base, factor=factor, jitter=torch.ones(len(factors), dtype=torch.bool))


@pytest.mark.parametrize(
    ("number", "enhance"),
    [(BRIGHTNESS, ImageEnhance.Brightness), (CONTRAST, ImageEnhance.Contrast), (SATURATION, ImageEnhance.Color)],
)
def test_jitter_equals_pillow(number: int, enhance: Callable[[Image.Image], ImageEnhance._Enhance]) -> None:
    images, factors = noise(30, seed=number), torch.linspace(0.0, 2.0, 30)
    # an image that is not grey on average, so that a wrong mean shows
    images[::2] = images[::2] // 3
    ours = augment_color(images, jitter_of(number, factors))
    theirs = [enhance(to_pillow(i)).enhance(float(f)) for i, f in zip(images, factors, strict=True)]
    assert levels_apart(ours, theirs) <= 2


def test_grayscale_equals_pillow() -> None:
    images = noise(10)
    ours = augment_color(images, replace(neutral(10), grayscale=torch.ones(10, dtype=torch.bool)))
    theirs = [ImageOps.grayscale(to_pillow(image)).convert("RGB") for image in images]
    assert levels_apart(ours, theirs) <= 1


def test_solarize_equals_pillow() -> None:
    every_level = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    ours = augment_color(every_level, replace(neutral(1), solarize=torch.ones(1, dtype=torch.bool)))
    assert levels_apart(ours, [ImageOps.solarize(to_pillow(every_level[0]), 128)]) < 0.01


def test_flip_equals_pillow() -> None:
    images = noise(4)
    ours = augment_color(images, replace(neutral(4), flip=torch.ones(4, dtype=torch.bool)))
    assert levels_apart(ours, [ImageOps.mirror(to_pillow(image)) for image in images]) < 0.01


def test_hue_equals_colorsys() -> None:
    """Torchvision's tensor definition: turn the HSV hue, in floats."""
    turns = torch.tensor([-0.5, -0.31, -0.1, -0.01, 0.0, 0.02, 0.1, 0.25, 0.5])
    images = noise(len(turns), seed=7, side=12)
    # grey, black, white and pairs of equal channels, where the hue has several formulas or none
    images[:, :, 0, 0], images[:, :, 0, 1], images[:, :, 0, 2] = 90, 0, 255
    images[:, 0, 1], images[:, 1, 2], images[:, 2, 3] = images[:, 1, 1], images[:, 2, 2], images[:, 0, 3]
    ours = augment_color(images, jitter_of(HUE, turns)) * 255
    for image, turn, result in zip(images, turns.tolist(), ours, strict=True):
        for y, x in itertools.product(range(12), range(12)):
            h, s, v = colorsys.rgb_to_hsv(*(image[:, y, x].double() / 255).tolist())
            expected = torch.tensor(colorsys.hsv_to_rgb((h + turn) % 1.0, s, v)) * 255
            assert float((result[:, y, x] - expected).abs().max()) < 0.01


# ---- blur


def blurred_by_pillow(image: Pixels, sigma: float) -> NDArray[np.int64]:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma))).astype(np.int64)


def blur_distance(images: list[Pixels], sigmas: list[float]) -> int:
    """Largest difference from Pillow in grey levels; one image size, one sigma an image."""
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    ours = augment_color(batch, replace(neutral(len(batch)), blur=torch.tensor(sigmas)))
    levels = (ours * 255).round().permute(0, 2, 3, 1).numpy()
    theirs = np.stack([blurred_by_pillow(image, sigma) for image, sigma in zip(images, sigmas, strict=True)])
    return int(np.abs(levels - theirs).max())


@pytest.mark.parametrize(("height", "width"), [(5, 5), (16, 16), (96, 96), (9, 31), (40, 17)])
def test_blur_equals_pillows_on_noise(height: int, width: int) -> None:
    rng = np.random.default_rng(10)
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(20)]
    assert blur_distance(images, rng.uniform(0.1, 2.0, 20).tolist()) <= 1
    # wider than the default range
    assert blur_distance(images, rng.uniform(2.0, 6.0, 20).tolist()) <= 1


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photographs are not here")
@pytest.mark.parametrize("side", [32, 96, 224])
def test_blur_equals_pillows_on_photographs(side: int) -> None:
    images = []
    for path in sorted(PHOTOS.rglob("*.jpg"))[::20]:
        with Image.open(path) as file:
            images.append(np.array(file.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)))
    assert blur_distance(images, np.random.default_rng(11).uniform(0.1, 2.0, len(images)).tolist()) <= 1


# ---- per image


def random_parameters(images: int, seed: int = 11) -> ColorParameters:
    """Strong draws of every kind."""
    config = AugmentConfig(
        jitter=0.8, hue=0.3, grayscale=0.3, saturation=0.8, blur_other_global=0.5, solarize_other_global=0.4
    )
    rng = np.random.default_rng(seed)
    return ColorParameters.unpack(torch.from_numpy(np.stack([draw_color(config, 1, 2, rng) for _ in range(images)])))


def test_each_image_has_its_own_parameters() -> None:
    images, parameters = noise(64, seed=12), random_parameters(64)
    for flag in (parameters.flip, parameters.jitter, parameters.grayscale, parameters.solarize, parameters.blur > 0):
        assert 0 < int(flag.sum()) < 64
    together = augment_color(images, parameters)
    alone = torch.cat([augment_color(images[n : n + 1], parameters[n : n + 1]) for n in range(64)])
    # a level of 0.5 / 255 may fall on either side of the solarise threshold
    near = ((together - alone).abs() < 1e-5).float().mean()
    assert float(near) > 0.9999
    turned = augment_color(
        images, ColorParameters(**{name: value.roll(1, 0) for name, value in vars(parameters).items()})
    )
    assert float(((turned - together).abs() < 1e-5).float().mean()) < 0.5


def test_jitter_follows_each_images_order() -> None:
    orders = torch.tensor(list(itertools.permutations(range(4))))
    images = noise(1, seed=13).expand(24, -1, -1, -1)
    factor = torch.tensor([1.4, 1.4, 0.3, 0.2])
    parameters = replace(
        neutral(24), order=orders, factor=factor.repeat(24, 1), jitter=torch.ones(24, dtype=torch.bool)
    )
    operations = {
        BRIGHTNESS: color.adjust_brightness, CONTRAST: color.adjust_contrast,
        SATURATION: color.adjust_saturation, HUE: color.adjust_hue,
    }  # fmt: skip
    ours = augment_color(images, parameters)
    for row, order in enumerate(orders.tolist()):
        expected = images[row : row + 1].float() / 255
        for number in order:
            expected = operations[number](expected, factor[number].view(1, 1, 1, 1))
        torch.testing.assert_close(ours[row : row + 1], expected, rtol=0, atol=1e-6)
    # the orders are told apart: no two of them give the same picture
    apart = (ours[:, None] - ours[None]).abs().amax(dim=(2, 3, 4)) + torch.eye(24)
    assert float(apart.min()) > 1 / 255


def test_steps_follow_the_documented_order() -> None:
    """Flip, jitter, greyscale, blur, solarise: each alone, one after the other, gives the same as all together."""
    images = noise(6, seed=14)
    yes = torch.ones(6, dtype=torch.bool)
    jitter = replace(random_parameters(6), jitter=yes)
    every = replace(jitter, flip=yes, grayscale=yes, solarize=yes, blur=torch.linspace(0.4, 2.0, 6))
    x = (images.float() / 255).flip(-1).contiguous()
    color.color_jitter(x, jitter)
    x = color.gaussian_blur(color.luma(x).expand(-1, 3, -1, -1), every.blur)
    x = torch.where(x >= 128 / 255, 1 - x, x)
    torch.testing.assert_close(augment_color(images, every), x, rtol=0, atol=1e-6)


def test_neutral_parameters_leave_the_image() -> None:
    images = noise(8, seed=15)
    assert torch.equal(augment_color(images, neutral(8)), images.float() / 255)
    # all four operations run, with factors that change nothing
    busy = replace(neutral(8), jitter=torch.ones(8, dtype=torch.bool))
    torch.testing.assert_close(augment_color(images, busy), images.float() / 255, rtol=0, atol=1e-6)
    # strong factors without the flag do nothing
    idle = replace(neutral(8), factor=torch.full((8, 4), 0.3))
    assert torch.equal(augment_color(images, idle), images.float() / 255)


def test_result_stays_in_range() -> None:
    result = augment_color(noise(64, seed=16), random_parameters(64, seed=17))
    assert float(result.min()) >= -1e-6
    assert float(result.max()) <= 1 + 1e-6


def test_some_images_at_a_time_are_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    images, parameters, mean, std = noise(10, seed=21), random_parameters(10, seed=22), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    expected = color.normalize(augment_color(images, parameters), mean, std)
    for values in (1, 3 * 3 * SIDE**2, 10**9):
        monkeypatch.setattr(color, "CPU_CHUNK", values)
        ours = color.augment_and_normalize(images, parameters, mean, std)
        # as in the test of each image's own parameters
        assert float(((ours - expected).abs() < 1e-4).float().mean()) > 0.9999


def test_no_images_are_no_images() -> None:
    """As of the local crops where a run has none."""
    none = torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    assert color.augment_and_normalize(none, neutral(4)[:0], (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)).shape == (0, 3, 1, 1)


def test_images_that_are_given_stay_as_they_were() -> None:
    images = noise(8, seed=19)
    before = images.clone()
    augment_color(images, random_parameters(8, seed=20))
    assert torch.equal(images, before)
    for operation in (color.adjust_brightness, color.adjust_contrast, color.adjust_saturation, color.adjust_hue):
        floats = torch.rand(2, 3, 5, 5)
        before = floats.clone()
        operation(floats, torch.tensor([0.3, 0.7]).view(-1, 1, 1, 1))
        assert torch.equal(floats, before)


def test_normalize() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    images = torch.rand(2, 3, 4, 4)
    expected = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(color.normalize(images, mean, std), expected)


# ---- draws


def test_draws_have_their_probabilities() -> None:
    config = AugmentConfig()
    rng = np.random.default_rng(18)
    draws = {view: np.stack([draw_color(config, view, 2, rng) for _ in range(4000)]) for view in (0, 1, 2)}
    blurred = {0: config.blur_first_global, 1: config.blur_other_global, 2: config.blur_local}
    solarized = {0: 0.0, 1: config.solarize_other_global, 2: 0.0}
    for view, rows in draws.items():
        parameters = ColorParameters.unpack(torch.from_numpy(rows))
        chances = {
            "flip": config.flip, "jitter": config.jitter, "grayscale": config.grayscale, "solarize": solarized[view]
        }  # fmt: skip
        for name, chance in chances.items():
            assert abs(float(getattr(parameters, name).float().mean()) - chance) < 0.03, (view, name)
        sigma = parameters.blur
        assert abs(float((sigma > 0).float().mean()) - blurred[view]) < 0.03
        assert float(sigma[sigma > 0].min()) >= config.blur_radius[0]
        assert float(sigma.max()) <= config.blur_radius[1]
        assert torch.equal(parameters.order.sort(dim=1).values, torch.arange(4).expand(4000, -1))
        assert len(parameters.order.unique(dim=0)) == 24
        strengths = (config.brightness, config.contrast, config.saturation, config.hue)
        for number, (strength, middle) in enumerate(zip(strengths, (1.0, 1.0, 1.0, 0.0), strict=True)):
            factor = parameters.factor[:, number]
            assert abs(float(factor.mean()) - middle) < 0.05 * strength
            assert float(factor.min()) < middle - 0.98 * strength
            assert float(factor.max()) > middle + 0.98 * strength
            assert float((factor - middle).abs().max()) <= strength + 1e-6
