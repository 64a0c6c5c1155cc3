"""Accuracy over episodes with its 95 % interval and the protocol it was measured by."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from smkd.config.schema import ProtocolConfig, RunConfig
from smkd.data.datasets import Images, configured_spec, open_split, open_validation
from smkd.data.loader import worker_count
from smkd.engine.device import autocast_type
from smkd.fewshot.episodes import Members, check_sizes, draw
from smkd.fewshot.features import Features, Stream, backbone_stream
from smkd.fewshot.heads import Head, make_head
from smkd.fewshot.predictions import count_predictions
from smkd.models.vit import VisionTransformer


@dataclass(frozen=True)
class Result:
    """Accuracy in percent, mean and half width of its 95 % interval, with the protocol."""

    way: int
    shot: int
    query: int | str
    episodes: int
    seed: int
    head: str
    transductive: bool
    split: str
    mean: float
    ci95: float
    query_dirichlet: float | None = None
    skipped: int = 0
    """Unreadable images that were left out."""
    class_names: list[str] = field(default_factory=list, repr=False)
    classes: Tensor = field(default_factory=lambda: torch.empty(0, 0), repr=False, compare=False)
    """int64 [episodes, way]: the class of each way."""
    counts: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0), repr=False, compare=False)
    """int64 [episodes, way, way]: queries by the way they are of and the way they are given."""

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.ci95:.2f}"

    @property
    def accuracies(self) -> Tensor:
        """Percent of the queries of each episode that are right, float64 [episodes]."""
        return accuracies(self.counts)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        long = ("class_names", "classes", "counts")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in long}


def accuracies(counts: Tensor) -> Tensor:
    """Percent of the queries of each episode that are right, float64 [episodes], from counts [episodes, way, way]."""
    right = counts.diagonal(dim1=1, dim2=2).sum(dim=1).double()
    return 100 * right / counts.sum(dim=(1, 2))


def summary(values: Tensor) -> tuple[float, float]:
    """Mean and 1.96 standard errors (population standard deviation) of per-episode values."""
    spread = float(values.std(correction=0))
    return float(values.mean()), 1.96 * spread / math.sqrt(len(values))


def evaluate_features(features: Features, protocol: ProtocolConfig, base_mean: Tensor | None = None) -> list[Result]:
    """One result for each number of shots.

    Args:
        features: of one split; heads work on the device of its values.
        protocol: ways, shots, queries, episodes, seed and head.
        base_mean: [dim] mean feature of the training classes, for heads that want it.

    Raises:
        DataError: the split has too few classes or images for the protocol.
        ConfigError: unknown head or option.
    """
    head = make_head(protocol.head, base_mean)
    return [measure(features, protocol, shot, head) for shot in protocol.shots]


def measure(features: Features, protocol: ProtocolConfig, shot: int, head: Head) -> Result:
    """Result of a head for one number of shots; `protocol.head` is only its name."""
    members = Members(features.labels, len(features.class_names))
    sizes = {"way": protocol.way, "shot": shot, "query": protocol.query, "dirichlet": protocol.query_dirichlet}
    check_sizes(members.sizes.numpy(), features.class_names, **sizes)  # type: ignore[arg-type]
    episodes = draw(members, episodes=protocol.episodes, seed=protocol.seed, **sizes)  # type: ignore[arg-type]
    counts = count_predictions(features.values, members, episodes, head, protocol.seed)
    mean, ci95 = summary(accuracies(counts))
    return Result(
        way=protocol.way, shot=shot, query=protocol.query, episodes=protocol.episodes, seed=protocol.seed,
        head=protocol.head, transductive=getattr(head, "transductive", False), split=protocol.split, mean=mean,
        ci95=ci95, query_dirichlet=protocol.query_dirichlet, skipped=features.skipped,
        class_names=features.class_names, classes=episodes.classes, counts=counts,
    )  # fmt: skip


def backbone_features(
    backbone: VisionTransformer, config: RunConfig, protocol: ProtocolConfig, device: torch.device,
    images: Images | None = None,
) -> Stream:  # fmt: skip
    """Features of the protocol's split, or of other images."""
    images = open_split(config.data, protocol.split) if images is None else images
    return backbone_stream(
        backbone, images, configured_spec(config.data), config.features,
        resize=protocol.resize, crop=protocol.crop, device=device, on_error=config.data.on_error,
        autocast=autocast_type(config.precision, device), num_workers=worker_count(config, device),
    )  # fmt: skip


class FewShotValidation:
    """Evaluator for the training loop: accuracy per number of shots on validation classes."""

    def check(self, config: RunConfig) -> None:
        """Raise `SmkdError` if the head is unknown or the validation split lacks classes or images for it."""
        images, protocol = open_validation(config), config.validation
        make_head(protocol.head)
        sizes = Members(images.labels, len(images.class_names)).sizes.numpy()
        for shot in protocol.shots:
            check_sizes(
                sizes, images.class_names, way=protocol.way, shot=shot, query=protocol.query,
                dirichlet=protocol.query_dirichlet,
            )  # fmt: skip

    def measure(self, backbone: VisionTransformer, config: RunConfig, device: torch.device) -> dict[str, float]:
        """Accuracy in percent: the mean over the numbers of shots, which selects, and each of them."""
        features = backbone_features(backbone, config, config.validation, device, open_validation(config)).collect()
        results = evaluate_features(features, config.validation)
        mean = sum(r.mean for r in results) / len(results)
        return {"accuracy": mean, **{f"{r.way}-way {r.shot}-shot": r.mean for r in results}}
