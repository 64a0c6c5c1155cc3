"""Few-shot evaluation of any features, from any backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smkd.config.loading import check_protocol
from smkd.errors import DataError
from smkd.fewshot.accuracy import Result, measure
from smkd.fewshot.feature_file import check_features
from smkd.fewshot.features import Features
from smkd.fewshot.heads import Head, make_head


def evaluate(
    features: Tensor | NDArray[Any], labels: Tensor | NDArray[Any] | Sequence[Any], *,
    head: str | Head = "prototype", way: int = 5, shot: int = 1, query: int | str = 15, episodes: int = 10_000,
    seed: int = 0, query_dirichlet: float | None = None, base_features: Tensor | NDArray[Any] | None = None,
) -> Result:  # fmt: skip
    """Few-shot accuracy of features, with its 95 % interval.

    >>> import numpy as np
    >>> from smkd import fewshot
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(["ant", "bee", "cat", "dog", "eel", "fox"], 30)
    >>> features = rng.normal(size=(180, 16)) + 2.0 * np.repeat(rng.normal(size=(6, 16)), 30, axis=0)
    >>> result = fewshot.evaluate(features, labels, head="prototype", way=5, shot=1, episodes=600)
    >>> result.mean > 90, result.ci95 < 1, len(result.accuracies)
    (True, True, 600)

    Args:
        features: [images, dim], numpy or torch; heads work on the device of a tensor.
        labels: [images], integers or text.
        head: name with options as in 'knn:neighbours=3', or any callable as `smkd.fewshot.heads` describes.
        way, shot: classes per episode, support images per class.
        query: queries per class, or 'all' for every image outside the support.
        episodes: how many.
        seed: same seed, same episodes.
        query_dirichlet: concentration of unbalanced queries; None for as many of each way.
        base_features: [images, dim] of the training classes, which 'simpleshot:transform=cl2n' needs.

    Raises:
        DataError: features that are not finite or do not match the labels; too few classes or images.
        ConfigError: unknown head, or an option or number that does not fit.
    """
    protocol = check_protocol(
        way=way, shots=(shot,), query=query, episodes=episodes, seed=seed, query_dirichlet=query_dirichlet,
        head=head if isinstance(head, str) else getattr(head, "__name__", type(head).__name__),
    )  # fmt: skip
    made = make_head(head, _mean(base_features)) if isinstance(head, str) else head
    return measure(as_features(features, labels), protocol, shot, made)


def as_features(features: Tensor | NDArray[Any], labels: Tensor | NDArray[Any] | Sequence[Any]) -> Features:
    """Plain arrays as checked `Features`; labels that are not integers become the names of the classes."""
    given = labels if isinstance(labels, Tensor) else np.asarray(labels)
    if isinstance(given, Tensor) or given.dtype.kind in "iu":
        return check_features(features, given)
    if given.dtype.kind not in "US":
        raise DataError(f"labels are {given.dtype}, expected integers or text")
    names, numbers = np.unique(given.astype(str), return_inverse=True)
    return check_features(features, numbers.astype(np.int64), names.tolist())


def _mean(base_features: Tensor | NDArray[Any] | None) -> Tensor | None:
    return None if base_features is None else torch.as_tensor(base_features).float().mean(dim=0)
