"""Photographs with captions in rows: on a page they are a grid that wraps, in a file one sheet."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from smkd.data.decoding import decode, read_file
from smkd.viz.style import INK, RIGHT, SHADES, WRONG, styled

TILE = 240
"""Longer side in pixels of a photograph on a page."""
INCHES = 1.5
"""Side of a tile on a sheet."""
LONGEST_CAPTION = 24


class Tile(NamedTuple):
    """A photograph.

    Attributes:
        image: at any size.
        caption: a word or two.
        right: whether it shows a right answer; None if it shows no answer.
    """

    image: Image.Image
    caption: str
    right: bool | None = None


def picture(pixels: Tensor) -> Image.Image:
    """An image [3, height, width], uint8 or on the 0-1 scale."""
    if pixels.is_floating_point():
        pixels = (pixels.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def tile_of_file(path: str, caption: str) -> Tile:
    """A photograph of a file, made small; raises `ValueError` if it cannot be read."""
    return Tile(decode(read_file(path)), caption)


def address(image: Image.Image) -> str:
    """A photograph as the address of an image on a page; tiny ones keep their pixels visible."""
    shown = image.convert("RGB")
    if max(shown.size) < TILE / 2:
        scale = TILE // max(shown.size)
        shown = shown.resize((shown.width * scale, shown.height * scale), Image.Resampling.NEAREST)
    shown.thumbnail((TILE, TILE))
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def sheet(tiles: Sequence[Tile], columns: int, inches: float = INCHES) -> Figure:
    """All tiles as one figure, row by row.

    Args:
        tiles: row after row.
        columns: tiles of a row.
        inches: width of a tile.
    """
    rows = -(-len(tiles) // columns)
    with styled():
        figure = Figure(figsize=(inches * columns, (inches * _height(tiles) + 0.3) * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes:
            axis.set_axis_off()
        for axis, tile in zip(axes, tiles, strict=False):
            # tiny pictures keep their pixels visible
            smooth = "nearest" if max(tile.image.size) < TILE / 2 else "antialiased"
            axis.imshow(np.asarray(tile.image.convert("RGB")), interpolation=smooth)
            color = INK if tile.right is None else RIGHT if tile.right else WRONG
            axis.set_title(
                short(tile.caption, round(LONGEST_CAPTION * inches / INCHES)), fontsize=9, color=color, loc="center"
            )
            if tile.right is not None:
                axis.set_axis_on()
                axis.set(xticks=[], yticks=[])
                for spine in axis.spines.values():
                    spine.set(visible=True, color=color, linewidth=3)
    return figure


def _height(tiles: Sequence[Tile]) -> float:
    """Of the highest tile, where its width is 1."""
    return max(tile.image.height / tile.image.width for tile in tiles)


def mosaic(tiles: Sequence[Tile], columns: int, side: int = 128) -> Image.Image:
    """All tiles as one image, quickly: for a log, where a figure would take longer than a validation.

    Args:
        tiles: row after row.
        columns: tiles of a row.
        side: of a tile in pixels, without its caption.
    """
    caption, gap = 14, 3
    rows = -(-len(tiles) // columns)
    whole = Image.new("RGB", (columns * (side + gap), rows * (side + caption + gap)), SHADES["paper"].light)
    pen = ImageDraw.Draw(whole)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 11)
    for number, tile in enumerate(tiles):
        left, top = number % columns * (side + gap), number // columns * (side + caption + gap)
        small = max(tile.image.size) < side
        scale = side / max(tile.image.size)
        size = tuple(max(1, round(length * scale)) for length in tile.image.size)
        way = Image.Resampling.NEAREST if small else Image.Resampling.BILINEAR
        whole.paste(tile.image.convert("RGB").resize((size[0], size[1]), way), (left, top + caption))
        pen.text((left, top), short(tile.caption, side // 7), INK, font)
    return whole


def short(name: str, longest: int = LONGEST_CAPTION) -> str:
    """A name, cut if it is long."""
    return name if len(name) <= longest else name[: longest - 1] + "…"
