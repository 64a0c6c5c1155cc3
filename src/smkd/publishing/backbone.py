"""A backbone to export: weights, settings, and the accuracies that its run recorded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from smkd.config import foreign_text, loading
from smkd.config.run_config import RunConfig
from smkd.errors import ConfigError
from smkd.models.vit import VisionTransformer
from smkd.weights import fetch, smkd_file
from smkd.weights.architecture import check_finite
from smkd.weights.smkd_file import BackboneInfo, Score


@dataclass(frozen=True)
class PublishedBackbone:
    """A backbone to be published.

    Attributes:
        backbone: in evaluation mode, on the CPU.
        about: all else; `about.config.model` describes the backbone.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """

    backbone: VisionTransformer
    about: BackboneInfo

    def __post_init__(self) -> None:
        check_finite(self.backbone.state_dict(), self.about.name)

    @property
    def config(self) -> RunConfig:
        """Of the run that the backbone comes from."""
        return self.about.config

    def at(self, image_size: int) -> PublishedBackbone:
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
        return PublishedBackbone(
            VisionTransformer.with_weights(config.model, weights), self.about.model_copy(update={"config": config})
        )


def without_paths(config: RunConfig) -> RunConfig:
    """Without paths of this machine, which mean nothing elsewhere; names on the Hub and addresses stay."""
    return loading.check(_without_paths(config.model_dump()))


def write_weights(release: PublishedBackbone, weights: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file whose header says all that is known of the backbone."""
    path.write_bytes(smkd_file.encoded(smkd_file.EXPORT, release.about.model_dump(mode="json"), weights))


def write_safetensors(release: PublishedBackbone, path: Path) -> None:
    """The backbone under this package's names."""
    write_weights(release, release.backbone.state_dict(), path)


def _without_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in values.items():
        if isinstance(value, dict):
            value = _without_paths(value)
        kept[key] = None if isinstance(value, Path) and not fetch.is_remote(str(value)) else value
    return kept


NO_ACCURACY = ("kind", "step", "time", "epoch", "accuracy")
"""What a validation's record holds besides an accuracy per number of shots."""


def run_of(file: Path) -> Path | None:
    """The run folder that a checkpoint is in; None if it is in none."""
    run = file.parent.parent
    return run if file.parent.name == "checkpoints" and (run / "config.yaml").is_file() else None


def found_scores(run: Path, config: RunConfig, *, digest: str, step: int) -> tuple[Score, ...]:
    """What was measured with one checkpoint of a run.

    Args:
        run: its folder. Validations are in `metrics.jsonl`; evaluations are the files of `smkd eval --json` in the
            folder or one below it, as far as they were made from this checkpoint.
        config: of the run.
        digest: SHA-256 of the checkpoint's file.
        step: of the checkpoint.
    """
    scores = [*_validations(run / "metrics.jsonl", config, step), *_evaluations(run, digest)]
    return tuple(dict.fromkeys(scores))


def _validations(file: Path, config: RunConfig, step: int) -> Iterator[Score]:
    protocol = config.validation
    conditions = f"{protocol.head}, {_queries(protocol.query)}, {protocol.episodes} episodes, " + (
        f"resize {protocol.resize}, crop {protocol.crop}"
    )
    for _, record in foreign_text.json_records(file) if file.is_file() else ():
        if record is not None and record.get("kind") == "validation" and record.get("step") == step:
            for name, value in record.items():
                if name not in NO_ACCURACY and _is_number(value):
                    yield Score(name, float(value), None, config.data.name, protocol.split, conditions)


def _evaluations(run: Path, digest: str) -> Iterator[Score]:
    for file in sorted([*run.glob("*.json"), *run.glob("*/*.json")]):
        results = _object(file.read_text(encoding="utf-8", errors="replace")).get("results")
        for record in results if isinstance(results, list) else ():
            if isinstance(record, dict) and record.get("checkpoint_sha256") == digest:
                if not all(_is_number(record.get(key)) for key in ("way", "shot", "mean", "ci95")):
                    continue
                conditions = f"{record.get('head')}, {_queries(record.get('query'))}, " + (
                    f"{record.get('episodes')} episodes, {record.get('transform')}"
                )
                yield Score(
                    f"{record['way']}-way {record['shot']}-shot", float(record["mean"]), float(record["ci95"]),
                    str(record.get("dataset")), str(record.get("split")), conditions,
                )  # fmt: skip


def _queries(query: object) -> str:
    return "all other images as queries" if query == "all" else f"{query} queries a class"


def _object(text: str) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    try:
        value = foreign_text.parsed(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
