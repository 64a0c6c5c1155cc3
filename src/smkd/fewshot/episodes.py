"""Episodes as index tensors, drawn in one go from a seed."""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smkd.data.images import rows_by_label
from smkd.errors import DataError
from smkd.files import listed


class Members:
    """Which rows of the feature matrix belong to which class.

    Attributes:
        rows: int64 rows of each class.
        sizes: int64 [classes].
        place: int64 [rows of the matrix], the position of a row within its class.
    """

    def __init__(self, labels: NDArray[np.int64], classes: int) -> None:
        self.rows = [torch.from_numpy(rows) for rows in rows_by_label(labels, classes)]
        self.sizes = torch.tensor([len(rows) for rows in self.rows])
        self.place = torch.empty(len(labels), dtype=torch.int64)
        for rows in self.rows:
            self.place[rows] = torch.arange(len(rows))

    def of(self, classes: NDArray[np.int64]) -> Members:
        """The members of some classes, which become 0, 1, ... in this order; rows still count in the whole matrix."""
        some = copy.copy(self)
        some.rows, some.sizes = [self.rows[label] for label in classes], self.sizes[classes]
        return some


class Shape(NamedTuple):
    """What an episode is made of.

    Attributes:
        way, shot: classes, support images per class.
        query: queries per class, or 'all' for every image outside the support.
        dirichlet: concentration of the queries' shares among the ways, `way * query` in all; None for equal ones
            (Veilleux et al., NeurIPS 2021).
    """

    way: int
    shot: int
    query: int | str
    dirichlet: float | None = None

    @property
    def needed(self) -> int:
        """Images that a class must have."""
        if self.query == "all":
            return self.shot + 1
        return self.shot + int(self.query) * (self.way if self.dirichlet else 1)


class Episodes(NamedTuple):
    """Classes, and rows of the feature matrix.

    Attributes:
        classes: int64 [episodes, way], the class of each way.
        support: int64 [episodes, way, shot].
        query: int64 [episodes, queries], or None for every image of the classes outside the support.
        truth: int64 [episodes, queries], the way of each query; None with `query`.
    """

    classes: Tensor
    support: Tensor
    query: Tensor | None = None
    truth: Tensor | None = None

    def part(self, start: int, stop: int) -> Episodes:
        """Some of the episodes."""
        return Episodes(*(None if each is None else each[start:stop] for each in self))  # type: ignore[arg-type]


def draw(members: Members, shape: Shape, *, episodes: int, seed: int) -> Episodes:
    """Random episodes: different classes for the ways, different images for support and queries.

    With the same seed, fewer episodes are the first of more. The classes do not depend on shots and queries.

    Args:
        members: rows of each class, of which each has enough (`large_enough`).
        shape: of the episodes.
        episodes: how many.
        seed: same seed, same episodes.
    """
    way, shot, query, dirichlet = shape
    class_draws, image_draws, share_draws = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
    count = np.full((episodes, 1), len(members.rows))
    classes = _sample(count, way, class_draws.random((episodes, 1, 2 * way)))[:, 0]
    queries = 0 if query == "all" else int(query) * (way if dirichlet else 1)
    sizes = members.sizes.numpy()[classes]
    places = _sample(sizes, shot + queries, image_draws.random((episodes, way, 2 * (shot + queries))))
    starts = np.cumsum(members.sizes.numpy()) - members.sizes.numpy()
    rows = torch.cat(members.rows)[torch.from_numpy(places + starts[classes][..., None])]
    drawn = Episodes(torch.from_numpy(classes), rows[..., :shot])
    if query == "all":
        return drawn
    truth = torch.arange(way)[:, None].expand(episodes, way, queries)
    chosen = torch.ones(episodes, way, queries, dtype=torch.bool)
    if dirichlet:
        shares = share_draws.dirichlet([dirichlet] * way, size=episodes)
        chosen = torch.arange(queries) < torch.from_numpy(_round_shares(shares, queries))[..., None]
    return drawn._replace(query=rows[..., shot:][chosen].view(episodes, -1), truth=truth[chosen].view(episodes, -1))


def large_enough(
    sizes: NDArray[np.int64], class_names: list[str], shape: Shape, *, what: str = "the split", group: str = "",
    other: str = "",
) -> NDArray[np.int64]:  # fmt: skip
    """Indices of the classes that have enough images for episodes of this shape.

    Args:
        sizes: images of each class.
        class_names: their names.
        shape: of the episodes.
        what: the images are, for messages.
        group: of the settings that say the shape, such as 'validation', for messages.
        other: another way out than a smaller shape, for messages.

    Raises:
        DataError: they are fewer than the ways; names the split, the first class that is too small, and what to change.
    """
    dot = f"{group}." if group else ""
    ways_out = f", or {other}" if other else ""
    if len(class_names) < shape.way:
        few = f"has only {len(class_names)} class{'es' * (len(class_names) > 1)} ({listed(class_names)})"
        fewer = f"set {dot}way={len(class_names)}" if len(class_names) > 1 else "episodes need at least two classes"
        raise DataError(f"{dot}way={shape.way}, but {what} {few}; {fewer}{ways_out}")
    if shape.query == "all" and shape.dirichlet:
        raise DataError("unbalanced queries (query_dirichlet) need a number of queries, not query=all")
    kept = np.flatnonzero(sizes >= shape.needed)
    if len(kept) < shape.way:
        first = int(np.argmax(sizes < shape.needed))
        share = " (unbalanced queries may all fall on one class)" if shape.dirichlet else ""
        raise DataError(
            f"class '{class_names[first]}' of {what} has {sizes[first]} images, but shot={shape.shot} and "
            f"query={shape.query} need at least {shape.needed}{share}; {len(kept)} classes have so many, and "
            f"way={shape.way}; {_remedy(sizes, len(kept), shape, dot)}{ways_out}"
        )
    return kept


def _remedy(sizes: NDArray[np.int64], kept: int, shape: Shape, dot: str) -> str:
    """The smallest change to a shape that the classes allow, as settings."""
    left = int(np.sort(sizes)[-shape.way]) - shape.shot
    if shape.query != "all" and not shape.dirichlet and left >= 1:
        return f"set {dot}query={left}"
    if kept >= 2:
        return f"set {dot}way={kept}"
    return f"add images, or set fewer shots and queries ({dot}shots, {dot}query)"


def too_small(sizes: NDArray[np.int64], class_names: list[str], shape: Shape) -> str:
    """A sentence about the classes that `large_enough` leaves out, and why."""
    out = [f"'{name}' ({size})" for name, size in zip(class_names, sizes, strict=True) if size < shape.needed]
    return (
        f"{len(out)} of {len(sizes)} classes fall out, as shot={shape.shot} and query={shape.query} need "
        f"{shape.needed} images of a class: {listed(out)}"
    )


def _sample(sizes: NDArray[np.int64], count: int, uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """`count` different numbers below each of `sizes`, in random order.

    Robert Floyd's algorithm (Bentley and Floyd, CACM 1987) gives the set, for all sizes at once; its order is not
    random, so it is shuffled.

    Args:
        sizes: [...], none below `count`.
        count: how many.
        uniform: [..., 2 * count] in [0, 1).
    """
    chosen = np.empty((count, *sizes.shape), dtype=np.int32)
    for step in range(count):
        top = sizes - count + step
        pick = (uniform[..., step] * (top + 1)).astype(np.int32)
        taken = (chosen[:step] == pick).any(axis=0)
        chosen[step] = np.where(taken, top, pick)
    order = np.argsort(uniform[..., count:], axis=-1)
    drawn: NDArray[np.int64] = np.take_along_axis(np.moveaxis(chosen, 0, -1).astype(np.int64), order, axis=-1)
    return drawn


def _round_shares(shares: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Whole numbers of sum `total` nearest to the shares [episodes, way]: the largest remainders are rounded up."""
    exact = shares * total
    counts: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    rank = np.argsort(np.argsort(counts - exact, axis=1, kind="stable"), axis=1)
    counts += rank < (total - counts.sum(axis=1))[:, None]
    return counts
