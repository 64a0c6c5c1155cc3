"""What training makes of images: crops and masks; and who answers to whom in each phase."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from smkd.config.run_config import RunConfig
from smkd.data.color import ColorParameters, augment_color
from smkd.data.images import Images
from smkd.data.loader import MultiCropDataset
from smkd.viz.style import FAINT, INK, TERMS, styled
from smkd.viz.tiles import Tile, picture, short

MASK_SHADE = 0.85
SIZE = (4.4, 4.1)
"""Of the picture of a phase, in inches."""


def view_tiles(images: Images, config: RunConfig, chosen: Sequence[int], epoch: int = 0) -> list[Tile]:
    """A row for each image: the image, its global views with masked patches grey, its local views.

    Args:
        images: to train on.
        config: how they are cut, coloured and masked; an epoch before `mask.start_epoch` has no masks.
        chosen: which images.
        epoch: whose random numbers are drawn, as training draws them.
    """
    tiles = []
    for index in chosen:
        tiles.append(Tile(picture(images.load(index)), _class_of(images, index)))
        masked, local = _views(images, config, index, epoch)[1:]
        tiles += [Tile(picture(view), "global, masked") for view in masked]
        tiles += [Tile(picture(view), "local") for view in local]
    return tiles


def _class_of(images: Images, index: int) -> str:
    """The name of an image's class; of images without classes, `image`."""
    return short(images.class_names[images.labels[index]], 18) if images.class_names else "image"


def _views(
    images: Images, config: RunConfig, index: int, epoch: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Global views, the same with their masked patches grey, and local views, each [3, size, size] on the 0-1 scale."""
    sample = MultiCropDataset(images, config)[(epoch, index)]
    parameters = ColorParameters.unpack(torch.from_numpy(sample.draws.color))
    colored = []
    for view, crop in enumerate(sample.crops):
        of_view = ColorParameters(*(getattr(parameters, name)[view : view + 1] for name in vars(parameters)))
        colored.append(augment_color(crop[None], of_view)[0])
    count = config.global_views.count
    masks = [torch.from_numpy(mask) for mask in sample.draws.masks]
    masked = [_shaded(view, mask) for view, mask in zip(colored[:count], masks, strict=True)]
    return colored[:count], masked, colored[count:]


def _shaded(view: Tensor, mask: Tensor) -> Tensor:
    """Turn masked patches grey, so that they are seen on dark and on bright images."""
    hidden = F.interpolate(mask[None, None].float(), view.shape[1:], mode="nearest")[0]
    return view + MASK_SHADE * hidden * (0.5 - view)


def phase_picture(images: Images, config: RunConfig, chosen: Sequence[int]) -> Figure:
    """Who answers to whom: the student's views to the left, the teacher's to the right, an arrow for each term.

    Args:
        images: to train on.
        config: its terms and views.
        chosen: two images; in phase 2 of one class.
    """
    first, second = chosen[0], chosen[-1] if config.objective.labels else chosen[0]
    epoch = config.mask.start_epoch
    plain, masked, local = _views(images, config, first, epoch)
    target = _views(images, config, second, epoch)[0][-1]
    shown = local[:2] or masked[1:2]
    with styled():
        figure = Figure(figsize=SIZE)
        stage = figure.add_axes((0, 0, 1, 1))
        stage.set(xlim=(0, SIZE[0]), ylim=(0, SIZE[1]))
        stage.set_axis_off()
        _words(stage, 0.05, 3.95, "Student", INK, 11)
        _words(stage, 0.05, 3.73, f"views of one {_class_of(images, first)}", FAINT)
        _words(stage, 2.7, 3.95, "Teacher", INK, 11)
        _words(stage, 2.7, 3.73, "another of its class" if config.objective.labels else "another view of it", FAINT)
        _image(figure, masked[0], (0.05, 2.35), 1.25)
        _words(stage, 0.05, 2.22, "global, patches hidden", FAINT)
        for place, view in enumerate(shown):
            _image(figure, view, (0.05 + 0.87 * place, 1.2), 0.8)
        if shown:
            _words(stage, 0.05, 1.07, "local: small parts" if local else "global", FAINT)
        _image(figure, target if config.objective.labels else plain[-1], (2.7, 1.75), 1.65)
        for number, (line, color, starts) in enumerate(_terms(config, bool(shown))):
            for x, y in starts:
                arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 1.8}
                stage.annotate("", (2.65, 2.75 - 0.3 * number), (x, y - 0.3 * number), arrowprops=arrow)
            _words(stage, 0.05, 0.72 - 0.24 * number, line, color)
    return figure


def _terms(config: RunConfig, both: bool) -> list[tuple[str, str, list[tuple[float, float]]]]:
    """Each term in words, its colour, and where its arrows begin: at the global view, and for [CLS] at the others."""
    objective, whose = config.objective, "another image" if config.objective.labels else "another view"
    on_global, on_local = (1.35, 3.1), (1.8, 1.6)
    said = []
    if objective.cls.weight > 0:
        starts = [on_global, on_local] if both else [on_global]
        said.append((f"[CLS] of each view predicts the teacher's of {whose}", TERMS["cls"], starts))
    if objective.mim.weight > 0:
        said.append(("hidden patches predict the teacher's patches", TERMS["mim"], [on_global]))
    if objective.patch.weight > 0:
        said.append(("patches predict those that match them", TERMS["patch"], [on_global]))
    return said


def _words(axes: Axes, x: float, y: float, text: str, color: str, size: float = 9) -> None:
    axes.text(x, y, text, color=color, fontsize=size, va="center")


def _image(figure: Figure, view: Tensor, corner: tuple[float, float], side: float) -> None:
    width, height = SIZE
    axes = figure.add_axes((corner[0] / width, corner[1] / height, side / width, side / height))
    small = picture(view).resize((round(side * 130),) * 2, Image.Resampling.BICUBIC)
    axes.imshow(np.asarray(small))
    axes.set_axis_off()
