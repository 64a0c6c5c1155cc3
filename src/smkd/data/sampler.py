"""Which images make up each batch: a pure function of (seed, epoch), the same for any number of devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from smkd.config.schema import SamplerConfig
from smkd.data.augment import ORDER, generator
from smkd.data.images import rows_by_label
from smkd.errors import ConfigError, DataError

Indices = NDArray[np.int64]


class Pick(NamedTuple):
    """One image of a batch.

    Attributes:
        epoch: counted from 0.
        image: its number.
        occurrence: how often the image came before in the epoch, in batches of all devices.
    """

    epoch: int
    image: int
    occurrence: int = 0


class EpochSampler(Sampler[list[Pick]]):
    """This device's share of each batch of one epoch.

    Every step takes `batch_size` images, cut into `passes` equal consecutive parts; this device takes part
    `pass * world + rank` of each accumulation pass. A short last batch is dropped.

    Args:
        labels: class of each image.
        batch_size: images per step, over all devices and passes.
        balanced: class-balanced batches; none draws every image once in random order.
        accumulate: passes per step on each device.
        rank, world: number of this device and of all devices.

    Raises:
        ConfigError: a device's share of a pass would hold a part of a class's images in a balanced batch.
        DataError: fewer images than a batch, or fewer classes than a balanced batch asks for.
    """

    def __init__(
        self, labels: Indices, batch_size: int, seed: int, *, balanced: SamplerConfig | None = None,
        accumulate: int = 1, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        if len(labels) < batch_size:
            raise DataError(
                f"batch_size={batch_size} is larger than the training set ({len(labels)} images); set batch_size to "
                f"{len(labels)} or less"
            )
        classes = len(np.unique(labels))
        if balanced is not None and balanced.classes > classes:
            raise DataError(f"data.sampler.classes={balanced.classes}, but there are only {classes} training classes")
        if balanced is not None and balanced.classes % (world * accumulate):
            raise ConfigError(
                f"data.sampler.classes={balanced.classes}: devices x num_nodes x accumulate = {world * accumulate} "
                f"shares would cut a class; use a multiple of {world * accumulate} classes"
            )
        self.labels, self.batch_size, self.seed, self.balanced = labels, batch_size, seed, balanced
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.epoch = self.start = 0

    @property
    def steps(self) -> int:
        """Optimiser steps of a whole epoch."""
        return len(self.labels) // self.batch_size

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iteration runs through, and the step within it at which that begins."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[list[Pick]]:
        rng = generator(self.seed, self.epoch, 0, ORDER)
        order = rng.permutation(len(self.labels)) if self.balanced is None else self._balanced_order(rng)
        times = _occurrences(order)
        share = self.batch_size // (self.world * self.accumulate)
        for step in range(self.start, self.steps):
            for turn in range(self.accumulate):
                start = step * self.batch_size + (turn * self.world + self.rank) * share
                some = slice(start, start + share)
                yield [Pick(self.epoch, *pick) for pick in zip(order[some].tolist(), times[some].tolist(), strict=True)]

    def _balanced_order(self, rng: np.random.Generator) -> Indices:
        """Batches of different classes, each with its images side by side; classes and images take turns."""
        assert self.balanced is not None
        images = [rows for rows in rows_by_label(self.labels, 0) if len(rows)]
        class_turns = _Deck(np.arange(len(images)), rng)
        image_turns = [_Deck(members, rng) for members in images]
        order = []
        for _ in range(self.steps):
            for label in class_turns.deal(self.balanced.classes):
                order.append(image_turns[label].deal(self.balanced.per_class))
        return np.concatenate(order)


def _occurrences(order: Indices) -> Indices:
    """How often each entry came before."""
    sorted_places = np.argsort(order, kind="stable")
    _, first, counts = np.unique(order[sorted_places], return_index=True, return_counts=True)
    times = np.empty_like(order)
    times[sorted_places] = np.arange(len(order)) - np.repeat(first, counts)
    return times


class _Deck:
    """A deck of cards in random order, shuffled again when it runs out; a hand repeats no card if possible."""

    def __init__(self, cards: Indices, rng: np.random.Generator) -> None:
        self.cards, self.rng = cards, rng
        self.left = cards[:0]

    def deal(self, count: int) -> Indices:
        hand = self.left[:count]
        self.left = self.left[count:]
        while len(hand) < count:
            fresh = self.rng.permutation(self.cards)
            # cards already in this hand go to the back
            fresh = np.concatenate([fresh[~np.isin(fresh, hand)], fresh[np.isin(fresh, hand)]])
            missing = count - len(hand)
            hand, self.left = np.concatenate([hand, fresh[:missing]]), fresh[missing:]
        return hand
