"""The chance that an image is of any of the known classes, learned from the support.

A support image counts as familiar when it alone is left out of its class mean, and as strange when its whole class is
left out. This needs a class with two images.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from smkd.fewshot.linear import balanced_logistic

Chances = NDArray[np.float64]
"""From 0 to 1."""


class Known(NamedTuple):
    """Chance that an image is of one of the classes, by its familiarity: 1 / (1 + exp(-(slope x + intercept)))."""

    slope: float
    intercept: float

    def chance(self, familiar: NDArray[np.float64]) -> Chances:
        """In (0, 1), [images]."""
        return torch.from_numpy(self.slope * familiar + self.intercept).sigmoid().numpy()


def familiarity(query: Tensor, support: Tensor, labels: Tensor) -> NDArray[np.float64]:
    """Cosine of each feature [queries, dim] with the nearest class mean of the support: float64 [queries]."""
    return nearest_cosine(query.double(), class_directions(support, labels)).numpy()


def class_directions(support: Tensor, labels: Tensor) -> Tensor:
    """Class means of the support, each of length 1: float64 [classes, dim]."""
    return F.normalize(_means(support, labels), dim=1)


def nearest_cosine(query: Tensor, directions: Tensor) -> Tensor:
    """Largest cosine of each query [queries, dim] with directions of length 1 [classes, dim]: [queries]."""
    return (F.normalize(query, dim=1) @ directions.T).amax(dim=1)


class Familiarities:
    """Familiarity of the support images, each left out alone or with its class.

    Args:
        support: float32 [n, dim].
        labels: int64 [n], at least two classes.
    """

    def __init__(self, support: Tensor, labels: Tensor) -> None:
        self.labels, counts = labels, labels.bincount()
        self.spare = counts[labels] > 1
        """bool [n], of images whose class has another one."""
        features = support.double()
        units, means = F.normalize(features, dim=1), _means(support, labels)
        others = (units @ F.normalize(means, dim=1).T).masked_fill(F.one_hot(labels).bool(), -torch.inf)
        self.nearest, self.place = others.topk(2, dim=1)  # one of them may be left out too
        size = counts[labels][:, None].double()
        without = means[labels] * size - features  # the sum of the others: only its direction counts
        self.own = (units * F.normalize(without, dim=1)).sum(dim=1)

    def fit(self, without: int | None = None) -> Known | None:
        """A logistic regression of familiar against strange, both with the same total weight.

        Args:
            without: a class to leave out of the support.

        Returns:
            None if no class has two images, or only one class is left.
        """
        strange = self.nearest[:, 0]
        there = torch.ones_like(self.spare)
        if without is not None:
            strange = torch.where(self.place[:, 0] == without, self.nearest[:, 1], strange)
            there = self.labels != without
        spare = there & self.spare
        if not spare.any() or not strange[there].isfinite().all():
            return None
        values = torch.cat([torch.maximum(self.own, strange)[spare], strange[there]])
        middle, spread = float(values.mean()), float(values.std(correction=0))
        if spread:
            familiar = torch.arange(len(values)) < spare.sum()
            slope, intercept = balanced_logistic((values - middle) / spread, familiar)
            slope /= spread
            if slope > 0:
                return Known(slope, intercept - slope * middle)
        return Known(0.0, 0.0)  # familiarity says nothing here: one chance for everything

    def chances(self, known: Known) -> tuple[Chances, Chances]:
        """Chances (`Known.chance`) of left-out images as familiar and as strange ones.

        Args:
            known: what `fit` found in the whole support.

        Returns:
            First, the chance of each image whose class has another one, with that image left out. Second, the chance of
            every image, [n], with its whole class left out, also of the regression (unless no other class has two
            images). With two classes the second is empty, because one class alone has no strange images.
        """
        familiar = known.chance(torch.maximum(self.own, self.nearest[:, 0])[self.spare].numpy())
        classes = int(self.labels.max()) + 1
        strange = np.empty(len(self.labels) if classes > 2 else 0)
        for label in range(classes if len(strange) else 0):
            rows = (self.labels == label).numpy()
            strange[rows] = (self.fit(label) or known).chance(self.nearest[rows, 0].numpy())
        return familiar, strange


def _means(support: Tensor, labels: Tensor) -> Tensor:
    members = F.one_hot(labels).T.double()
    return (members / members.sum(dim=1, keepdim=True)) @ support.double()
