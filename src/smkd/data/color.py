"""Flip, colour and blur, batched on the device, each image with its own parameters.

Brightness, contrast, saturation, greyscale, blur, solarise and flip follow Pillow's definitions, which are also
torchvision's except for the blur. Hue follows torchvision's tensor definition (a turn of the HSV hue, in floats).
Values are floats from 0 to 1; only the blur rounds to grey levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from smkd.config.schema import AugmentConfig
from smkd.device import to_device

Channels = tuple[float, float, float]
"""Red, green and blue."""

CPU_CHUNK = 2**18
"""Values that a CPU works on at a time: few enough that they stay in its cache from one operation to the next."""
LUMA = (0.299, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
SOLARIZE_THRESHOLD = 128 / 255
TINY = 1e-20
"""Changes no sum with a float but 0's."""
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

    def __getitem__(self, rows: slice) -> ColorParameters:
        """Those of some images."""
        return ColorParameters(**{name: value[rows] for name, value in vars(self).items()})


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


def augment_and_normalize(images: Tensor, parameters: ColorParameters, mean: Channels, std: Channels) -> Tensor:
    """`augment`, then `normalize`; on a CPU some images at a time."""
    step = CPU_CHUNK // math.prod(images.shape[1:]) if images.device.type == "cpu" else len(images)
    step = max(1, step)
    result = torch.empty(images.shape, device=images.device)
    for first in range(0, len(images), step):
        rows = slice(first, first + step)
        result[rows] = normalize(augment_color(images[rows], parameters[rows]), mean, std)
    return result


def augment_color(images: Tensor, parameters: ColorParameters) -> Tensor:
    """Apply flip, jitter, greyscale, blur and solarise, in that order.

    Args:
        images: uint8 [images, 3, height, width] on any device.
        parameters: one row per image.

    Returns:
        float32 [images, 3, height, width] in [0, 1].
    """
    x = images.float().div_(255)
    _change(x, parameters.flip, lambda part: part.flip(-1))
    color_jitter(x, parameters)
    _change(x, parameters.grayscale, lambda part: luma(part).expand_as(part))
    _change(x, parameters.blur > 0, gaussian_blur, parameters.blur)
    _change(x, parameters.solarize, lambda part: torch.where(part >= SOLARIZE_THRESHOLD, 1 - part, part))
    return x


def normalize(images: Tensor, mean: Channels, std: Channels) -> Tensor:
    """Subtract the channel means and divide by the standard deviations; images [..., 3, height, width]."""
    constants = to_device(torch.tensor([mean, std], dtype=images.dtype), images.device)[..., None, None]
    return (images - constants[0]) / constants[1]


def luma(x: Tensor) -> Tensor:
    """ITU-R 601 brightness, [images, 3, h, w] -> [images, 1, h, w]."""
    r, g, b = x.unbind(1)
    return (LUMA[0] * r).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2]).unsqueeze(1)


def color_jitter(x: Tensor, parameters: ColorParameters) -> None:
    """The four jitter operations in place, each image in its own order; x float [images, 3, h, w] in [0, 1]."""
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for turn in range(4):
        for number, operation in enumerate(operations):
            chosen = parameters.jitter & (parameters.order[:, turn] == number)
            _change(x, chosen, operation, parameters.factor[:, number])


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with black; factor [images] on the CPU, 1 leaves the image."""
    return (x * _for_each(x, factor)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean brightness; factor [images] on the CPU, 1 leaves the image."""
    return _blend(x, luma(x).mean(dim=(2, 3), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey image; factor [images] on the CPU, 1 leaves the image."""
    return _blend(x, luma(x), factor)


def adjust_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the HSV hue by `turn` of a full circle, [images] on the CPU, 0 leaves the image."""
    # choosing by a condition costs a CPU several times what minimum, maximum and sign do
    r, g, b = x.unbind(1)
    larger, smaller = torch.maximum(g, b), torch.minimum(g, b)
    value, middle = torch.maximum(r, larger), torch.minimum(r, larger)
    spread = value - torch.minimum(middle, smaller)
    # 1 where blue is above green, and where one of the two is above red
    blue, beyond = ((b - g).sign_().clamp_(min=0), (larger - r).sign_().clamp_(min=0))
    # In sixths of a circle, from red at 0 by green at 2 to blue at 4: counted up from 0 or down from 6 (red largest),
    # down from 2 (green), up from 4 (blue); `abs` turns those that are counted down.
    origin = (12 * blue).sub_(2).mul_(beyond).sub_(blue, alpha=6)
    # grey has no hue: 0 / TINY
    hue = middle.sub_(smaller).div_(spread + TINY).add_(origin).abs_()
    hue.add_(_for_each(x, 6 * turn)[:, 0])
    hue.sub_((hue / 6).floor_(), alpha=6)
    # how much of the spread each channel is below the value, by its distance on the circle
    below = [2 - (hue - 3).abs_(), (hue - 2).abs_() - 1, (hue - 4).abs_() - 1]
    return torch.stack([torch.addcmul(value, spread, part.clamp_(0, 1), value=-1) for part in below], dim=1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Pillow's Gaussian blur: three box blurs each way, borders replicated.

    Args:
        x: float [images, 3, h, w] in [0, 1].
        sigma: float [images] on the CPU, standard deviation in pixels, above 0.
    """
    radius = _box_radius(sigma)
    reach = math.ceil(float(radius.max()))
    weights = (radius + 1 - torch.arange(reach + 1)[:, None]).clamp(0, 1) / (2 * radius + 1)
    middle, *sides = to_device(weights, x.device).view(reach + 1, -1, 1, 1, 1)
    x = 255 * x
    for axis in (3, 2):
        size, edge = x.shape[axis], [reach, reach, 0, 0]
        for _ in range(BOXES):
            wide = F.pad(x, edge if axis == 3 else edge[::-1], mode="replicate")
            x = wide.narrow(axis, reach, size) * middle
            for far, weight in enumerate(sides, start=1):
                x.addcmul_(wide.narrow(axis, reach - far, size) + wide.narrow(axis, reach + far, size), weight)
            # Pillow rounds after each box; without that single pixels end three grey levels apart
            x.add_(0.5).floor_()
    return x.div_(255)


def _box_radius(sigma: Tensor) -> Tensor:
    """Radius, with its fraction, of the box that blurs like the Gaussian when applied `BOXES` times.

    Gwosdek et al., Theoretical foundations of Gaussian convolution by extended box filtering, SSVM 2011.
    """
    variance = sigma**2 / BOXES
    whole = ((12 * variance + 1).sqrt().sub(1) / 2).floor()
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    return whole + fraction


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = _for_each(x, factor)
    return (x * factor).add_((1 - factor) * other).clamp_(0, 1)


def _for_each(x: Tensor, values: Tensor) -> Tensor:
    """A number for each image, on the images' device, [images, 1, 1, 1]."""
    return to_device(values, x.device).view(-1, 1, 1, 1)


def _change(x: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> None:
    """Put what an operation makes of the chosen images, and of their parameters, in their place.

    Args:
        x: [images, ...], changed.
        chosen: bool [images] on the CPU, where the parameters are: the device is not waited for.
        parameters: each [images].
    """
    rows = chosen.nonzero()[:, 0]
    own = [values[rows] for values in parameters]
    if len(rows) == len(x):
        x.copy_(operation(x, *own))
    elif len(rows):
        there = to_device(rows, x.device)
        x.index_copy_(0, there, operation(x.index_select(0, there), *own))
