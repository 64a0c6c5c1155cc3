"""`head='auto'`: the head that gives most support images their own class in cross-validation."""

from __future__ import annotations

import torch
from torch import Tensor

from smkd.classify.learning import left_out
from smkd.fewshot.heads import make_head

AUTO = "auto"
CANDIDATES = ("prototype", "knn", "ridge", "logistic", "logistic:c=10")
"""Simplest first, which wins a tie."""
SHOTS = 5
"""Images that every class needs for a choice; with fewer the head is the first candidate."""


def check_head(head: str) -> None:
    """Raise `ConfigError` for a name or option that is unknown, before any work is done for it."""
    if head != AUTO:
        make_head(head, torch.zeros(1))


def choose_head(support: Tensor, labels: Tensor, seed: int) -> str:
    """Name of the head.

    Cross-validation is stratified: every part has one image of each class (`smkd.classify.learning.left_out`).

    Args:
        support: float32 [n, dim].
        labels: int64 [n].
        seed: of heads that draw.
    """
    if int(labels.bincount().min()) < SHOTS:
        return CANDIDATES[0]
    centre = support.mean(dim=0)
    right = {name: left_out(make_head(name, centre), support, labels, seed).right for name in CANDIDATES}
    return max(CANDIDATES, key=lambda name: right[name])
