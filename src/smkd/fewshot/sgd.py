"""The authors' classifier: a linear layer trained by SGD on each support set, here for many episodes at once.

Its weights never leave the span of the support features and their own start, so all that training needs are the
support's inner products: a step costs [way, n] numbers instead of [way, dim].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smkd.fewshot.head import InductiveHead, Rule, one_hot

LEARNING_RATE = 0.01
MOMENTUM = 0.9
DAMPENING = 0.9
WEIGHT_DECAY = 0.001
BATCH = 4
COSINE_SCALE = 2.0
"""Factor of the `dist` logits."""
SGD_NORM_EPS = 1e-5


class Start(NamedTuple):
    """Where training begins.

    Attributes:
        weight: [episodes, way, dim].
        bias: [episodes, way] (`softmax`).
        magnitude: [episodes, way] (`dist`).
    """

    weight: Tensor
    bias: Tensor | None = None
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Classifier(InductiveHead):
    """Linear classifier trained by SGD, as the authors of SMKD evaluate (Lin et al., CVPR 2023, section 4.1).

    `dist`: cosine classifier (Chen et al., ICLR 2019) with a trained magnitude per way; `softmax`: linear layer with
    bias. Batches of 4, learning rate 0.01, momentum 0.9, dampening 0.9, weight decay 0.001 on everything.
    """

    fit_at_once: ClassVar[int] = 500

    loss: Literal["dist", "softmax"] = "dist"
    epochs: int = 301

    def __post_init__(self) -> None:
        if self.loss not in ("dist", "softmax"):
            raise ValueError(f"loss={self.loss}: expected dist or softmax")
        if self.epochs < 1:
            raise ValueError(f"epochs={self.epochs} must be at least 1")

    def prepare(self, features: Tensor) -> Tensor:
        """See `InductiveHead.prepare`."""
        if self.loss == "softmax":
            return features
        lengths: Tensor = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
        return features / (lengths + SGD_NORM_EPS)

    def fit(self, support: Tensor, labels: Tensor, generator: torch.Generator) -> Rule:
        """See `InductiveHead.fit`."""
        episodes, n, dim = support.shape
        bound = dim**-0.5  # as a fresh nn.Linear
        way = int(labels.max()) + 1
        weight, bias = (
            ((2 * torch.rand(*shape, generator=generator) - 1) * bound).to(support)
            for shape in ((episodes, way, dim), (episodes, way))
        )
        order = torch.rand(episodes, self.epochs, n, generator=generator).argsort(dim=-1).to(support.device)
        if self.loss == "softmax":
            return train_softmax(support, labels, Start(weight, bias=bias), order)
        return train_dist(support, labels, Start(weight, magnitude=weight.norm(dim=-1)), order)


def train_softmax(support: Tensor, labels: Tensor, start: Start, order: Tensor) -> Rule:
    """Train `weight @ x + bias`.

    Args:
        support: [episodes, n, dim].
        labels: [episodes, n].
        start: weights and biases.
        order: int64 [episodes, epochs, n], the support in the order of each epoch; four in a row are a batch.
    """
    assert start.bias is not None
    n = support.shape[1]
    gram, first = support @ support.transpose(1, 2), start.weight @ support.transpose(1, 2)
    # what linear functions of the weights and biases gain per unit of an item's gradient: coefficients on the support,
    # share of the start, products with the support, bias
    gains = torch.cat([_identity(gram), torch.zeros_like(gram[..., :1]), gram, torch.ones_like(gram[..., :1])], dim=-1)
    zero = torch.zeros_like(first)
    state = torch.cat([zero, torch.ones_like(zero[..., :1]), first, start.bias[..., None]], dim=-1)
    velocity: Tensor | None = None
    for items, targets, batch_gains in _batches(order, one_hot(labels, support.dtype), gains):
        logits = (state[..., n + 1 : -1] + state[..., -1:]).gather(2, items)
        slope = _slope(logits, targets)
        velocity = _momentum(velocity, (slope @ batch_gains).add_(state, alpha=WEIGHT_DECAY))
        state.sub_(velocity, alpha=LEARNING_RATE)
    weight = state[..., :n] @ support + state[..., n : n + 1] * start.weight
    return Rule(weight, state[..., -1])


def train_dist(support: Tensor, labels: Tensor, start: Start, order: Tensor) -> Rule:
    """Train `2 * magnitude * weight / |weight| @ x` on L2-normalised support; arguments as `train_softmax`."""
    assert start.magnitude is not None
    n = support.shape[1]
    gram, first = support @ support.transpose(1, 2), start.weight @ support.transpose(1, 2)
    gains = torch.cat([_identity(gram), torch.zeros_like(gram[..., :1]), gram], dim=-1)
    length = start.weight.square().sum(dim=-1, keepdim=True)
    zero = torch.zeros_like(first)
    # coefficients on the support, share of the start, products with the support, product with the start
    state = torch.cat([zero, torch.ones_like(length), first, length], dim=-1)
    magnitude = start.magnitude[..., None].clone()
    velocity: Tensor | None = None
    magnitude_velocity: Tensor | None = None
    for items, targets, batch_gains in _batches(order, one_hot(labels, support.dtype), gains):
        # |weight|² from its coefficients and their products
        norm = (state[..., : n + 1] * state[..., n + 1 :]).sum(dim=-1, keepdim=True).sqrt_()
        cosines = state[..., n + 1 : -1].gather(2, items) / norm
        slope = _slope(COSINE_SCALE * magnitude * cosines, targets) * COSINE_SCALE
        along = (slope * cosines).sum(dim=-1, keepdim=True)  # gradient along the unit weight
        start_gain = (slope * first.gather(2, items)).sum(dim=-1, keepdim=True)
        gradient = torch.cat([slope @ batch_gains, start_gain], dim=-1)
        gradient.mul_(magnitude / norm).add_(state * (WEIGHT_DECAY - along * magnitude / norm**2))
        magnitude_velocity = _momentum(magnitude_velocity, along + WEIGHT_DECAY * magnitude)
        velocity = _momentum(velocity, gradient)
        state.sub_(velocity, alpha=LEARNING_RATE)
        magnitude.sub_(magnitude_velocity, alpha=LEARNING_RATE)
    weight = state[..., :n] @ support + state[..., n : n + 1] * start.weight
    return Rule(COSINE_SCALE * magnitude * F.normalize(weight, dim=-1))


def _batches(order: Tensor, targets: Tensor, gains: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Items [episodes, way, b], targets [episodes, way, b] and gains [episodes, b, ...] of each batch in turn."""
    way = targets.shape[1]
    for epoch in range(order.shape[1]):
        picked = order[:, epoch]
        items = picked.unsqueeze(1).expand(-1, way, -1)
        shuffled = targets.gather(2, items)
        ordered = gains.gather(1, picked.unsqueeze(2).expand(-1, -1, gains.shape[2]))
        for first in range(0, picked.shape[1], BATCH):
            batch = slice(first, first + BATCH)
            yield items[..., batch], shuffled[..., batch], ordered[:, batch]


def _slope(logits: Tensor, targets: Tensor) -> Tensor:
    """Derivative of the batch's mean cross-entropy by the logits [episodes, way, b]."""
    return (logits.softmax(dim=1) - targets) / targets.shape[2]


def _momentum(velocity: Tensor | None, gradient: Tensor) -> Tensor:
    # PyTorch's SGD: no dampening on the first step
    return gradient if velocity is None else velocity.mul_(MOMENTUM).add_(gradient, alpha=1 - DAMPENING)


def _identity(gram: Tensor) -> Tensor:
    return torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device).expand_as(gram)
