"""Flip, colour and blur, batched on the device, each image with its own parameters.

Brightness, contrast, saturation, greyscale, blur, solarise and flip follow Pillow's definitions (torchvision's too but
for the blur); hue follows torchvision's tensor definition (a turn of the HSV hue, in floats). Values are floats from 0
to 1; only the blur rounds to grey levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smkd.config.schema import AugmentConfig

LUMA = (0.299, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
SOLARIZE_THRESHOLD = 128 / 255
BOXES = 3
"""Box blurs in a row that stand for a Gaussian, as in Pillow."""


@dataclass(frozen=True)
class ColorParameters:
    """Per-image parameters; every field has one row per image, on the CPU.

    Attributes:
        flip: bool [images], mirror left to right.
        order: int64 [images, 4], the jitter operations in the order of their turn.
        factor: float32 [images, 4], strength of brightness, contrast, saturation and hue.
        jitter, grayscale, solarize: bool [images].
        blur: float32 [images], standard deviation in pixels, 0 for none.
    """

    flip: Tensor
    order: Tensor
    factor: Tensor
    jitter: Tensor
    grayscale: Tensor
    solarize: Tensor
    blur: Tensor

    @staticmethod
    def unpack(rows: Tensor) -> ColorParameters:
        """Parameters from rows that `draw_color` made, float32 [images, 13]."""
        flag = rows[:, [0, 9, 10, 11]] > 0.5
        return ColorParameters(
            flip=flag[:, 0], order=rows[:, 1:5].long(), factor=rows[:, 5:9],
            jitter=flag[:, 1], grayscale=flag[:, 2], solarize=flag[:, 3], blur=rows[:, 12],
        )  # fmt: skip


def draw_color(config: AugmentConfig, view: int, num_global: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Parameters of one image's view as a row for `ColorParameters.unpack`, float32 [13].

    Args:
        view: running number, global views first.
        num_global: how many views are global.
    """
    if view == 0:
        blur, solarize = config.blur_first_global, 0.0
    elif view < num_global:
        blur, solarize = config.blur_other_global, config.solarize_other_global
    else:
        blur, solarize = config.blur_local, 0.0
    order = rng.permutation(4).tolist()
    # in one go: a call for each number costs several times as much
    *turns, flip, jitter, gray, blurred, solarized, radius = rng.random(10).tolist()
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    factor = [-strength + 2 * strength * turn for strength, turn in zip(strengths, turns, strict=True)]
    factor[:HUE] = [max(0.0, 1 + change) for change in factor[:HUE]]
    low, high = config.blur_radius
    flags = [jitter < config.jitter, gray < config.grayscale, solarized < solarize]
    sigma = low + (high - low) * radius if blurred < blur else 0.0
    return np.array([flip < config.flip, *order, *factor, *flags, sigma], dtype=np.float32)


def augment(images: Tensor, parameters: ColorParameters) -> Tensor:
    """Apply flip, jitter, greyscale, blur and solarise, in that order.

    Args:
        images: uint8 [images, 3, height, width] on any device.
        parameters: one row per image.

    Returns:
        float32 [images, 3, height, width] in [0, 1].
    """
    x = images.float() / 255
    x = _where(parameters.flip, x.flip(-1), x)
    x = color_jitter(x, parameters)
    x = _where(parameters.grayscale, luma(x).expand_as(x), x)
    x = gaussian_blur(x, parameters.blur)
    return _where(parameters.solarize, torch.where(x >= SOLARIZE_THRESHOLD, 1 - x, x), x)


def normalize(images: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """Subtract the channel means and divide by the standard deviations; images [..., 3, height, width]."""
    shape = (3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def luma(x: Tensor) -> Tensor:
    """ITU-R 601 brightness, [images, 3, h, w] -> [images, 1, h, w]."""
    r, g, b = x.unbind(1)
    return (LUMA[0] * r + LUMA[1] * g + LUMA[2] * b).unsqueeze(1)


def color_jitter(x: Tensor, parameters: ColorParameters) -> Tensor:
    """The four jitter operations, each image in its own order; x float [images, 3, h, w] in [0, 1]."""
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    x = x.clone()
    for turn in range(4):
        for number, operation in enumerate(operations):
            # chosen on the CPU, where the parameters are: the device is not waited for
            chosen = (parameters.jitter & (parameters.order[:, turn] == number)).nonzero()[:, 0]
            if len(chosen):
                factor = parameters.factor[chosen, number].to(x.device, non_blocking=True).view(-1, 1, 1, 1)
                rows = chosen.to(x.device, non_blocking=True)
                x[rows] = operation(x[rows], factor)
    return x


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with black; factor [images, 1, 1, 1], 1 leaves the image."""
    return (x * factor).clamp(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean brightness; factor [images, 1, 1, 1], 1 leaves the image."""
    return _blend(x, luma(x).mean(dim=(2, 3), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey image; factor [images, 1, 1, 1], 1 leaves the image."""
    return _blend(x, luma(x), factor)


def adjust_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the HSV hue by `turn` of a full circle, [images, 1, 1, 1], 0 leaves the image."""
    r, g, b = x.unbind(1)
    # several times faster on a CPU than the largest and smallest along an axis of three
    value, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    spread = value - low
    grey = spread == 0
    safe = torch.where(grey, torch.ones_like(spread), spread)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = hue / 6 + turn.view(-1, 1, 1)
    # HSV to RGB without branches: channel n is value - spread * clip(min(k, 4 - k)), k = (n + 6 hue) mod 6
    channels = [value - spread * torch.minimum(k, 4 - k).clamp(0, 1) for k in ((n + 6 * hue) % 6 for n in (5, 3, 1))]
    return torch.stack(channels, dim=1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Pillow's Gaussian blur, three box blurs each way, as batched matrix products.

    Args:
        x: float [images, 3, h, w].
        sigma: float [images] on the CPU, standard deviation in pixels; 0 leaves the image.
    """
    chosen = (sigma > 0).nonzero()[:, 0]
    if not len(chosen):
        return x
    boxes = _box_radius(sigma[chosen])
    reach = math.ceil(float(boxes.max()))
    rows, boxes = chosen.to(x.device, non_blocking=True), boxes.to(x.device, non_blocking=True)
    part = x[rows] * 255
    vertical, horizontal = (_box_matrix(side, boxes, reach)[:, None] for side in part.shape[-2:])
    # Pillow rounds after each box; without that single pixels end three grey levels apart
    for _ in range(BOXES):
        part = _rounded(part @ horizontal.transpose(-1, -2))
    for _ in range(BOXES):
        part = _rounded(vertical @ part)
    x = x.clone()
    x[rows] = part / 255
    return x


def _box_radius(sigma: Tensor) -> Tensor:
    """Radius, with its fraction, of the box that blurs like the Gaussian when applied `BOXES` times.

    Gwosdek et al., Theoretical foundations of Gaussian convolution by extended box filtering, SSVM 2011.
    """
    variance = sigma**2 / BOXES
    whole = ((12 * variance + 1).sqrt().sub(1) / 2).floor()
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    return whole + fraction


def _box_matrix(side: int, radius: Tensor, reach: int) -> Tensor:
    """[images, side, side]: row i averages the pixels within `radius` of i, borders replicated."""
    offset = torch.arange(-reach, reach + 1, device=radius.device)
    weight = (radius[:, None] + 1 - offset.abs()).clamp(0, 1) / (2 * radius[:, None] + 1)
    target = torch.arange(side, device=radius.device)[:, None]
    source = (target + offset).clamp(0, side - 1)
    matrix = weight.new_zeros(len(radius), side, side)
    return matrix.scatter_add_(2, source.expand(len(radius), -1, -1), weight[:, None].expand(-1, side, -1))


def _rounded(x: Tensor) -> Tensor:
    return (x + 0.5).floor()


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def _where(flag: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(flag.to(no.device, non_blocking=True).view(-1, 1, 1, 1), yes, no)
