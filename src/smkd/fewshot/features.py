"""Features of images from a backbone: tokens of the last blocks, each part L2-normalised, concatenated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smkd.config.schema import FeaturesConfig
from smkd.data.color import normalize
from smkd.data.crops import resize_center_crop
from smkd.data.datasets import DatasetSpec, Images
from smkd.data.loader import batches
from smkd.errors import DataError
from smkd.models.vit import Tokens, VisionTransformer, patch_attention

NORM_EPS = 1e-12


@dataclass(frozen=True)
class Features:
    """Features of one split.

    Attributes:
        values: float32 [images, dim].
        labels: int64 [images].
        class_names: name of each label.
        skipped: unreadable images that were left out.
    """

    values: Tensor
    labels: NDArray[np.int64]
    class_names: list[str]
    skipped: int = 0


def pool(blocks: list[Tokens], config: FeaturesConfig) -> Tensor:
    """Feature vectors from the tokens of the last blocks.

    For each part in turn, for each block (earlier first): [CLS], the patches' mean, or their mean weighted by the
    same block's [CLS] attention; L2-normalised by itself. The concatenation is not normalised again.

    Args:
        blocks: tokens with attention, as `VisionTransformer.last_blocks` gives them.
        config: which parts.

    Returns:
        [images, parts * blocks * dim].
    """
    vectors = [F.normalize(_part(part, tokens), dim=-1, eps=NORM_EPS) for part in config.parts for tokens in blocks]
    return torch.cat(vectors, dim=-1)


def _part(part: str, tokens: Tokens) -> Tensor:
    if part == "cls":
        return tokens.cls
    if part == "mean":
        return tokens.patches.mean(dim=1)
    assert tokens.attention is not None
    weights = patch_attention(tokens.attention, tokens.patches.shape[1])
    return torch.einsum("bp,bpd->bd", weights.to(tokens.patches.dtype), tokens.patches)


@torch.inference_mode()
def extract(
    backbone: VisionTransformer, images: Images, spec: DatasetSpec, config: FeaturesConfig, *,
    resize: int, crop: int, device: torch.device, autocast: torch.dtype | None = None, batch_size: int = 128,
    num_workers: int = 0, on_error: str = "raise",
) -> Features:  # fmt: skip
    """Features of every image of a split, in order.

    Args:
        backbone: in evaluation mode, on `device`.
        images: the split.
        spec: its normalisation.
        config: pooling.
        resize: shorter side in pixels before the centre crop of side `crop`.
        autocast: type for autocast, or None for float32.
        on_error: 'raise', or 'skip' to leave unreadable images out.

    Raises:
        DataError: an unreadable image, with 'raise'.
    """

    def encode(pixels: Tensor) -> Tensor:
        x = normalize(pixels.to(device).float() / 255, spec.mean, spec.std)
        with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            blocks = backbone.last_blocks(x, config.blocks)
        blocks = [Tokens(*(None if part is None else part.float() for part in tokens)) for tokens in blocks]  # type: ignore[arg-type]
        return pool(blocks, config).cpu()

    return _encoded(images, _CenterCrops(images, resize, crop, on_error), encode, batch_size, num_workers)


def pixel_features(images: Images, *, side: int = 16, on_error: str = "raise") -> Features:
    """The floor to compare with: colours of a small square, `side` x `side` x 3 numbers an image."""

    def encode(pixels: Tensor) -> Tensor:
        return pixels.flatten(1).float() / 255 - 0.5

    return _encoded(images, _CenterCrops(images, side, side, on_error), encode)


def _encoded(
    images: Images, crops: _CenterCrops, encode: Callable[[Tensor], Tensor], batch_size: int = 128, num_workers: int = 0
) -> Features:
    """Features of all images that can be read."""
    loader: DataLoader[tuple[Tensor | None, int]] = DataLoader(
        crops, batch_size=batch_size, num_workers=num_workers, collate_fn=_collate
    )
    values, kept = [], []
    for pixels, indices in batches(loader):
        if len(indices):
            values.append(encode(pixels))
            kept.append(indices)
    if not kept:
        raise DataError("not one image of the split can be read")
    chosen = torch.cat(kept).numpy()
    return Features(torch.cat(values), images.labels[chosen], images.class_names, len(images) - len(chosen))


class _CenterCrops(Dataset[tuple[Tensor | None, int]]):
    def __init__(self, images: Images, resize: int, crop: int, on_error: str) -> None:
        self.images, self.resize, self.crop, self.on_error = images, resize, crop, on_error

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int]:
        try:
            return resize_center_crop(self.images.load(index), self.resize, self.crop), index
        except DataError as error:
            if self.on_error == "raise":
                raise DataError(f"{error} (data.on_error=skip goes on without it)") from error
            return None, index


def _collate(samples: list[tuple[Tensor | None, int]]) -> tuple[Tensor, Tensor]:
    read = [(image, index) for image, index in samples if image is not None]
    if not read:
        return torch.empty(0), torch.empty(0, dtype=torch.long)
    return torch.stack([image for image, _ in read]), torch.tensor([index for _, index in read])
