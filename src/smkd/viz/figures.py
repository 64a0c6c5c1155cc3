"""Pictures of few-shot results, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from smkd.fewshot.accuracy import Result
from smkd.viz.style import INK, WRONG, panel, shading, styled
from smkd.viz.tiles import short

HARDEST = 5
LONGEST_NAME = 18


def accuracy_bars(rows: Mapping[str, Sequence[Result]]) -> Figure:
    """Accuracy of each network for each number of shots, with 95 % intervals and what guessing gives.

    Args:
        rows: results of each network by name, of the same ways and shots.
    """
    shots = list(dict.fromkeys(result.shot for row in rows.values() for result in row))
    figure, axes = panel(height=0.9 + 0.34 * len(rows) * len(shots), xlabel="accuracy (%)")
    guess = 100 / next(result.way for row in rows.values() for result in row)
    with styled():
        height = 0.8 / len(shots)
        for number, shot in enumerate(shots):
            of_shot = [(place, r) for place, row in enumerate(rows.values()) for r in row if r.shot == shot]
            places = np.array([place for place, _ in of_shot]) + (number - (len(shots) - 1) / 2) * height
            bars = axes.barh(
                places, [r.mean for _, r in of_shot], height * 0.9, xerr=[r.ci95 for _, r in of_shot], capsize=2,
                label=f"{shot}-shot", ecolor=INK,
            )  # fmt: skip
            axes.bar_label(bars, fmt="%.1f", fontsize=9, padding=3)
        axes.axvline(guess, color=INK, linewidth=1, linestyle=":", label=f"guessing ({guess:.0f} %)")
        axes.set(yticks=range(len(rows)), yticklabels=[short(name) for name in rows], xlim=(0, 108))
        axes.invert_yaxis()
        axes.grid(visible=False)
        figure.legend(loc="outside lower center", ncols=len(shots) + 1)
    return figure


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
    with styled():
        figure = Figure(figsize=(4.4, 2.7 * len(panels) + 0.5), layout="constrained")
        axes = figure.subplots(len(panels), squeeze=False, sharey=True).flatten()
        for axis, (against, chosen, title) in zip(axes, panels, strict=True):
            wanted = {id(result) for result in chosen}
            for name, row in rows.items():
                points = sorted(
                    (r.shot if against == "shots" else r.way, r.mean, r.ci95) for r in row if id(r) in wanted
                )
                places, means, intervals = zip(*points, strict=True)
                axis.errorbar(places, means, yerr=intervals, marker="o", markersize=4, capsize=3, label=name)
            axis.set(title=title, xlabel=against, xticks=shots if against == "shots" else ways, ylabel="accuracy (%)")
        if len(rows) > 1:
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center")
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
    names = [short(result.class_names[label], LONGEST_NAME) for label in order]
    shares = shares[np.ix_(order, order)]
    mistakes = shares.copy()
    np.fill_diagonal(mistakes, np.nan)
    side = max(3.2, 0.27 * len(names))
    with styled():
        figure = Figure(figsize=(side + 1.6, side + 1.0), layout="constrained")
        axes = figure.add_subplot()
        drawn = axes.imshow(mistakes, cmap=shading(WRONG), vmin=0)
        if len(names) <= 40:
            for place, share in enumerate(shares.diagonal()):
                axes.text(place, place, f"{share:.0f}", ha="center", va="center", fontsize=8)
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
            axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set(xlabel="given", ylabel="true; on the diagonal its accuracy (%)")
        axes.grid(visible=False)
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
    """Histogram of the episodes' accuracies, with their mean and the share of them that is hard."""
    values: Tensor = result.accuracies
    figure, axes = panel(xlabel="accuracy of an episode (%)", ylabel="episodes")
    with styled():
        axes.hist(values.numpy(), bins=_edges(values, int(result.counts[0].sum())).tolist(), color="#9d9d9d")
        axes.axvline(result.mean, color=INK, label=f"mean {result}")
        low = float(values.quantile(0.05))
        axes.axvline(low, color=WRONG, linestyle="--", label=f"5 % of the episodes are below {low:.1f}")
        figure.legend(loc="outside lower center")
    return figure


def hardest_table(result: Result) -> list[list[str]]:
    """The classes of the hardest episode, and the pairs of classes with the lowest mean accuracy, the header first."""
    values = result.accuracies
    worst = int(values.argmin())
    classes = ", ".join(result.class_names[label] for label in result.classes[worst].tolist())
    pairs = [[" / ".join(s.names), f"{s.mean:.1f} %", str(s.episodes)] for s in hardest_sets(result)]
    return [["classes", "accuracy", "episodes"], *pairs, [classes, f"{float(values[worst]):.1f} %", "1, the hardest"]]


def _edges(values: Tensor, queries: int, bins: int = 30) -> NDArray[np.float64]:
    """Bins that hold equally many of the accuracies an episode can have, else some would stick out."""
    step = 100 / queries
    low, high = float(values.min()), float(values.max())
    width = step * max(1, round((high - low) / bins / step))
    edges: NDArray[np.float64] = np.arange(low - step / 2, high + width, width)
    return edges
