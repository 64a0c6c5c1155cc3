"""Heads that compare a query with the support: prototypes, SimpleShot, nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from smkd.errors import DataError
from smkd.fewshot.head import InductiveHead, Rule, class_means


@dataclass(frozen=True)
class Prototype(InductiveHead):
    """Similarity with the mean of each way's support features (Snell et al., NeurIPS 2017).

    The support features are averaged as they are, not normalised first, as the authors of SMKD do.
    """

    metric: Literal["cosine", "euclidean"] = "cosine"

    def __post_init__(self) -> None:
        _check_choice("metric", self.metric, ("cosine", "euclidean"))

    def fit(self, support: Tensor, labels: Tensor, generator: torch.Generator) -> Rule:
        """See `InductiveHead.fit`."""
        means = class_means(support, labels)
        return _nearest_centre(means) if self.metric == "euclidean" else Rule(F.normalize(means, dim=-1))

    def answer(self, rule: Rule, labels: Tensor, query: Tensor) -> Tensor:
        """See `InductiveHead.answer`."""
        # the length of a query changes no decision, so the products of `fit` leave it out
        return super().answer(rule, labels, F.normalize(query, dim=-1) if self.metric == "cosine" else query)


@dataclass(frozen=True)
class SimpleShot(InductiveHead):
    """Nearest class mean by Euclidean distance after a transform (Wang et al., 2019, arXiv 1911.04623).

    `un`: features as they are; `l2n`: L2-normalised; `cl2n`: less the mean feature of the training classes, then
    L2-normalised.
    """

    transform: Literal["un", "l2n", "cl2n"] = "l2n"
    base_mean: Tensor | None = None

    def __post_init__(self) -> None:
        _check_choice("transform", self.transform, ("un", "l2n", "cl2n"))
        if self.transform == "cl2n" and self.base_mean is None:
            raise ValueError("cl2n needs the features of the training classes: --base FEATURES.h5, or base_features=")

    def prepare(self, features: Tensor) -> Tensor:
        """See `InductiveHead.prepare`."""
        if self.transform == "un":
            return features
        if self.base_mean is not None and self.transform == "cl2n":
            if len(self.base_mean) != features.shape[-1]:
                raise DataError(
                    f"features of the training classes have {len(self.base_mean)} numbers, those to be measured "
                    f"{features.shape[-1]}; both must come from one network with one pooling"
                )
            features = features - self.base_mean.to(features)
        return F.normalize(features, dim=-1)

    def fit(self, support: Tensor, labels: Tensor, generator: torch.Generator) -> Rule:
        """See `InductiveHead.fit`."""
        return _nearest_centre(class_means(support, labels))


@dataclass(frozen=True)
class KNN(InductiveHead):
    """Vote of the nearest support features by cosine, each vote weighted by its cosine (as Lin et al., CVPR 2023).

    A way none of whose images is near has the score 0.
    """

    neighbours: int = 5
    """How many vote; no more than there are support features."""
    reference: bool = False
    """As the authors' code counts: a neighbour's place in the support is divided by the ways instead of the shots, so
    that at 1 shot every vote is for the first way."""

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise ValueError(f"neighbours={self.neighbours} must be at least 1")

    def prepare(self, features: Tensor) -> Tensor:
        """See `InductiveHead.prepare`."""
        return F.normalize(features, dim=-1)

    def fit(self, support: Tensor, labels: Tensor, generator: torch.Generator) -> Rule:
        """See `InductiveHead.fit`."""
        return Rule(support)

    def scores(self, products: Tensor, labels: Tensor) -> Tensor:
        """See `InductiveHead.scores`."""
        return self.votes(products, labels, int(labels.max()) + 1)

    def votes(self, products: Tensor, labels: Tensor, way: int) -> Tensor:
        """`scores` of so many ways, which a program that is being traced cannot read off the labels."""
        votes, nearest = products.topk(min(self.neighbours, products.shape[1]), dim=1)
        if self.reference:
            voted = nearest // way
            votes = votes.masked_fill(voted >= way, 0.0)
            voted = voted.clamp(max=way - 1)
        else:
            voted = labels.unsqueeze(-1).expand(-1, -1, products.shape[2]).gather(1, nearest)
        return votes.new_zeros(len(votes), way, votes.shape[2]).scatter_add_(1, voted, votes)


def _nearest_centre(centres: Tensor) -> Rule:
    """Smallest squared distance |x|² - 2 c.x + |c|², without |x|², which is the same for all centres."""
    return Rule(2 * centres, -centres.square().sum(dim=-1))


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field}={value}: expected {', '.join(choices)}")
