"""Pictures of few-shot results: curves, confusions, distributions over episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from smkd.fewshot.accuracy import Result

HARDEST = 5
PANELS_IN_A_ROW = 3
LONGEST_NAME = 18


def accuracy_curves(rows: Mapping[str, Sequence[Result]]) -> Figure:
    """Accuracy against shots, a panel per way; against ways too, where there are several.

    Args:
        rows: results of each curve by name.
    """
    results = [result for row in rows.values() for result in row]
    ways, shots = sorted({r.way for r in results}), sorted({r.shot for r in results})
    panels = [("shots", [r for r in results if r.way == way], f"{way}-way") for way in ways]
    if len(ways) > 1:
        panels += [("ways", [r for r in results if r.shot == shot], f"{shot}-shot") for shot in shots]
    columns = min(len(panels), PANELS_IN_A_ROW)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.6, 2.9 * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    for spare in axes[len(panels) :]:
        spare.set_axis_off()
    for axis, (against, chosen, title) in zip(axes, panels, strict=False):
        wanted = {id(result) for result in chosen}
        for name, row in rows.items():
            points = sorted((r.shot if against == "shots" else r.way, r.mean, r.ci95) for r in row if id(r) in wanted)
            places, means, intervals = zip(*points, strict=True)
            axis.errorbar(places, means, yerr=intervals, marker="o", markersize=4, capsize=3, label=name)
        axis.set(title=title, xlabel=against, xticks=shots if against == "shots" else ways)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.92")
    for first in axes[::columns]:
        first.set_ylabel("accuracy (%)")
    if len(rows) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=3)
    return figure


def class_confusion(result: Result) -> NDArray[np.float64]:
    """Percent of a class's queries that are given to each class, of the episodes that have both: [true, given].

    The diagonal is the accuracy of the class; NaN where two classes never met.
    """
    count = len(result.class_names)
    given, asked = torch.zeros(count, count), torch.zeros(count, count)
    pair = result.classes[:, :, None] * count + result.classes[:, None, :]
    given.view(-1).index_add_(0, pair.flatten(), result.counts.flatten().float())
    of_way = result.counts.sum(dim=2, keepdim=True).expand_as(result.counts)
    asked.view(-1).index_add_(0, pair.flatten(), of_way.flatten().float())
    shares: NDArray[np.float64] = (100 * given.double() / asked).numpy()
    return shares


def confusion(result: Result) -> Figure:
    """Class against class; classes in the order of their accuracy."""
    shares = class_confusion(result)
    order = np.argsort(-np.nan_to_num(shares.diagonal(), nan=-1.0))
    names = [_short(result.class_names[label]) for label in order]
    shares = shares[np.ix_(order, order)]
    mistakes = shares.copy()
    np.fill_diagonal(mistakes, np.nan)
    side = max(4.0, 0.3 * len(names) + 1.6)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(mistakes, cmap="Reds", vmin=0)
    if len(names) <= 40:
        for place, share in enumerate(shares.diagonal()):
            axes.text(place, place, f"{share:.0f}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set(xlabel="given", ylabel="true; on the diagonal the accuracy of the class (%)")
    figure.colorbar(drawn, ax=axes, label="mistaken for it (%)", shrink=0.7)
    return figure


class ClassSet(NamedTuple):
    """Classes that met in episodes.

    Attributes:
        names: of the classes.
        mean: accuracy in percent.
        episodes: how many.
    """

    names: tuple[str, ...]
    mean: float
    episodes: int


def hardest_sets(result: Result, count: int = HARDEST, least: int = 10) -> list[ClassSet]:
    """Pairs of classes whose episodes have the lowest mean accuracy, the hardest first.

    Whole episodes hardly ever repeat their classes; pairs do, `least` times at least.
    """
    total = len(result.class_names)
    first, second = torch.triu_indices(result.way, result.way, 1)
    low, high = (f(result.classes[:, first], result.classes[:, second]) for f in (torch.minimum, torch.maximum))
    pair = (low * total + high).flatten()
    values = result.accuracies[:, None].expand(-1, len(first)).flatten()
    seen = torch.zeros(total * total, dtype=torch.float64).index_add_(0, pair, torch.ones_like(values))
    sums = torch.zeros(total * total, dtype=torch.float64).index_add_(0, pair, values)
    enough = (seen >= min(least, float(seen.max()))).nonzero().flatten()
    ranked = enough[(sums[enough] / seen[enough]).argsort()][:count].tolist()
    return [
        ClassSet(
            (result.class_names[p // total], result.class_names[p % total]), float(sums[p] / seen[p]), int(seen[p])
        )
        for p in ranked
    ]


def episode_distribution(result: Result) -> Figure:
    """Histogram of the episodes' accuracies, the hardest episode's classes, and the hardest pairs of classes."""
    values: Tensor = result.accuracies
    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    axes, words = figure.subplots(1, 2, width_ratios=(1.25, 1))
    axes.hist(values.numpy(), bins=_edges(values, int(result.counts[0].sum())), color="0.75")
    axes.axvline(result.mean, color="black", linewidth=1.2, label=f"mean {result}")
    low = float(values.quantile(0.05))
    axes.axvline(low, color="tab:red", linewidth=1.2, linestyle="--", label=f"5 % of the episodes are below {low:.1f}")
    axes.set(xlabel="accuracy of an episode (%)", ylabel="episodes")
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    worst = int(values.argmin())
    classes = ", ".join(_short(result.class_names[label]) for label in result.classes[worst].tolist())
    lines = [f"hardest episode, {float(values[worst]):.1f} %:", f"  {classes}", "", "hardest pairs of classes:"]
    lines += [f"  {s.mean:5.1f} %  {_short(s.names[0])} / {_short(s.names[1])}" for s in hardest_sets(result)]
    words.set_axis_off()
    words.text(0, 0.95, "\n".join(lines), va="top", fontsize=8.5, transform=words.transAxes, wrap=True)
    return figure


def _edges(values: Tensor, queries: int, bins: int = 30) -> NDArray[np.float64]:
    """Bins that hold equally many of the accuracies an episode can have, else some would stick out."""
    step = 100 / queries
    low, high = float(values.min()), float(values.max())
    width = step * max(1, round((high - low) / bins / step))
    edges: NDArray[np.float64] = np.arange(low - step / 2, high + width, width)
    return edges


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
