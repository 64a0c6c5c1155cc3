"""A backbone on its way out, with all that is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from smkd.config import loading
from smkd.config.schema import ModelConfig, RunConfig
from smkd.errors import ConfigError
from smkd.interop import fetching, header
from smkd.interop.header import Settings
from smkd.models.finite import check_finite
from smkd.models.vit import VisionTransformer


@dataclass(frozen=True)
class Release:
    """A backbone to be published.

    Attributes:
        backbone: in evaluation mode, on the CPU.
        about: all else; `about.config.model` describes the backbone.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """

    backbone: VisionTransformer
    about: Settings

    def __post_init__(self) -> None:
        check_finite(self.backbone.state_dict(), self.about.name)

    @property
    def config(self) -> RunConfig:
        """Of the run that the backbone comes from."""
        return self.about.config

    def at(self, image_size: int) -> Release:
        """The same for square images of another side in pixels: stored positions are interpolated once and for all.

        Raises:
            ConfigError: not whole patches.
        """
        patch, protocol = self.config.model.patch_size, self.config.evaluation
        if image_size % patch:
            near = max(patch, image_size - image_size % patch)
            raise ConfigError(f"--image-size {image_size} is no whole number of patches of {patch}; use {near}")
        sizes = {"crop": image_size, "resize": round(image_size * protocol.resize / protocol.crop)}
        config = loading.changed(self.config, {"model": {"image_size": image_size}, "evaluation": sizes})
        weights = dict(self.backbone.state_dict())
        if "pos_embed" in weights:
            weights["pos_embed"] = self.backbone.positions(image_size, image_size).detach()
        return Release(built(config.model, weights), self.about.model_copy(update={"config": config}))


def built(config: ModelConfig, weights: Mapping[str, Tensor]) -> VisionTransformer:
    """A configured backbone with these weights, in evaluation mode."""
    backbone = VisionTransformer.from_config(config, mask_token="mask_token" in weights)
    backbone.load_state_dict(dict(weights))
    return backbone.eval()


def without_paths(config: RunConfig) -> RunConfig:
    """Without paths of this machine, which mean nothing elsewhere; names on the Hub and addresses stay."""
    return loading.check(_without_paths(config.model_dump()))


def write_weights(release: Release, weights: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file whose header says all that is known of the backbone."""
    kept = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    path.write_bytes(safetensors.torch.save(kept, header.metadata(release.about)))


def write_safetensors(release: Release, path: Path) -> None:
    """The backbone under this package's names."""
    write_weights(release, release.backbone.state_dict(), path)


def _without_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in values.items():
        if isinstance(value, dict):
            value = _without_paths(value)
        kept[key] = None if isinstance(value, Path) and not fetching.is_remote(str(value)) else value
    return kept
