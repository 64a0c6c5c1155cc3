"""Probabilities from scores, and how sure it is that an image is of a known class at all.

Both are learned from support images that were left out, so they need a class with two images.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from smkd.classify.learning import Learned, LeftOut

HALVINGS = 60
FINEST, COARSEST = 1e-4, 1e4
"""Bounds of the temperature, in units of the scores' own spread."""
Z95 = 1.959964


def temperature(left: LeftOut, learned: Learned) -> float:
    """Temperature T of the probabilities softmax(scores / T).

    The T under which the left-out images' own classes are most likely (Guo et al., ICML 2017), where of N images
    1 / (N + 1) of one is taken to be spread over all classes, as Platt (1999) does: without that, images that are all
    right would ask for T = 0. Where no class has two images there is nothing to leave out; T is then the standard
    deviation of the scores that the support gets for other classes than its own, a guess.

    Args:
        left: scores of left-out images.
        learned: the head on the whole support.
    """
    if not len(left.truth):
        scores = learned.scores(learned.support[0])
        others = scores[~F.one_hot(learned.labels[0], scores.shape[1]).bool()]
        return float(others.std(correction=0)) or 1.0
    scores = left.scores - left.scores.mean(dim=1, keepdim=True)
    spread = float(scores.std(correction=0))
    if not spread:
        return 1.0
    images, way = scores.shape
    target = (images * F.one_hot(left.truth, way).double() + 1 / way) / (images + 1)
    low, high = math.log(FINEST), math.log(COARSEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        # the likelihood's slope by 1 / T never falls as 1 / T grows
        slope = (((scores / (spread * math.exp(middle))).softmax(dim=1) - target) * scores).sum()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return spread * math.exp((low + high) / 2)


class Known(NamedTuple):
    """Chance that an image is of one of the classes, by its familiarity: 1 / (1 + exp(-(slope x + intercept)))."""

    slope: float
    intercept: float

    def chance(self, familiar: NDArray[np.float64]) -> NDArray[np.float64]:
        """In (0, 1), [images]."""
        return torch.from_numpy(self.slope * familiar + self.intercept).sigmoid().numpy()


def familiarity(query: Tensor, support: Tensor, labels: Tensor) -> NDArray[np.float64]:
    """Cosine of each feature [queries, dim] with the nearest class mean of the support: float64 [queries]."""
    cosines = F.normalize(query.double(), dim=1) @ F.normalize(_means(support, labels), dim=1).T
    return cosines.amax(dim=1).numpy()


def fit_known(support: Tensor, labels: Tensor) -> Known | None:
    """Learn from the support what is familiar and what is not.

    Familiar: an image left out of the mean of its own class. Not: the same image when its whole class is left out. A
    logistic regression with both kinds weighing the same tells them apart; at 0.5 both are as likely.

    Args:
        support: float32 [n, dim].
        labels: int64 [n], at least two classes.

    Returns:
        None if no class has two images.
    """
    counts = labels.bincount()
    rows = (counts[labels] > 1).nonzero().flatten()
    if not len(rows):
        return None
    features = support.double()
    units, means = F.normalize(features, dim=1), _means(support, labels)
    cosines = units @ F.normalize(means, dim=1).T
    own = F.one_hot(labels).bool()
    strange = cosines.masked_fill(own, -torch.inf).amax(dim=1)
    size = counts[labels[rows]][:, None].double()
    without = means[labels[rows]] * size - features[rows]  # the sum of the others: only its direction counts
    own_cosine = (units[rows] * F.normalize(without, dim=1)).sum(dim=1)
    familiar = torch.maximum(own_cosine, strange[rows])
    values = torch.cat([familiar, strange]).numpy()
    middle, spread = float(values.mean()), float(values.std())
    kinds = np.repeat([1, 0], [len(familiar), len(strange)])
    if spread:
        fitted = LogisticRegression(class_weight="balanced").fit(((values - middle) / spread)[:, None], kinds)
        slope = float(fitted.coef_[0, 0]) / spread
        if slope > 0:
            return Known(slope, float(fitted.intercept_[0]) - slope * middle)
    return Known(0.0, 0.0)  # familiarity says nothing here: one chance for everything


def interval(right: int, images: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (JASA 1927), from 0 to 1."""
    share, z = right / images, Z95**2 / images
    middle, half = share + z / 2, math.sqrt(z * (share * (1 - share) + z / 4))
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))


def _means(support: Tensor, labels: Tensor) -> Tensor:
    members = F.one_hot(labels).T.double()
    return (members / members.sum(dim=1, keepdim=True)) @ support.double()
