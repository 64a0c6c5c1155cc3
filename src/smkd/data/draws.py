"""What is drawn for a sample, before any pixel is looked at: boxes, masks and colour parameters of its views."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from smkd.config.schema import RunConfig
from smkd.data.color import draw_color
from smkd.data.crops import Box, random_box
from smkd.data.masks import draw_mask
from smkd.data.randomness import OCCURRENCE, Streams


class Draws(NamedTuple):
    """Random choices of one sample, global views first.

    Attributes:
        boxes: one a view.
        masks: bool [global views, rows, columns].
        color: float32 [views, 13], rows of `draw_color`.
    """

    boxes: list[Box]
    masks: NDArray[np.bool_]
    color: NDArray[np.float32]


class Drawing:
    """Draws samples; a pure function of the configuration's seed and its arguments.

    Args:
        config: views, masks, colours and seed.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config, self.streams = config, Streams(config.seed)
        side = config.global_views.size // config.model.patch_size
        self.grid = (side, side)

    def __call__(self, epoch: int, index: int, height: int, width: int, occurrence: int = 0) -> Draws:
        """Draws of one sample.

        Args:
            epoch: counted from 0.
            index: number of the image.
            height, width: of the image in pixels.
            occurrence: how often the image came before in the epoch.
        """
        config, num_global = self.config, self.config.global_views.count
        boxes, masks, color = [], [], []
        for view in range(num_global + config.local_views.count):
            rng = self.streams.at(epoch, index, occurrence * OCCURRENCE + view)
            kind = config.global_views if view < num_global else config.local_views
            boxes.append(random_box(height, width, kind.scale, rng))
            color.append(draw_color(config.augment, view, num_global, rng))
            if view < num_global:
                masks.append(draw_mask(config.mask, self.grid, epoch, rng))
        return Draws(boxes, np.stack(masks), np.stack(color))
