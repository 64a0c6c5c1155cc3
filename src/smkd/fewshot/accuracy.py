"""Accuracy over episodes with its 95 % interval and the protocol it was measured by; two of them compared."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from smkd.config.loading import check_protocol
from smkd.config.protocol import ProtocolConfig
from smkd.errors import DataError
from smkd.fewshot.episodes import Members, Shape, draw, large_enough, too_small
from smkd.fewshot.features import Features, as_features, plain
from smkd.fewshot.head import Head
from smkd.fewshot.heads import make_head
from smkd.fewshot.scoring import count_predictions


class Preset(NamedTuple):
    """Queries per class and number of episodes.

    Attributes:
        classifier_episodes: episodes of the SGD classifier, which the authors run less often.
    """

    query: int | str
    episodes: int
    classifier_episodes: int


PRESETS = {
    # the authors of SMKD: every image outside the support is a query
    "paper": Preset("all", 10_000, 1_000),
    # 15 queries, as most papers since 2018
    "standard": Preset(15, 10_000, 10_000),
    # as papers up to 2019 did (Chen et al., ICLR 2019)
    "fair600": Preset(15, 600, 600),
}


def with_preset(protocol: ProtocolConfig, name: str) -> ProtocolConfig:
    """The protocol with a preset's queries and episodes, which depend on its head."""
    preset = PRESETS[name]
    is_classifier = protocol.head.partition(":")[0] == "classifier"
    changes: dict[str, Any] = {
        "query": preset.query,
        "episodes": preset.classifier_episodes if is_classifier else preset.episodes,
    }
    return protocol.model_copy(update=changes)


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
    without: str = ""
    """Classes that no episode has because they are too small, and why, in a sentence; nothing if there are none."""
    class_names: list[str] = field(default_factory=list, repr=False)
    """Of the classes that episodes are drawn from."""
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


def measure(features: Features, protocol: ProtocolConfig, shot: int, head: Head, what: str = "") -> Result:
    """Result of a head for one number of shots; `protocol.head` is only its name.

    Args:
        features, protocol, shot, head: see `evaluate_features`.
        what: the features are, for messages; empty for the protocol's split.

    Raises:
        DataError: too few classes or images for the protocol.
    """
    shape = shape_of(protocol, shot)
    members = Members(features.labels, len(features.class_names))
    names, sizes = features.class_names, members.sizes.numpy()
    kept = large_enough(sizes, names, shape, what=what or f"the {protocol.split} split")
    without = ""
    if len(kept) < len(sizes):
        without = too_small(sizes, names, shape)
        members, names = members.of(kept), [names[label] for label in kept]
    episodes = draw(members, shape, episodes=protocol.episodes, seed=protocol.seed)
    counts = count_predictions(features.values, members, episodes, head, protocol.seed)
    mean, ci95 = summary(accuracies(counts))
    return Result(
        way=shape.way, shot=shape.shot, query=shape.query, episodes=protocol.episodes, seed=protocol.seed,
        head=protocol.head, transductive=getattr(head, "transductive", False), split=protocol.split, mean=mean,
        ci95=ci95, query_dirichlet=shape.dirichlet, skipped=features.skipped, without=without, class_names=names,
        classes=episodes.classes, counts=counts,
    )  # fmt: skip


def shape_of(protocol: ProtocolConfig, shot: int) -> Shape:
    """The shape of the protocol's episodes with one number of shots."""
    return Shape(protocol.way, shot, protocol.query, protocol.query_dirichlet)


def evaluate(
    features: Any, labels: Any, *, head: str | Head = "prototype", way: int = 5, shot: int = 1, query: int | str = 15,
    episodes: int = 10_000, seed: int = 0, query_dirichlet: float | None = None, base_features: Any = None,
) -> Result:  # fmt: skip
    """Few-shot accuracy of features, with its 95 % interval.

    >>> import numpy as np
    >>> from smkd import fewshot
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(["ant", "bee", "cat", "dog", "eel", "fox"], 30)
    >>> features = rng.normal(size=(180, 16)) + 2.0 * np.repeat(rng.normal(size=(6, 16)), 30, axis=0)
    >>> result = fewshot.evaluate(features, labels, head="prototype", way=5, shot=1, episodes=600)
    >>> result.mean > 90, result.ci95 < 1, len(result.accuracies)
    (True, True, 600)

    Args:
        features: floats [images, dim]: an array, a tensor, a list of rows or a frame; heads work on the device of a
            tensor.
        labels: [images], integers or text: an array, a tensor, a list, a Series or a frame of one column.
        head: name with options as in 'knn:neighbours=3', or any callable as `smkd.fewshot.head` describes.
        way: classes per episode.
        shot: support images of each class.
        query: queries per class, or 'all' for every image outside the support.
        episodes: how many.
        seed: same seed, same episodes.
        query_dirichlet: concentration of unbalanced queries; None for equally many of each way.
        base_features: [images, dim] of the training classes, which 'simpleshot:transform=cl2n' needs.

    Returns:
        The result. A warning and `Result.without` name classes that are left out because they are too small.

    Raises:
        DataError: features that are not finite or do not match the labels; too few classes or images.
        ConfigError: unknown head, or an option or number that does not fit.
    """
    protocol = check_protocol(
        way=way, shots=(shot,), query=query, episodes=episodes, seed=seed, query_dirichlet=query_dirichlet,
        head=head if isinstance(head, str) else getattr(head, "__name__", type(head).__name__),
    )  # fmt: skip
    checked = as_features(features, labels)
    mean = None if base_features is None else _base_mean(base_features)
    made = make_head(head, mean) if isinstance(head, str) else head
    result = measure(checked, protocol, shot, made, "what is given")
    if result.without:
        warnings.warn(result.without, stacklevel=2)
    return result


def _base_mean(base_features: Any) -> Tensor:
    """[dim] mean of the base features, after the same checks as the measured ones."""
    given = plain(base_features, "base_features")
    return as_features(given, np.zeros(len(given), np.int64), "base_features").values.mean(dim=0)


@dataclass(frozen=True)
class Comparison:
    """Second less first, in percentage points, episode by episode.

    Attributes:
        shot: images per class.
        first, second: mean accuracies in percent.
        difference: of the means.
        ci95: half width of the 95 % interval of the difference.
        wins, ties: share of the episodes in percent where the second is better, and where both are equal.
    """

    way: int
    shot: int
    first: float
    second: float
    difference: float
    ci95: float
    wins: float
    ties: float

    def verdict(self, first: str = "the first", second: str = "the second") -> str:
        """A sentence on which is better, by the interval."""
        if abs(self.difference) <= self.ci95:
            return f"no difference shown between {first} and {second}: the interval holds 0"
        better, worse = (second, first) if self.difference > 0 else (first, second)
        return f"{better} is better than {worse} by {abs(self.difference):.2f} ± {self.ci95:.2f} points"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def compare_results(first: Result, second: Result) -> Comparison:
    """Paired comparison.

    The interval of the paired differences is narrower than the two intervals suggest, because an episode that is hard
    for one is mostly hard for the other.

    Raises:
        DataError: the episodes are not the same.
    """
    if not torch.equal(first.classes, second.classes) or (first.shot, first.query) != (second.shot, second.query):
        raise DataError("the two results are not of the same episodes; measure both with one protocol and seed")
    differences = second.accuracies - first.accuracies
    mean, ci95 = summary(differences)
    wins, ties = ((100 * share.double().mean()).item() for share in (differences > 0, differences == 0))
    return Comparison(first.way, first.shot, first.mean, second.mean, mean, ci95, wins, ties)
