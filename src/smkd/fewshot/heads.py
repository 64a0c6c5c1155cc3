"""Few-shot classifiers, batched over episodes: (support, query) -> scores.

support [episodes, way, shot, dim], query [episodes, queries, dim] -> scores [episodes, queries, way]; the largest
score wins, the first way on ties.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def prototype(support: Tensor, query: Tensor) -> Tensor:
    """Cosine with the mean of each way's support features (Snell et al., NeurIPS 2017, with cosine)."""
    prototypes = F.normalize(support.mean(dim=2), dim=-1)
    return F.normalize(query, dim=-1) @ prototypes.transpose(1, 2)


def knn(support: Tensor, query: Tensor, neighbours: int = 5) -> Tensor:
    """Vote of the nearest support features by cosine, each vote weighted by its cosine.

    Args:
        neighbours: how many vote; no more than there are support features.
    """
    _, way, shot, _ = support.shape
    similarity = F.normalize(query, dim=-1) @ F.normalize(support.flatten(1, 2), dim=-1).transpose(1, 2)
    votes, nearest = similarity.topk(min(neighbours, way * shot), dim=-1)
    scores = torch.zeros(*votes.shape[:2], way, device=votes.device, dtype=votes.dtype)
    # support is way-major: its row divided by the shots is its way
    return scores.scatter_add_(2, nearest // shot, votes)
