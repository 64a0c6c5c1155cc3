"""A backbone as a graph that can become a program: pixels in, features and tokens out.

Normalisation and pooling are part of the graph, so its features are the rows that `smkd features` writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from smkd.data.color import normalize
from smkd.data.datasets import configured_spec
from smkd.models.vit import Tokens, VisionTransformer, block_numbers
from smkd.publishing.backbone import PublishedBackbone
from smkd.publishing.program import INPUT, Computation

Pool = Callable[[list[Tokens]], Tensor]
"""Features [images, dim] from the tokens of the configured blocks."""
OUTPUTS = ("features", "cls", "patch_tokens")
TORCH_CUBIC = -0.75
"""Parameter of the bicubic kernel that `torch.nn.functional.interpolate` has."""


def feature_program(release: PublishedBackbone, pool: Pool, *, dynamic_size: bool) -> Computation:
    """What a backbone computes, for images of the evaluation's size, or of any size of whole patches."""
    model, crop = release.config.model, release.config.evaluation.crop
    sizes, patch = [(crop, crop)], model.patch_size
    if dynamic_size:
        sizes += [(model.image_size, model.image_size), (crop + 3 * patch, crop + patch)]
    graph = FeatureGraph(release, pool)
    return Computation(
        graph=graph,
        traceable=FeatureGraph(release, pool, any_size=True) if dynamic_size and not model.rotary else graph,
        outputs=OUTPUTS, about=_about(release, dynamic_size=dynamic_size), sizes=tuple(dict.fromkeys(sizes)),
        step=patch if dynamic_size else None,
    )  # fmt: skip


class FeatureGraph(nn.Module):
    """From pixels to features.

    Args:
        release: the backbone, and how images are normalised.
        pool: what makes features of the tokens of `config.features.blocks`.
        any_size: interpolate positions in the program, for sizes that are not known yet.
    """

    def __init__(self, release: PublishedBackbone, pool: Pool, *, any_size: bool = False) -> None:
        super().__init__()
        spec = configured_spec(release.config.data)
        self.mean, self.std = spec.mean, spec.std
        self.blocks, self.pool = feature_blocks(release), pool
        self.backbone = any_size_backbone(release) if any_size else release.backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features and the last block's tokens after the final norm.

        Args:
            images: uint8 [images, 3, height, width], RGB.

        Returns:
            [images, dim], [images, embed_dim] and [images, patches, embed_dim], float32.
        """
        last = len(self.backbone.blocks)
        asked = [*self.blocks, *[last] * (last not in self.blocks)]
        found = self.backbone.last_blocks(normalize(images.float() / 255, self.mean, self.std), asked)
        end = found[asked.index(last)]
        return self.pool(found[: len(self.blocks)]), end.cls, end.patches


def feature_blocks(release: PublishedBackbone) -> list[int]:
    """Blocks of the features, counted from 1."""
    return block_numbers(release.config.features.blocks, len(release.backbone.blocks))


class AnySizeVisionTransformer(VisionTransformer):
    """The backbone with its positions as matrix products, in which height and width may stay symbols."""

    def positions(self, height: int, width: int) -> Tensor:
        """See `VisionTransformer.positions`; equal up to rounding."""
        rows, columns = height // self.patch_size, width // self.patch_size
        is_native = (_number(height) == _number(width)) & (_number(rows * columns) == self.grid**2)
        stored = self.pos_embed[0, 1:].unflatten(0, (self.grid, self.grid))
        by_row, by_column = (resampling(count, self.grid, is_native) for count in (rows, columns))
        grid = torch.einsum("ri,cj,ijd->rcd", by_row, by_column, stored)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(0, 1)[None]], dim=1)


def resampling(count: int, side: int, is_native: Tensor) -> Tensor:
    """Weights that make `count` positions of `side` stored ones, [count, side]: bicubic, the nearest repeated outside.

    The scale is (count + 0.1) / side, or 1 where `is_native`, which leaves the stored ones as they are.
    """
    scale = torch.where(is_native, 1.0, side / (_number(count) + 0.1))
    place = (torch.arange(count) + 0.5) * scale - 0.5
    below = place.floor()
    weights = torch.zeros(count, side)
    for offset in (-1, 0, 1, 2):
        source = (below + offset).clamp(0, side - 1)
        weights = weights + _cubic((place - below - offset).abs())[:, None] * (source[:, None] == torch.arange(side))
    return weights


def _cubic(distance: Tensor) -> Tensor:
    near = ((TORCH_CUBIC + 2) * distance - (TORCH_CUBIC + 3)) * distance**2 + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * TORCH_CUBIC
    return torch.where(distance <= 1, near, far)


def _number(value: int) -> Tensor:
    return torch.scalar_tensor(value, dtype=torch.float32)


def any_size_backbone(release: PublishedBackbone) -> VisionTransformer:
    """The backbone with positions for any size."""
    return AnySizeVisionTransformer.with_weights(release.config.model, release.backbone.state_dict())


def _about(release: PublishedBackbone, *, dynamic_size: bool) -> dict[str, Any]:
    """What a caller of the program has to know, as plain values."""
    protocol, spec = release.config.evaluation, configured_spec(release.config.data)
    sides = ["height", "width"] if dynamic_size else [protocol.crop, protocol.crop]
    return {
        "input": f"{INPUT}: uint8 RGB [batch, 3, {sides[0]}, {sides[1]}]; normalised inside",
        "outputs": f"{', '.join(OUTPUTS)}: float32",
        "resize": protocol.resize, "crop": protocol.crop, "interpolation": "bicubic",
        "patch_size": release.config.model.patch_size, "mean": list(spec.mean), "std": list(spec.std),
        "features": list(release.config.features.parts), "feature_blocks": feature_blocks(release),
        **release.about.model_dump(mode="json"),
    }  # fmt: skip
