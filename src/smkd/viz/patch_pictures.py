"""Pictures of patches: attention over an image, and lines between the matched patches of two images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps, font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from smkd.classify.encoder import Encoder
from smkd.data.augment import resize_center_crop
from smkd.viz.seen import Match, SeenPatches, holding, match_patches, see
from smkd.viz.tiles import Tile

DIMMED = 0.25
"""Brightness of what holds little attention."""
SIDE = 336
"""Side of a drawn image in pixels."""
GAP = 56
SMOOTH = 2
"""Pictures are drawn so many times larger, then made smaller: Pillow's lines have hard edges."""
PAPER, INK = (255, 255, 255), (0, 0, 0)
COLORS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#ffffff")
"""Okabe and Ito's, which colour-blind people tell apart, with white for their black."""


def central_square(image: Tensor, resize: int, crop: int) -> Image.Image:
    """The part of an image that a backbone sees, at the size of the pictures rather than its own.

    Args:
        image: uint8 [3, height, width].
        resize, crop: the backbone's, as `smkd.data.augment.resize_center_crop` takes them.
    """
    square = resize_center_crop(image, round(SIDE * resize / crop), SIDE)
    return Image.fromarray(square.permute(1, 2, 0).contiguous().numpy())


def attention_picture(square: Image.Image, attention: Tensor, grid: int) -> Image.Image:
    """A picture of attention: a patch with more attention is brighter and more yellow.

    Args:
        square: what the backbone sees.
        attention: weights [grid * grid], row by row.
    """
    share = (attention / attention.max().clamp(min=1e-12)).view(grid, grid).numpy()
    colors = (colormaps["inferno"](share)[..., :3] * 255).astype(np.uint8)
    heat = Image.fromarray(colors).resize(square.size, Image.Resampling.NEAREST)
    return Image.blend(square, heat, 0.55)


def matches_picture(query: Image.Image, support: Image.Image, matches: Sequence[Match], grid: int) -> Image.Image:
    """Two images side by side, the query to the left; each match has a number, a colour and a line.

    Args:
        query, support: what the backbone sees of each.
        matches: at most as many as there are `COLORS`, the first is number 1.
        grid: patches along a side of both.
    """
    side, gap = SIDE * SMOOTH, GAP * SMOOTH
    sheet = Image.new("RGB", (2 * side + gap, side), PAPER)
    sheet.paste(query.resize((side, side)), (0, 0))
    sheet.paste(support.resize((side, side)), (side + gap, 0))
    pen, patch = ImageDraw.Draw(sheet), side / grid
    numbers: dict[tuple[float, float], list[int]] = {}
    for number, match in enumerate(matches):
        left, right = _corner(match.query, grid, patch, 0), _corner(match.support, grid, patch, side + gap)
        line = (left[0] + patch, left[1] + patch / 2, right[0], right[1] + patch / 2)
        pen.line(line, INK, 5 * SMOOTH)
        pen.line(line, COLORS[number], 3 * SMOOTH)
        for corner in (left, right):
            numbers.setdefault(corner, []).append(number)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans:bold"), 15 * SMOOTH)
    for (x, y), found in numbers.items():
        pen.rectangle((x, y, x + patch, y + patch), None, INK, 5 * SMOOTH)
        pen.rectangle(
            (x + SMOOTH, y + SMOOTH, x + patch - SMOOTH, y + patch - SMOOTH), None, COLORS[found[0]], 3 * SMOOTH
        )
        # several patches of the query may have the same best match
        text = " ".join(str(number + 1) for number in found)
        pen.text((x + patch / 2, y + patch / 2), text, PAPER, font, "mm", stroke_width=2 * SMOOTH, stroke_fill=INK)
    return sheet.resize((sheet.width // SMOOTH, sheet.height // SMOOTH), Image.Resampling.LANCZOS)


def _corner(place: int, grid: int, patch: float, left: float) -> tuple[float, float]:
    """Upper left corner of a patch of the image that begins at `left`."""
    return left + place % grid * patch, place // grid * patch


def mass_picture(square: Image.Image, kept: Tensor, grid: int) -> Image.Image:
    """The patches that hold most of the attention; the others are dark.

    Args:
        square: what the backbone sees.
        kept: bool [grid * grid], row by row (`smkd.viz.seen.holding`).
    """
    light = torch.where(kept, 1.0, DIMMED).view(grid, grid).numpy()
    shade = Image.fromarray((255 * light).astype(np.uint8)).resize(square.size, Image.Resampling.NEAREST)
    return Image.composite(square, Image.new("RGB", square.size), shade)


def seen_squares(encoder: Encoder, images: Sequence[Tensor]) -> list[Image.Image]:
    """What the backbone sees of images, uint8 [3, height, width] each."""
    return [central_square(image, encoder.config.resize, encoder.config.crop) for image in images]


class DrawnMatches(NamedTuple):
    """Matched patches of two images.

    Attributes:
        picture: the images side by side, with the matches that add most.
        matches: of all patches of the first image, the largest contribution first.
        grid: patches along a side.
    """

    picture: Image.Image
    matches: list[Match]
    grid: int


def drawn_matches(encoder: Encoder, pair: Sequence[Tensor], count: int) -> DrawnMatches:
    """Match the patches of two images, and draw the matches that add most.

    Args:
        encoder: with a network.
        pair: uint8 [3, height, width] each; the first one's patches are matched.
        count: how many are drawn.
    """
    seen = see(encoder, pair)
    assert seen is not None
    matches = match_patches(seen.patches[0], seen.patches[1], seen.attention[0])
    first, second = seen_squares(encoder, pair)
    return DrawnMatches(matches_picture(first, second, matches[:count], seen.grid), matches, seen.grid)


def attention_tiles(encoder: Encoder, images: Sequence[Tensor], names: Sequence[str], *, heads: bool) -> list[Tile]:
    """A row for each image: the image, its attention, the patches that hold most of it, and each head's.

    Args:
        encoder: with a network.
        images: uint8 [3, height, width] each.
        names: captions of the images.
        heads: whether each head is shown.
    """
    seen = see(encoder, images)
    assert seen is not None
    tiles = []
    for place, (square, name) in enumerate(zip(seen_squares(encoder, images), names, strict=True)):
        tiles += [Tile(square, name), *_attention_row(seen, place, square, heads=heads)]
    return tiles


def _attention_row(seen: SeenPatches, place: int, square: Image.Image, *, heads: bool) -> list[Tile]:
    mean = seen.attention[place]
    row = [
        Tile(attention_picture(square, mean, seen.grid), "all heads"),
        Tile(mass_picture(square, holding(mean), seen.grid), "60 % of it"),
    ]
    if heads:
        for number, weights in enumerate(seen.heads[place], start=1):
            row.append(Tile(attention_picture(square, weights, seen.grid), f"head {number}"))
    return row
