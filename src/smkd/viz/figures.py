"""Pictures of runs, of what networks look at, and of few-shot results, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from smkd.config import foreign_text
from smkd.config.run_config import RunConfig
from smkd.data.color import ColorParameters, augment_color, normalize
from smkd.data.datasets import configured_spec
from smkd.data.images import Images
from smkd.data.loader import MultiCropDataset
from smkd.errors import DataError
from smkd.fewshot.accuracy import Result
from smkd.models.vit import VisionTransformer, patch_attention

MASK_SHADE = 0.25


def read_metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    """Objects of one kind in a run's metrics.jsonl, oldest first; without a last line that is being written.

    Raises:
        DataError: there is no such file, or a line of it is damaged; names the line.
    """
    path, found = run / "metrics.jsonl", []
    try:
        for number, (line, record) in enumerate(foreign_text.json_records(path), start=1):
            if record is None and line.endswith("\n"):
                raise DataError(f"'{path}', line {number}: no JSON object; remove the line")
            if record is not None and record.get("kind") == kind:
                found.append(record)
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror}") from error
    return found


def read_history(run: Path) -> list[tuple[int, str]]:
    """What was changed in a run after its start, and at which step, oldest first; damaged lines are left out."""
    path = run / "history.jsonl"
    records = [record for _, record in foreign_text.json_records(path)] if path.is_file() else []
    return [
        (record["step"], str(change))
        for record in records
        if record is not None and isinstance(record.get("step"), int) and isinstance(record.get("changes"), list)
        for change in record["changes"]
    ]


def loss_curves(runs: Mapping[str, Path]) -> Figure:
    """Training losses of runs side by side, every term and the total against the step."""
    figure = Figure(figsize=(4.6 * len(runs), 3.2), layout="constrained")
    for number, (title, run) in enumerate(runs.items(), start=1):
        axes = figure.add_subplot(1, len(runs), number)
        records = read_metrics(run, "train")
        for term in ("loss", "cls", "mim", "patch", "supervised"):
            if records and term in records[0]:
                style = {"color": "black", "linewidth": 1.8} if term == "loss" else {"linewidth": 1.2}
                axes.plot([r["step"] for r in records], [r[term] for r in records], label=term, **style)
        axes.set(title=title, xlabel="step", ylabel="loss")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def accuracy_bars(rows: Mapping[str, Mapping[int, tuple[float, float]]]) -> Figure:
    """Accuracy per model and number of shots, with 95 % intervals."""
    shots = list(next(iter(rows.values())))
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(shots)
    for number, shot in enumerate(shots):
        places = np.arange(len(rows)) + (number - (len(shots) - 1) / 2) * width
        means, intervals = zip(*(row[shot] for row in rows.values()), strict=True)
        bars = axes.bar(places, means, width * 0.92, yerr=intervals, capsize=3, label=f"{shot}-shot")
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.set(ylabel="accuracy (%)", xticks=range(len(rows)), xticklabels=list(rows))
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(shots))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def views_grid(images: Images, config: RunConfig, chosen: Sequence[int], epoch: int = 0) -> Figure:
    """What the student sees of some images: the image, its global views with masks, its local views."""
    dataset = MultiCropDataset(images, config)
    count = config.global_views.count + config.local_views.count
    figure = Figure(figsize=(1.1 * (1 + count), 1.15 * len(chosen) + 0.3), layout="constrained")
    axes = figure.subplots(len(chosen), 1 + count, squeeze=False)
    for row, index in zip(axes, chosen, strict=True):
        sample = dataset[(epoch, index)]
        _show(row[0], images.load(index).float() / 255)
        parameters = ColorParameters.unpack(torch.from_numpy(sample.draws.color))
        for view, crop in enumerate(sample.crops):
            of_view = ColorParameters(*(getattr(parameters, name)[view : view + 1] for name in vars(parameters)))
            picture = augment_color(crop[None], of_view)[0]
            if view < len(sample.draws.masks):
                picture = _shaded(picture, torch.from_numpy(sample.draws.masks[view]))
            _show(row[1 + view], picture)
    titles = ["image"] + ["global, masked"] * config.global_views.count + ["local"] * config.local_views.count
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=7)
    return figure


@torch.inference_mode()
def attention_grid(
    backbones: Mapping[str, VisionTransformer], images: Images, config: RunConfig, chosen: Sequence[int]
) -> Figure:
    """[CLS] attention of the last block over some images, heads averaged, one row per network.

    Args:
        backbones: networks by name, on the CPU.
        chosen: images; they are resized to the evaluation's square.
    """
    spec, side = configured_spec(config.data), config.evaluation.crop
    pixels = torch.stack(
        [F.interpolate(images.load(i)[None].float() / 255, (side, side), mode="bilinear")[0] for i in chosen]
    )
    figure = Figure(figsize=(1.15 * len(chosen) + 0.6, 1.2 * (1 + len(backbones))), layout="constrained")
    axes = figure.subplots(1 + len(backbones), len(chosen), squeeze=False)
    for axis, picture in zip(axes[0], pixels, strict=True):
        _show(axis, picture)
    for row, (name, backbone) in zip(axes[1:], backbones.items(), strict=True):
        tokens = backbone(normalize(pixels, spec.mean, spec.std), attention=True)
        grid = side // backbone.patch_size
        maps = patch_attention(tokens.attention, grid * grid).unflatten(1, (grid, grid))
        for axis, attention in zip(row, maps, strict=True):
            axis.imshow(attention.numpy(), cmap="magma", interpolation="nearest")
            axis.set_axis_off()
        row[0].set_axis_on()
        row[0].set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=8)
    return figure


def _shaded(picture: Tensor, mask: Tensor) -> Tensor:
    """Darken masked patches."""
    hidden = F.interpolate(mask[None, None].float(), picture.shape[1:], mode="nearest")[0]
    return picture * (1 - (1 - MASK_SHADE) * hidden)


def _show(axis: Any, picture: Tensor) -> None:
    pixels: NDArray[np.float32] = picture.clamp(0, 1).permute(1, 2, 0).numpy()
    axis.imshow(pixels, interpolation="nearest")
    axis.set_axis_off()


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
