"""How well the teacher's prototypes agree with the classes, as numbers per epoch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]


def cluster_agreement(assigned: Labels, labels: Labels) -> dict[str, float]:
    """Agreement of a clustering with the classes.

    Args:
        assigned: prototype with the largest teacher logit, per image.
        labels: class per image.

    Returns:
        nmi: normalised mutual information, 0 to 1; ari: adjusted Rand index, at most 1; fmi: Fowlkes-Mallows
        index, 0 to 1; prototypes: how many different ones were assigned.
    """
    from sklearn import metrics

    return {
        "nmi": float(metrics.normalized_mutual_info_score(labels, assigned)),
        "ari": float(metrics.adjusted_rand_score(labels, assigned)),
        "fmi": float(metrics.fowlkes_mallows_score(labels, assigned)),
        "prototypes": len(np.unique(assigned)),
    }
