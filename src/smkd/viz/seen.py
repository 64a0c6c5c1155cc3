"""What a backbone makes of the patches of images: where [CLS] attends, and which patches of two images match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smkd.classify.encoder import Encoder
from smkd.data.augment import resize_center_crop
from smkd.data.color import normalize
from smkd.device import autocast_type
from smkd.models.vit import block_numbers, patch_attention

MASS = 0.6
"""Share of the attention that the authors' pictures show."""


class SeenPatches(NamedTuple):
    """What a backbone makes of images, on the CPU.

    Attributes:
        patches: float32 [images, patches, dim], tokens of the deepest block that the features are read from, row by row
            of the grid.
        attention: float32 [images, patches], weights of the patches in that block's [CLS] row, heads averaged; of each
            image they sum to 1.
        grid: patches along a side; the images are square.
        heads: float32 [images, heads, patches], the same of each head.
    """

    patches: Tensor
    attention: Tensor
    grid: int
    heads: Tensor


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
    patches = tokens.patches.float().cpu()  # [images, patches, dim]
    assert tokens.attention is not None
    row = tokens.attention.float().cpu()  # [images, heads, 1 + registers + patches]
    heads = patch_attention(row.flatten(0, 1)[:, None], patches.shape[1]).unflatten(0, row.shape[:2])
    return SeenPatches(
        patches, patch_attention(row, patches.shape[1]), config.crop // encoder.backbone.patch_size, heads
    )


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


def holding(attention: Tensor, mass: float = MASS) -> Tensor:
    """Which patches hold most of the attention: as few as have this share of it, bool as `attention`.

    The same as the thresholded maps of DINO and of the authors of SMKD, who sort by weight and cut the lowest ones,
    whose sum is at most 1 - mass.

    Args:
        attention: weights [..., patches] that sum to 1.
        mass: share from 0 to 1.
    """
    values, order = attention.sort(dim=-1, stable=True)  # ascending
    kept = values.cumsum(dim=-1) > 1 - mass
    return torch.empty_like(kept).scatter_(-1, order, kept)
