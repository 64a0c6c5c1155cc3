"""Episodes as index tensors, drawn in one go from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smkd.errors import DataError

EPISODES_AT_ONCE = 100
"""Episodes drawn and scored together. Part of the protocol: another number draws other episodes."""


class Episodes(NamedTuple):
    """Rows of the feature matrix; classes come in the order of the ways.

    Attributes:
        support: int64 [episodes, way, shot].
        query: int64 [episodes, way, query]; -1 where a class has fewer images than others (query='all').
    """

    support: Tensor
    query: Tensor


def draw(
    labels: NDArray[np.int64], class_names: list[str], *, way: int, shot: int, query: int | str, episodes: int,
    seed: int,
) -> Iterator[Episodes]:  # fmt: skip
    """Random episodes: different classes for the ways, different images for support and queries.

    Args:
        labels: class of each row of the feature matrix.
        class_names: for messages.
        way, shot: classes per episode, support images per class.
        query: queries per class, or 'all' for every image outside the support.
        episodes: how many.
        seed: same seed, same episodes.

    Yields:
        At most `EPISODES_AT_ONCE` episodes at a time.

    Raises:
        DataError: too few classes, or a class (named) with too few images.
    """
    check_sizes(labels, class_names, way=way, shot=shot, query=query)
    members = [np.flatnonzero(labels == label) for label in range(len(class_names))]
    sizes = torch.tensor([len(rows) for rows in members])
    largest = int(sizes.max())
    table = torch.full((len(members), largest), -1)
    for label, rows in enumerate(members):
        table[label, : len(rows)] = torch.from_numpy(rows)
    wanted = largest if query == "all" else shot + int(query)
    rng = torch.Generator().manual_seed(seed)
    for start in range(0, episodes, EPISODES_AT_ONCE):
        # always as many, so that fewer episodes are the first of more
        classes = torch.rand(EPISODES_AT_ONCE, len(members), generator=rng).argsort(dim=1)[:, :way]
        order = torch.rand(EPISODES_AT_ONCE, way, largest, generator=rng)
        # places past the end of a class come last
        order = order + (torch.arange(largest) >= sizes[classes][..., None])
        picked = table[classes].gather(2, order.argsort(dim=2)[..., :wanted])[: episodes - start]
        yield Episodes(picked[..., :shot], picked[..., shot:])


def check_sizes(labels: NDArray[np.int64], class_names: list[str], *, way: int, shot: int, query: int | str) -> None:
    """Raise `DataError`, naming the class, if episodes of this shape cannot be drawn."""
    if len(class_names) < way:
        raise DataError(f"way={way}, but the split has only {len(class_names)} classes")
    needed = shot + (1 if query == "all" else int(query))
    for name, size in zip(class_names, np.bincount(labels, minlength=len(class_names)), strict=True):
        if size < needed:
            raise DataError(
                f"class '{name}' has {size} images, but shot={shot} and query={query} need at least {needed}"
            )
