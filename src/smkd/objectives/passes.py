"""The pairs of images in each pass of an optimiser step, and the share of a pass in the step.

Pairs form within a pass. A term is the mean over all pairs of a step. The share of a pass follows from the labels of
all passes, which are known before the first one runs. If the pairs are the same, the shares add up to the result of one
pass over the whole batch.
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
        images: int64 [images, 2], class and number of each image whose teacher outputs meet this device's student: its
            own images, or those of all devices. Images of one class are paired, but an image that is there twice is
            not another image of its class.
        start: place of this device's first image among them.
        batch: images of this device.
        partners: for each pass of the step, how many other images each of its images is paired with, int64 [images].
        last: the step ends with this pass.
    """

    images: Tensor
    start: int
    batch: int
    partners: tuple[Tensor, ...]
    last: bool

    @property
    def devices(self) -> int:
        """Devices whose pairs are averaged together."""
        return len(self.images) // self.batch

    @property
    def passes(self) -> int:
        """Passes of the step."""
        return len(self.partners)

    def pairs(self, *, own: bool) -> Tensor:
        """bool [images, batch]: image i of the teacher and image j of the student are different ones of one class.

        Args:
            own: pair each image with itself too.
        """
        mine = self.images[self.start : self.start + self.batch]  # [batch, 2]
        of_class, of_image = (self.images[:, None] == mine[None, :]).unbind(dim=2)  # [images, batch]
        pairs = of_class & ~of_image
        own_places = torch.arange(self.batch)
        pairs[self.start + own_places, own_places] = own
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


def passes_of(labels: Sequence[Tensor], images: Sequence[Tensor | None], *, paired: bool, pooled: bool) -> list[Pass]:
    """The passes of an optimiser step.

    Args:
        labels: int64 [batch] on the CPU for each pass, of this device's images.
        images: int64 [batch] on the CPU for each pass, numbers of the images; None if all of a pass differ.
        paired: images of one class meet; otherwise each meets itself alone.
        pooled: a device's images meet those of all devices. Classes and numbers are exchanged for that, once a step.
    """
    batch = len(labels[0])
    start = distributed.rank() * batch if pooled else 0
    places = start + torch.arange(batch)  # [batch]
    classes = labels if paired else [places] * len(labels)
    numbers = [places if each is None else each for each in images]
    mine = torch.stack([torch.stack(of_pass, dim=1) for of_pass in zip(classes, numbers, strict=True)])
    meeting = (distributed.gather(mine, dim=1) if pooled else mine).unbind()  # [images, 2] for each pass
    partners = tuple(_equal(each[:, 0]) - _equal(each[:, 1]) for each in meeting)
    last = len(labels) - 1
    return [Pass(each, start, batch, partners, number == last) for number, each in enumerate(meeting)]


def _equal(values: Tensor) -> Tensor:
    """How often each value is there, int64 [values]."""
    return (values[:, None] == values[None, :]).sum(dim=1)
