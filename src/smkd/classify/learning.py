"""A head on one support: learned once for all queries, and scores of support images that were left out."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from smkd.fewshot.heads import Head, InductiveHead, Rule

QUERIES_AT_ONCE = 4096
ROUNDS = 20
"""Images are left out in at most this many rounds."""


class Learned:
    """A head that has seen its support. An inductive one learns once, and a query's scores do not depend on others.

    Args:
        head: see `smkd.fewshot.heads`.
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
        generator = _generator(self.seed)
        if self.rule is None:
            return self.head(self.support, self.labels, query[None], generator)[0].double()
        # a head may treat queries in its call, so what it has learned is put where the call would learn it again
        knowing = copy.copy(self.head)
        object.__setattr__(knowing, "fit", lambda *_: self.rule)
        # float64: the same answer for a query by itself and among others
        support = self.support.double()
        parts = query.split(QUERIES_AT_ONCE)
        return torch.cat([knowing(support, self.labels, part.double()[None], generator)[0] for part in parts])


class LeftOut(NamedTuple):
    """Scores of support images by a head that learned from the others.

    Attributes:
        scores: float64 [images, classes].
        truth: int64 [images].
    """

    scores: Tensor
    truth: Tensor

    @property
    def right(self) -> int:
        """How many are given their own class."""
        return int((self.scores.argmax(dim=1) == self.truth).sum())


def left_out(head: Head, support: Tensor, labels: Tensor, seed: int) -> LeftOut:
    """Score every support image whose class has another one, without it.

    One image of each class is left out at a time, so that no class is learned from fewer images than the others were
    left with: leaving out a single image makes its own class look less likely than it is. A class with more than
    `ROUNDS` images leaves out an equal share of them; one with fewer than the largest has its images left out again,
    without being scored again.

    Args:
        head: see `smkd.fewshot.heads`.
        support: float32 [n, dim].
        labels: int64 [n], every class at least once.
        seed: of heads that draw.
    """
    counts = labels.bincount()
    place = torch.empty_like(labels)
    for label, count in enumerate(counts.tolist()):
        place[labels == label] = torch.arange(count)
    rounds = min(int(counts.max()), ROUNDS)
    size = counts[labels]
    scores = [torch.empty(0, len(counts), dtype=torch.float64)]
    truth = [labels[:0]]
    for number in range(rounds if int(counts.max()) > 1 else 0):
        turn = place % rounds == number
        leave = (turn | (place == number % size)) & (size > 1)
        asked = turn & (size > 1)
        learned = Learned(head, support[~leave], labels[~leave], seed)
        scores.append(learned.scores(support[asked]))
        truth.append(labels[asked])
    return LeftOut(torch.cat(scores), torch.cat(truth))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
