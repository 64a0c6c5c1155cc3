"""Why two images look alike to a backbone: where [CLS] attends, and which patches match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smkd.classify.encoder import Encoder
from smkd.data.color import normalize
from smkd.data.crops import resize_center_crop
from smkd.engine.device import autocast_type
from smkd.models.vit import patch_attention


class Seen(NamedTuple):
    """What a backbone makes of images, on the CPU.

    Attributes:
        patches: float32 [images, patches, dim], tokens of the last block, row by row of the grid.
        attention: float32 [images, patches], weights of the patches in the last block's [CLS] row, heads averaged; of
            each image they sum to 1.
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


@torch.inference_mode()
def see(encoder: Encoder, images: Sequence[Tensor]) -> Seen | None:
    """Patch tokens and attention of images, from the same pixels that their features come from.

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
    with torch.autocast(encoder.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        tokens = encoder.backbone(x, attention=True)
    patches = tokens.patches.float().cpu()
    weights = patch_attention(tokens.attention.float().cpu(), patches.shape[1])
    return Seen(patches, weights, config.crop // encoder.backbone.patch_size)


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
