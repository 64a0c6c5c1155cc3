"""Pictures of runs and of what networks look at, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from smkd.config.schema import RunConfig
from smkd.data.color import ColorParameters, augment, normalize
from smkd.data.datasets import Images, configured_spec
from smkd.data.loader import MultiCropDataset
from smkd.errors import DataError
from smkd.interop import jsontext
from smkd.models.vit import VisionTransformer, patch_attention

MASK_SHADE = 0.25


def read_metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    """Objects of one kind in a run's metrics.jsonl, oldest first; without a last line that is being written.

    Raises:
        DataError: there is no such file, or a line of it is damaged; names the line.
    """
    path, found = run / "metrics.jsonl", []
    try:
        for number, (line, record) in enumerate(jsontext.records(path), start=1):
            if record is None and line.endswith("\n"):
                raise DataError(f"'{path}', line {number}: no JSON object; remove the line")
            if record is not None and record.get("kind") == kind:
                found.append(record)
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror}") from error
    return found


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
            picture = augment(crop[None], of_view)[0]
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
