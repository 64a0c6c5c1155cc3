"""Linear heads with an exact solution: ridge and logistic regression on the support features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from smkd.fewshot.head import InductiveHead, Rule, one_hot


@dataclass(frozen=True)
class Ridge(InductiveHead):
    """Ridge regression on targets ±1, with an unpenalised intercept (Bertinetto et al., ICLR 2019)."""

    alpha: float = 1.0
    """Weight of the squared norm."""

    def __post_init__(self) -> None:
        _check_positive("alpha", self.alpha)

    def fit(self, support: Tensor, labels: Tensor, generator: torch.Generator) -> Rule:
        """See `InductiveHead.fit`."""
        features = support.double()
        targets = 2 * one_hot(labels, features.dtype).transpose(1, 2) - 1
        mean, target_mean = features.mean(dim=1, keepdim=True), targets.mean(dim=1, keepdim=True)
        centred = features - mean
        gram = centred @ centred.transpose(1, 2)
        gram.diagonal(dim1=1, dim2=2).add_(self.alpha)
        weight = torch.linalg.solve(gram, targets - target_mean).transpose(1, 2) @ centred
        bias = target_mean - mean @ weight.transpose(1, 2)
        return Rule(weight.to(support.dtype), bias[:, 0].to(support.dtype))


@dataclass(frozen=True)
class Logistic(InductiveHead):
    """Multinomial logistic regression, to convergence (as used by Tian et al., ECCV 2020).

    Minimises `c * sum of cross-entropies + |weight|² / 2`; the intercepts are not penalised. Episodes are solved side
    by side. A single support of more than `FEW_IMAGES` images is solved by scikit-learn, which is faster there but
    takes a second to load.
    """

    fit_at_once: ClassVar[int] = 250
    tolerance: ClassVar[float] = 1e-5
    """Of scikit-learn: largest part of the mean loss's gradient."""
    is_exact: ClassVar[bool] = True
    """Whether Newton's method ends what scikit-learn began."""
    end: ClassVar[float] = 1e-7
    """Of Newton's method: largest norm of the gradient, relative to that at zero."""

    c: float = 1.0
    """Inverse weight of the squared norm."""

    def __post_init__(self) -> None:
        _check_positive("c", self.c)

    def fit(self, support: Tensor, labels: Tensor, generator: torch.Generator) -> Rule:
        """See `InductiveHead.fit`."""
        features = support.double()
        is_alone = len(features) == 1 and features.device.type == "cpu" and bool(labels.any())
        # for one support, fewer channels are worth the search for them only where they are much fewer
        small = features if is_alone and features.shape[2] <= 2 * features.shape[1] else _isometric(features)
        problem = _Problem(small, one_hot(labels, features.dtype).transpose(1, 2), self.c)
        by_sklearn = is_alone and labels.shape[1] > FEW_IMAGES
        point = _lbfgs(problem, labels[0], self.tolerance) if by_sklearn else problem.zero()
        if self.is_exact or not by_sklearn:
            point = _newton(problem, point, self.end)
        # where the gradient is zero, these are the weight's coefficients on the support
        coefficients = -problem.slope(point)[0]
        return Rule((coefficients.transpose(1, 2) @ features).to(support.dtype), point[1][:, 0].to(support.dtype))


def balanced_logistic(values: Tensor, positive: Tensor) -> tuple[float, float]:
    """Slope and intercept of a logistic regression on one number, both kinds with the same total weight.

    Minimises `sum of weight * cross-entropy + slope² / 2`, where the weights of each kind add up to n / 2.

    Args:
        values: float [n].
        positive: bool [n], with both kinds.
    """
    kinds = positive.long()
    weight = len(kinds) / (2 * kinds.bincount().double()[kinds])
    # the two ways get half of the slope each, so that the square of both together counts half
    problem = _Problem(values.double()[None, :, None], F.one_hot(kinds)[None].double(), weight[None, :, None] / 2)
    of_ways, intercepts = _newton(problem, problem.zero(), Logistic.end)
    return float(of_ways[0, 0, 1] - of_ways[0, 0, 0]), float(intercepts[0, 0, 1] - intercepts[0, 0, 0])


FEW_IMAGES = 64
"""Images of a support that are solved without scikit-learn."""
LBFGS_STEPS = 10_000
NEWTON_STEPS = 100
CG_STEPS = 250
HALVINGS = 30
CG_TOLERANCE = 1e-6
"""Largest norm of the residual, relative to the gradient."""

Point = tuple[Tensor, Tensor]
"""Weight [episodes, dim, way] and intercepts [episodes, 1, way]."""


def _isometric(features: Tensor) -> Tensor:
    """Features [episodes, n, n] with the inner products of those given [episodes, n, dim]."""
    values, vectors = torch.linalg.eigh(features @ features.transpose(1, 2))
    scaled: Tensor = vectors * values.clamp(min=0).sqrt()[:, None]
    return scaled


class _Problem:
    """The convex objective of each episode.

    Args:
        features: float64 [episodes, n, dim].
        targets: float64 [episodes, n, way].
        c: weight of the cross-entropies, or of each, [episodes, n, 1].
    """

    def __init__(self, features: Tensor, targets: Tensor, c: float | Tensor) -> None:
        self.features, self.targets, self.c = features, targets, c

    def zero(self) -> Point:
        """Where every class is as likely as another."""
        targets = self.targets
        return targets.new_zeros(len(targets), self.features.shape[2], targets.shape[2]), torch.zeros_like(
            targets[:, :1]
        )

    def logits(self, point: Point) -> Tensor:
        return self.features @ point[0] + point[1]

    def value(self, point: Point) -> Tensor:
        """[episodes, 1, 1]."""
        logits = self.logits(point)
        losses = logits.logsumexp(dim=2) - (logits * self.targets).sum(dim=2)
        total = (self.c * losses[..., None]).sum(dim=1, keepdim=True)
        return total + point[0].square().sum(dim=(1, 2), keepdim=True) / 2

    def slope(self, point: Point) -> tuple[Tensor, Tensor]:
        """Derivative of the losses by the logits, and the probabilities, [episodes, n, way]."""
        probabilities = self.logits(point).softmax(dim=2)
        return self.c * (probabilities - self.targets), probabilities

    def gradient(self, point: Point) -> tuple[Point, Tensor]:
        """Gradient, and the probabilities that `hessian` needs."""
        slope, probabilities = self.slope(point)
        return self._summed(slope, point), probabilities

    def hessian(self, probabilities: Tensor, direction: Point) -> Point:
        """Second derivative applied to a direction."""
        change = probabilities * self.logits(direction)
        return self._summed(self.c * (change - probabilities * change.sum(dim=2, keepdim=True)), direction)

    def _summed(self, slope: Tensor, point: Point) -> Point:
        total = slope.sum(dim=1, keepdim=True)
        # the mean over the ways is zero but for rounding, which would let all intercepts drift off together
        return self.features.transpose(1, 2) @ slope + point[0], total - total.mean(dim=2, keepdim=True)


def _lbfgs(problem: _Problem, labels: Tensor, tolerance: float) -> Point:
    """scikit-learn's solution of a single episode with labels [n] of two classes or more."""
    from sklearn.linear_model import LogisticRegression  # takes half a second

    is_binary = problem.targets.shape[2] == 2
    # with two classes it has one weight, the difference of ours, whose square counts twice as much
    c = 2 * problem.c if is_binary else problem.c
    found = LogisticRegression(C=c, tol=tolerance, max_iter=LBFGS_STEPS).fit(
        problem.features[0].numpy(), labels.numpy()
    )
    weight, bias = torch.from_numpy(found.coef_).T, torch.from_numpy(found.intercept_)[None]
    if is_binary:
        weight, bias = (torch.cat([-each, each], dim=1) / 2 for each in (weight, bias))
    return weight[None], (bias - bias.mean())[None]


def _newton(problem: _Problem, point: Point, end: float) -> Point:
    """Newton's method with conjugate gradients and halved steps from a point, all episodes side by side."""
    at_zero = problem.gradient(problem.zero())[0]
    first = _dot(at_zero, at_zero)
    for _ in range(NEWTON_STEPS):
        gradient, probabilities = problem.gradient(point)
        size = _dot(gradient, gradient)
        if bool((size <= end**2 * first).all()):
            break
        step = _solve(problem, probabilities, gradient, size)
        point = _line_search(problem, point, step, _dot(gradient, step))
    return point


def _solve(problem: _Problem, probabilities: Tensor, gradient: Point, size: Tensor) -> Point:
    """Conjugate gradients: `hessian @ step = -gradient`."""
    step = _scaled(gradient, 0.0)
    residual = _scaled(gradient, -1.0)
    direction, left = residual, size
    for _ in range(CG_STEPS):
        active = left > CG_TOLERANCE**2 * size  # solved episodes stand still: their quotients are 0 / 0
        if not bool(active.any()):
            break
        curved = problem.hessian(probabilities, direction)
        length = torch.where(active, left / _dot(direction, curved), 0)
        step = _moved(step, direction, length)
        residual = _moved(residual, curved, -length)
        previous, left = left, torch.where(active, _dot(residual, residual), left)
        direction = _moved(residual, direction, torch.where(active, left / previous, 0))
    return step


def _line_search(problem: _Problem, point: Point, step: Point, slope: Tensor) -> Point:
    """The step, halved in those episodes where it would not descend enough (Armijo)."""
    length = torch.ones_like(slope)
    start = problem.value(point)
    # what rounding hides counts as descent
    slack = 1e-12 * start.abs()
    for _ in range(HALVINGS):
        poor = problem.value(_moved(point, step, length)) > start + 1e-4 * length * slope + slack
        if not bool(poor.any()):
            break
        length = torch.where(poor, length / 2, length)
    return _moved(point, step, length)


def _dot(a: Point, b: Point) -> Tensor:
    """[episodes, 1, 1]."""
    return ((a[0] * b[0]).sum(dim=(1, 2)) + (a[1] * b[1]).sum(dim=(1, 2)))[:, None, None]


def _scaled(point: Point, factor: float) -> Point:
    return point[0] * factor, point[1] * factor


def _moved(point: Point, direction: Point, length: Tensor) -> Point:
    return point[0] + length * direction[0], point[1] + length * direction[1]


def _check_positive(field: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{field}={value} must be positive")
