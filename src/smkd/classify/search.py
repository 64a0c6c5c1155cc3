"""Nearest images: the features of a folder, saved with their backbone, and a search by cosine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from smkd.classify.encoder import Encoder
from smkd.errors import CheckpointError, ConfigError
from smkd.fewshot.features import check_finite_rows
from smkd.files import expanded
from smkd.weights import smkd_file


@dataclass(frozen=True)
class ImageIndex:
    """Images that can be searched by an image.

    Attributes:
        encoder: makes the features of the indexed images and of the queries.
        features: float32 [images, dim].
        names: what each image is called, such as its path.
    """

    encoder: Encoder
    features: NDArray[np.float32]
    names: list[str]

    def search(self, query: NDArray[np.float32], top: int = 5) -> list[list[tuple[str, float]]]:
        """The nearest images of each feature.

        Args:
            query: float32 [queries, dim], as `encoder` makes them.
            top: how many to return; all if there are fewer.

        Returns:
            For each query, names with their cosines, nearest first.

        Raises:
            ConfigError: `top` is below 1.
            DataError: a query is not finite.
        """
        if top < 1:
            raise ConfigError(f"top={top}: should be 1 or more")
        check_finite_rows(query, "query")
        images, asked = (F.normalize(torch.from_numpy(part), dim=1) for part in (self.features, query))
        cosines, nearest = (asked @ images.T).topk(min(top, len(self.names)), dim=1)
        return [
            [(self.names[row], cosine) for row, cosine in zip(rows, values, strict=True)]
            for rows, values in zip(nearest.tolist(), cosines.tolist(), strict=True)
        ]

    def save(self, path: str | Path) -> None:
        """Write everything, the backbone included, into one file (`smkd.weights.smkd_file`).

        Raises:
            CheckpointError: it cannot be written.
        """
        settings, tensors = self.encoder.saved()
        tensors["features"] = torch.from_numpy(self.features)
        tensors["names"] = torch.from_numpy(_packed(self.names))
        smkd_file.write(expanded(path), smkd_file.INDEX, {"encoder": settings}, tensors)

    @staticmethod
    def load(path: str | Path, accelerator: str = "auto") -> ImageIndex:
        """Read what `save` wrote.

        Raises:
            CheckpointError: missing, cut short, or not an index.
            DataError: features that are not finite.
        """
        settings, tensors = smkd_file.read(expanded(path), smkd_file.INDEX)
        encoder = Encoder.restored(settings.get("encoder"), tensors, accelerator, str(path))
        features = smkd_file.tensor(tensors, "features", torch.float32, 2, path).numpy()
        packed = smkd_file.tensor(tensors, "names", torch.uint8, 1, path).numpy()
        names = [os.fsdecode(name) for name in packed.tobytes().split(b"\0")]
        if features.shape != (len(names), encoder.dim):
            raise CheckpointError(
                f"'{path}': features are {list(features.shape)}, expected {[len(names), encoder.dim]}; make it again"
            )
        check_finite_rows(features, f"'{path}'", lambda row: f"of '{names[row]}'")
        return ImageIndex(encoder, features, names)


def _packed(names: Sequence[str]) -> NDArray[np.uint8]:
    # a path may hold any bytes but this one
    return np.frombuffer(b"\0".join(os.fsencode(name) for name in names), np.uint8).copy()
