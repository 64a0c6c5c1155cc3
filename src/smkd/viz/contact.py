"""Contact sheets: a few pictures of every class of a split, to see at a glance what a data set holds."""

from __future__ import annotations

import math

import numpy as np
from matplotlib import font_manager
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from smkd.data.images import Images
from smkd.errors import DataError

THUMB = 76
SHEET_GAP = 3
SHOWN_PER_CLASS = 6
CAPTION = 17
MARGIN = 16
HEADING = 30
MOST_CLASSES = 120
TALL = 1.6
"""How many times its width a sheet may be high before another column of classes begins."""
PAPER, INK, FAINT, ALARM = (255, 255, 255), (25, 25, 25), (236, 236, 236), (200, 30, 30)


def contact_sheet(images: Images, title: str) -> Image.Image:
    """A sheet with a strip of pictures for each class, under its name and number of images.

    Pictures are shown whole, spread evenly over the class; an unreadable one is a crossed box. Of more than 120
    classes an even choice is shown, and the heading says so.

    Args:
        images: one split.
        title: what to call it.
    """
    total = len(images.class_names)
    chosen = np.unique(np.linspace(0, total - 1, min(total, MOST_CLASSES)).round().astype(int))
    width, height = SHOWN_PER_CLASS * (THUMB + SHEET_GAP) + MARGIN, CAPTION + THUMB + SHEET_GAP + 8
    columns = next(c for c in range(1, len(chosen) + 1) if math.ceil(len(chosen) / c) * height <= TALL * c * width)
    rows = math.ceil(len(chosen) / columns)
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + HEADING + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    shown = "" if len(chosen) == total else f", {len(chosen)} of them shown"
    pen.text((MARGIN, 8), f"{title}: {total} classes{shown}, {len(images)} images", INK, _font(16))
    font = _font(12)
    for place, label in enumerate(chosen):
        members = np.flatnonzero(images.labels == label)
        left, top = MARGIN + place // rows * width, HEADING + MARGIN // 2 + place % rows * height
        caption = _fitted(images.class_names[label], f"  {len(members)}", font, width - MARGIN)
        pen.text((left, top), caption, INK, font)
        for number, index in enumerate(_spread(members)):
            _paste(sheet, pen, images, int(index), left + number * (THUMB + SHEET_GAP), top + CAPTION)
    return sheet


def _spread(members: NDArray[np.int64]) -> NDArray[np.int64]:
    """At most `PER_CLASS` of the images, evenly spaced."""
    places = np.unique(np.linspace(0, len(members) - 1, min(len(members), SHOWN_PER_CLASS)).round().astype(int))
    chosen: NDArray[np.int64] = members[places]
    return chosen


def _paste(sheet: Image.Image, pen: ImageDraw.ImageDraw, images: Images, index: int, left: int, top: int) -> None:
    box = (left, top, left + THUMB - 1, top + THUMB - 1)
    pen.rectangle(box, FAINT)
    try:
        pixels = images.load(index)
    except DataError:
        pen.rectangle(box, None, ALARM, 2)
        pen.line(box, ALARM, 2)
        pen.line((box[0], box[3], box[2], box[1]), ALARM, 2)
        return
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    scale = THUMB / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    # tiny pictures keep their pixels visible
    thumb = picture.resize((size[0], size[1]), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    sheet.paste(thumb, (left + (THUMB - thumb.width) // 2, top + (THUMB - thumb.height) // 2))


def _fitted(name: str, count: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The name, cut if the line would be too long, and the count."""
    name = name.encode(errors="replace").decode().replace("\n", " ")
    if font.getlength(name + count) <= width:
        return name + count
    while name and font.getlength(name + "…" + count) > width:
        name = name[:-1]
    return name + "…" + count


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
