"""Why an answer was given: where [CLS] attends, which patches match those of the nearest photograph, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps, font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from smkd.classify.answers import Answer, Lesson
from smkd.classify.encoder import Encoder
from smkd.classify.pictures import Pictures
from smkd.data.augment import resize_center_crop
from smkd.data.color import normalize
from smkd.device import autocast_type
from smkd.models.vit import block_numbers, patch_attention

MATCHES = 6
"""How many matches are drawn."""
NO_NETWORK = "Plain colours have no attention and no patches: give a network as --backbone to see them."


class SeenPatches(NamedTuple):
    """What a backbone makes of images, on the CPU.

    Attributes:
        patches: float32 [images, patches, dim], tokens of the deepest block that the features are read from, row by row
            of the grid.
        attention: float32 [images, patches], weights of the patches in that block's [CLS] row, heads averaged; of each
            image they sum to 1.
        grid: patches along a side; the images are square.
    """

    patches: Tensor
    attention: Tensor
    grid: int


class Match(NamedTuple):
    """A patch of the query and the patch of the support image that is most like it.

    Attributes:
        query, support: places of the patches, row by row of their grids.
        cosine: of their tokens.
        weight: attention of the query's [CLS] to its patch, from 0 to 1.
    """

    query: int
    support: int
    cosine: float
    weight: float


class Reasons(NamedTuple):
    """Pictures of an answer, and the matches that are drawn.

    Attributes:
        attention: attention of [CLS] over the query.
        matches: lines between patches of the query and of the nearest support photograph; None if no file of one is at
            hand.
        drawn: those matches, the largest contribution first.
        similarity: weighted sum of the cosines of all matches, from -1 to 1.
        caption: what `matches` shows.
    """

    attention: Image.Image
    matches: Image.Image | None
    drawn: list[Match]
    similarity: float
    caption: str

    @property
    def words(self) -> str:
        """What the matches say, in a sentence or two; empty without them."""
        if not self.drawn:
            return ""
        looked = 100 * sum(match.weight for match in self.drawn)
        cosines = "; ".join(f"{number}: {match.cosine:.2f}" for number, match in enumerate(self.drawn, start=1))
        return (
            f"The {len(self.drawn)} matches that add most to a patch-by-patch similarity of {self.similarity:.2f}, "
            f"which weighs each patch by its attention; these patches get {looked:.0f} % of it. Their cosines: "
            f"{cosines}."
        )


def reasons(lesson: Lesson, given: Answer) -> Reasons | None:
    """Pictures of why the query is like its nearest support photograph; None for a backbone of plain colours.

    Raises:
        DataError: one of the two can no longer be read.
    """
    encoder = lesson.encoder
    beside = next((each for each in given.neighbours if each.photo.path), None)
    pair = Pictures([given.photo.path, *([] if beside is None else [beside.photo.path])])
    images = [pair.load(number) for number in range(len(pair))]
    seen = see(encoder, images)
    if seen is None:
        return None
    squares = [central_square(image, encoder.config.resize, encoder.config.crop) for image in images]
    attention = attention_picture(squares[0], seen.attention[0], seen.grid)
    if beside is None:
        return Reasons(attention, None, [], 0.0, "")
    matches = match_patches(seen.patches[0], seen.patches[1], seen.attention[0])
    drawn = matches[:MATCHES]
    return Reasons(
        attention, matches_picture(squares[0], squares[1], drawn, seen.grid),
        drawn, sum(match.weight * match.cosine for match in matches),
        f"Patches of {given.photo.name} beside those of {beside.photo.name} ({beside.label}) that they match",
    )  # fmt: skip


@torch.inference_mode()
def see(encoder: Encoder, images: Sequence[Tensor]) -> SeenPatches | None:
    """Patch tokens and attention of images, from the pixels that also give their features.

    Args:
        encoder: its transform and its backbone.
        images: uint8 [3, height, width] each.

    Returns:
        None if there is no network, only plain colours.
    """
    if encoder.backbone is None:
        return None
    config = encoder.config
    pixels = torch.stack([resize_center_crop(image, config.resize, config.crop) for image in images])
    x = normalize(pixels.to(encoder.device).float() / 255, config.mean, config.std)
    autocast = autocast_type(config.precision, encoder.device)
    deepest = max(block_numbers(config.features.blocks, len(encoder.backbone.blocks)))
    with torch.autocast(encoder.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        (tokens,) = encoder.backbone.last_blocks(x, [deepest])
    patches = tokens.patches.float().cpu()
    assert tokens.attention is not None
    weights = patch_attention(tokens.attention.float().cpu(), patches.shape[1])
    return SeenPatches(patches, weights, config.crop // encoder.backbone.patch_size)


def match_patches(query: Tensor, support: Tensor, attention: Tensor) -> list[Match]:
    """For every patch of the query, the most similar patch of the support image, as phase 2 matches them in training.

        for N patch of the query: m = argmax_n cosine(support[n], query[N])

    (SMKD, section 3.3; `smkd.objectives.patch.match_paper`, with the query as the teacher's image.) The weighted sum
    of the cosines says how alike the images are, patch by patch; a match contributes its weight times its cosine.

    Args:
        query: patch tokens [patches of the query, dim].
        support: patch tokens [patches of the support image, dim].
        attention: weights of the query's patches [patches of the query].

    Returns:
        One match a patch of the query, the largest contribution first.
    """
    cosines, best = (F.normalize(query, dim=1) @ F.normalize(support, dim=1).T).max(dim=1)
    order = (attention * cosines).argsort(descending=True, stable=True)
    return [Match(int(n), int(best[n]), float(cosines[n]), float(attention[n])) for n in order]


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
