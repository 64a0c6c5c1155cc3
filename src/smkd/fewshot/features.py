"""Features of images from a backbone: tokens of the last blocks, each part L2-normalised, concatenated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

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
from smkd.data.processes import deaths_named, end_with_parent
from smkd.errors import DataError
from smkd.models.vit import Tokens, VisionTransformer, patch_attention

NORM_EPS = 1e-12
PIXEL_SIDE = 16
BATCH, CPU_BATCH = 128, 32
"""Images at once; on a CPU as many as its caches hold the activations of."""


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


class Stream:
    """Features of a split, batch by batch.

    Attributes:
        images: the split.
        dim: numbers of a feature.
    """

    def __init__(
        self, images: Images, encode: Callable[[Tensor], Tensor], dim: int, *, resize: int, crop: int, on_error: str,
        batch_size: int = BATCH, num_workers: int = 0,
    ) -> None:  # fmt: skip
        self.images, self.encode, self.dim = images, encode, dim
        self.loader: DataLoader[tuple[Tensor | None, int]] = DataLoader(
            _CenterCrops(images, resize, crop, on_error), batch_size=batch_size, num_workers=num_workers,
            collate_fn=_collate, worker_init_fn=end_with_parent,
        )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """Float32 [n, dim] and labels [n] of the images that can be read, in order.

        Raises:
            DataError: an unreadable image, with `on_error='raise'`.
        """
        with deaths_named():
            for pixels, indices in batches(self.loader):
                if len(indices):
                    with torch.inference_mode():
                        values = self.encode(pixels)
                    yield values, self.images.labels[indices.numpy()]

    def collect(self) -> Features:
        """All of them; raises `DataError` if there is none."""
        parts = list(self)
        if not parts:
            raise DataError("not one image of the split can be read")
        labels = np.concatenate([part[1] for part in parts])
        return Features(
            torch.cat([part[0] for part in parts]), labels, self.images.class_names, len(self.images) - len(labels)
        )


def backbone_stream(
    backbone: VisionTransformer, images: Images, spec: DatasetSpec, config: FeaturesConfig, *,
    resize: int, crop: int, device: torch.device, autocast: torch.dtype | None = None, num_workers: int = 0,
    on_error: str = "raise",
) -> Stream:  # fmt: skip
    """Features of every image of a split, in order.

    Args:
        backbone: in evaluation mode, on `device`.
        images: the split.
        spec: its normalisation.
        config: pooling.
        resize: shorter side in pixels before the centre crop of side `crop`.
        autocast: type for autocast, or None for float32.
        on_error: 'raise', or 'skip' to leave unreadable images out.
    """

    def encode(pixels: Tensor) -> Tensor:
        x = normalize(pixels.to(device).float() / 255, spec.mean, spec.std)
        with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            blocks = backbone.last_blocks(x, config.blocks)
        blocks = [Tokens(*(None if part is None else part.float() for part in tokens)) for tokens in blocks]  # type: ignore[arg-type]
        return pool(blocks, config).cpu()

    dim = backbone.embed_dim * config.blocks * len(config.parts)
    return Stream(
        images, encode, dim, resize=resize, crop=crop, on_error=on_error, num_workers=num_workers,
        batch_size=CPU_BATCH if device.type == "cpu" else BATCH,
    )  # fmt: skip


def pixel_stream(images: Images, *, side: int = PIXEL_SIDE, on_error: str = "raise") -> Stream:
    """The floor to compare with: colours of a small square, `side` x `side` x 3 numbers an image."""

    def encode(pixels: Tensor) -> Tensor:
        return pixels.flatten(1).float() / 255 - 0.5

    return Stream(images, encode, 3 * side * side, resize=side, crop=side, on_error=on_error)


def concatenated(parts: Sequence[Features]) -> Features:
    """Features of several networks side by side, of the same images in the same order.

    Raises:
        DataError: other images, labels or classes.
    """
    first = parts[0]
    for other in parts[1:]:
        check_same_images(first, other)
    return replace(first, values=torch.cat([part.values for part in parts], dim=1))


def check_same_images(first: Features, second: Features) -> None:
    """Raise `DataError` unless two sets of features have the same labels, row by row, and the same class names."""
    if len(first.labels) != len(second.labels):
        raise DataError(
            f"these are not features of the same images: {len(first.labels)} rows and {len(second.labels)} rows"
        )
    if first.class_names != second.class_names:
        wrong = next(
            (f"'{a}' and '{b}'" for a, b in zip(first.class_names, second.class_names, strict=False) if a != b),
            f"{len(first.class_names)} and {len(second.class_names)} classes",
        )
        raise DataError(f"these are not features of the same classes: {wrong}")
    different = np.flatnonzero(first.labels != second.labels)
    if len(different):
        raise DataError(f"these are not features of the same images: labels differ from row {different[0]} on")


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
