"""Which images meet in the passes of one optimiser step, and how many of the step's pairs each pass holds.

Pairs form within a pass. A term is the mean over all pairs of a step, so the share of a pass follows from the labels of
all its passes, which are known before the first of them runs: the shares add up to what one pass over the whole batch
gives, wherever the pairs are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smkd import distributed


class Pass(NamedTuple):
    """One of the forward and backward passes that make an optimiser step; all tensors are on the CPU.

    Attributes:
        classes: int64 [images], equal for images that are paired. The images are those whose teacher outputs meet
            this device's student: its own, or those of all devices.
        start: place of this device's first image among them.
        batch: images of this device.
        sizes: for each pass of the step, how many of its images each class has, int64 [classes].
        last: the step ends with this pass.
    """

    classes: Tensor
    start: int
    batch: int
    sizes: tuple[Tensor, ...]
    last: bool

    @property
    def devices(self) -> int:
        """Devices whose pairs are averaged together."""
        return len(self.classes) // self.batch

    @property
    def passes(self) -> int:
        """Passes of the step."""
        return len(self.sizes)

    def pairs(self, *, own: bool) -> Tensor:
        """bool [images, batch]: image i of the teacher and image j of the student are of one class.

        Args:
            own: pair an image with itself.
        """
        mine = self.classes[self.start : self.start + self.batch]  # [batch]
        pairs = self.classes[:, None] == mine[None, :]  # [images, batch]
        images = torch.arange(self.batch)
        pairs[self.start + images, images] = own
        return pairs

    def share(self, total: Tensor, count: int) -> Tensor:
        """This pass's share of a mean over the step.

        Args:
            total: sum of this device's summands in this pass.
            count: summands of the whole step, of all devices that are averaged together; 0 if there are none.

        Returns:
            What passes add up to the mean, and devices average to it.
        """
        return total * self.devices / max(count, 1)


def passes_of(labels: Sequence[Tensor], *, paired: bool, pooled: bool) -> list[Pass]:
    """The passes of an optimiser step.

    Args:
        labels: int64 [batch] on the CPU for each pass, of this device's images.
        paired: images of one class meet; otherwise each meets itself alone.
        pooled: a device's images meet those of all devices. The labels are exchanged for that, once a step.
    """
    batch, start = len(labels[0]), 0
    if not paired:
        classes = [torch.arange(len(each)) for each in labels]
    elif pooled:
        classes = list(distributed.gather(torch.stack(list(labels)), dim=1))  # [images] for each pass
        start = distributed.rank() * batch
    else:
        classes = list(labels)
    sizes = tuple(each.unique(return_counts=True)[1] for each in classes)
    last = len(classes) - 1
    return [Pass(each, start, batch, sizes, number == last) for number, each in enumerate(classes)]
