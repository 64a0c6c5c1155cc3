"""The contract of few-shot classifiers.

A head takes (support, labels, query, generator) and gives scores:

    support    float [episodes, n, dim]
    labels     int64 [episodes, n], 0 .. way - 1
    query      float [episodes, queries, dim]
    generator  on the CPU, for heads that draw
    scores     float [episodes, queries, way]; a query gets the way with the largest score, the first of equals

Any such callable is a head; `docs/heads.md` shows one. Heads that use a query only in inner products
(`InductiveHead`) are evaluated much faster.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES_AT_ONCE = 4096


class Head(Protocol):
    """A few-shot classifier; `transductive = True` marks those that look at all queries of an episode together."""

    def __call__(self, support: Tensor, labels: Tensor, query: Tensor, generator: torch.Generator) -> Tensor:
        """Scores of the queries, see the module."""


class Rule(NamedTuple):
    """What an inductive head has learned from the support of each episode.

    Attributes:
        weight: [episodes, rows, dim]; a query x gives the products weight @ x + bias.
        bias: [episodes, rows], or None.
    """

    weight: Tensor
    bias: Tensor | None = None


class InductiveHead(ABC):
    """A head that looks at each query by itself, in inner products with a few rows.

    A query that many episodes share is read once: one matrix product takes it with the rows of all episodes. A subclass
    overrides `fit` and, if needed, `prepare` and `scores`. It overrides `answer` too if the length of a query changes
    its scores, but not their order.
    """

    transductive: ClassVar[bool] = False
    fit_at_once: ClassVar[int] = 32
    """Episodes fitted together. Fixed, because a head that draws does so for all of them from one generator."""

    def prepare(self, features: Tensor) -> Tensor:
        """Features [..., dim] as the head needs them; called for support and queries."""
        return features

    @abstractmethod
    def fit(self, support: Tensor, labels: Tensor, generator: torch.Generator) -> Rule:
        """Learn from prepared support features [episodes, n, dim]."""

    def scores(self, products: Tensor, labels: Tensor) -> Tensor:
        """Scores [episodes, way, queries] from the products [episodes, rows, queries]."""
        return products

    def answer(self, rule: Rule, labels: Tensor, query: Tensor) -> Tensor:
        """Scores [episodes, queries, way] of unprepared queries [episodes, queries, dim] by the rule of `fit`."""
        return self.scores(rule_products(rule, self.prepare(query)), labels).transpose(1, 2)

    @final
    def __call__(self, support: Tensor, labels: Tensor, query: Tensor, generator: torch.Generator) -> Tensor:
        """Scores of the queries, see the module."""
        return self.answer(self.fit(self.prepare(support), labels, generator), labels, query)


def rule_products(rule: Rule, query: Tensor) -> Tensor:
    """Products [episodes, rows, queries] of each episode's rows with its own queries [episodes, queries, dim]."""
    products = rule.weight @ query.transpose(1, 2)
    return products if rule.bias is None else products + rule.bias[..., None]


def one_hot(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """[episodes, n] -> [episodes, way, n]."""
    return F.one_hot(labels).transpose(1, 2).to(dtype)


def class_means(support: Tensor, labels: Tensor) -> Tensor:
    """Mean of each way's support: [episodes, way, dim]."""
    members = one_hot(labels, support.dtype)
    return (members / members.sum(dim=2, keepdim=True)) @ support


class Learned:
    """A head with one support. An inductive head learns once, and scores each query independently of the others.

    Args:
        head: see the module.
        support: float32 [n, dim].
        labels: int64 [n], every class at least once.
        seed: of heads that draw.
    """

    def __init__(self, head: Head, support: Tensor, labels: Tensor, seed: int) -> None:
        self.head, self.support, self.labels, self.seed = head, support[None], labels[None], seed
        self.rule: Rule | None = None
        if isinstance(head, InductiveHead):
            rule = head.fit(head.prepare(self.support), self.labels, _generator(seed))
            self.rule = Rule(rule.weight.double(), None if rule.bias is None else rule.bias.double())

    def scores(self, query: Tensor) -> Tensor:
        """Scores float64 [queries, classes] of float32 [queries, dim]; transductive heads see all of them together."""
        if self.rule is None or not isinstance(self.head, InductiveHead):
            return self.head(self.support, self.labels, query[None], _generator(self.seed))[0].double()
        # float64: the same answer for a query by itself and among others
        parts = query.split(QUERIES_AT_ONCE)
        return torch.cat([self.head.answer(self.rule, self.labels, part.double()[None])[0] for part in parts])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
