"""Accuracy over episodes with its 95 % interval and the protocol it was measured by."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from smkd.config.schema import ProtocolConfig, RunConfig
from smkd.data.datasets import dataset_spec, open_split
from smkd.data.loader import worker_count
from smkd.engine.device import autocast_type
from smkd.fewshot import heads
from smkd.fewshot.episodes import Episodes, check_sizes, draw
from smkd.fewshot.features import Features, extract
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
    split: str
    mean: float
    ci95: float
    skipped: int = 0
    """Unreadable images that were left out."""

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.ci95:.2f}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def episode_accuracies(features: Tensor, episodes: Episodes, head: str, neighbours: int = 5) -> Tensor:
    """Accuracy of each episode in percent, float64 [episodes].

    Args:
        features: [images, dim].
        episodes: rows of `features`.
        head: 'prototype' or 'knn'.
        neighbours: voters of knn.
    """
    way = episodes.support.shape[1]
    rows = episodes.query.flatten(1)
    support, query = features[episodes.support], features[rows.clamp(min=0)]
    scores = heads.prototype(support, query) if head == "prototype" else heads.knn(support, query, neighbours)
    truth = torch.arange(way).repeat_interleave(episodes.query.shape[2])
    counted = rows >= 0
    right = (scores.argmax(dim=-1).cpu() == truth) & counted
    return 100 * right.sum(dim=1).double() / counted.sum(dim=1)


def summary(accuracies: Tensor) -> tuple[float, float]:
    """Mean and 1.96 standard errors (population standard deviation) of per-episode accuracies."""
    spread = float(accuracies.std(correction=0))
    return float(accuracies.mean()), 1.96 * spread / math.sqrt(len(accuracies))


def evaluate_features(features: Features, protocol: ProtocolConfig) -> list[Result]:
    """One result for each number of shots.

    Args:
        features: of one split.
        protocol: ways, shots, queries, episodes, seed and head.

    Raises:
        DataError: the split has too few classes or images for the protocol.
    """
    return [_evaluate_shot(features, protocol, shot) for shot in protocol.shots]


def _evaluate_shot(features: Features, protocol: ProtocolConfig, shot: int) -> Result:
    drawn: Iterable[Episodes] = draw(
        features.labels, features.class_names, way=protocol.way, shot=shot, query=protocol.query,
        episodes=protocol.episodes, seed=protocol.seed,
    )  # fmt: skip
    accuracies = [episode_accuracies(features.values, part, protocol.head, protocol.neighbours) for part in drawn]
    mean, ci95 = summary(torch.cat(accuracies))
    return Result(
        way=protocol.way, shot=shot, query=protocol.query, episodes=protocol.episodes, seed=protocol.seed,
        head=protocol.head, split=protocol.split, mean=mean, ci95=ci95, skipped=features.skipped,
    )  # fmt: skip


def evaluate_backbone(
    backbone: VisionTransformer, config: RunConfig, protocol: ProtocolConfig, device: torch.device
) -> list[Result]:
    """Features of the protocol's split, then its accuracies."""
    features = extract(
        backbone, open_split(config.data, protocol.split), dataset_spec(config.data.dataset), config.features,
        resize=protocol.resize, crop=protocol.crop, device=device, on_error=config.data.on_error,
        autocast=autocast_type(config.precision, device), num_workers=worker_count(config, device),
    )  # fmt: skip
    return evaluate_features(features, protocol)


class FewShotValidation:
    """Evaluator for the training loop: accuracy per number of shots on validation classes."""

    def check(self, config: RunConfig) -> None:
        """Raise `DataError` if the validation split lacks classes or images for its protocol."""
        images, protocol = open_split(config.data, config.validation.split), config.validation
        for shot in protocol.shots:
            check_sizes(images.labels, images.class_names, way=protocol.way, shot=shot, query=protocol.query)

    def measure(self, backbone: VisionTransformer, config: RunConfig, device: torch.device) -> dict[str, float]:
        """Accuracy in percent: the mean over the numbers of shots, which selects, and each of them."""
        results = evaluate_backbone(backbone, config, config.validation, device)
        mean = sum(r.mean for r in results) / len(results)
        return {"accuracy": mean, **{f"{r.way}-way {r.shot}-shot": r.mean for r in results}}
