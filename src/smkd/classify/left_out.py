"""Support images that a head has not learned from: its accuracy on them, and the temperature of its probabilities.

This needs a class with two images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smkd.fewshot import intervals
from smkd.fewshot.head import Head, Learned
from smkd.fewshot.heads import make_head
from smkd.fewshot.linear import Logistic

AUTO = "auto"
CANDIDATES = ("ridge", "prototype", "knn", "logistic", "logistic:c=10")
"""The first is taken unless another is better by more than a standard error: it is the best on average."""
FEW = "prototype"
"""The head where a class has fewer than `SHOTS` images."""
SHOTS = 5
"""Images that every class needs for a choice."""
ROUNDS, CHOICE_ROUNDS = 20, 10
"""Images are left out in at most this many rounds; fewer where heads are compared."""
SPREAD = 1.75
"""Variance of a left-out accuracy over that of as many independent images, which learn from one another: measured, so
that the interval holds the accuracy on other images in 90 to 98 % of draws (`benchmarks/left_out.py`)."""
SHOWN_CLASSES = 20
BISECTIONS = 60
FINEST, COARSEST = 1e-4, 1e4
"""Bounds of the temperature, in units of the scores' own spread."""


class LeftOut(NamedTuple):
    """Scores of support images by a head that learned from the others, in the order of the support.

    Attributes:
        scores: float64 [images, classes].
        truth: int64 [images].
    """

    scores: Tensor
    truth: Tensor

    @property
    def own(self) -> Tensor:
        """Which are given their own class, bool [images]."""
        return self.scores.argmax(dim=1) == self.truth


def left_out(head: Head, support: Tensor, labels: Tensor, seed: int, rounds: int = ROUNDS) -> LeftOut:
    """Score every support image whose class has another one, without it.

    One image of each class is left out at a time, so that all classes lose equally many: leaving out a single image
    would make its own class look less likely than it is. A class with more than `rounds` images leaves out an equal
    share of them at a time. A class with fewer images than the largest leaves one out every time, but each is scored
    only once.

    Args:
        head: see `smkd.fewshot.head`.
        support: float32 [n, dim].
        labels: int64 [n], every class at least once.
        seed: of heads that draw.
        rounds: at most so many.
    """
    counts = labels.bincount()
    scores = torch.empty(len(labels), len(counts), dtype=torch.float64)
    for leave, asked in turns(labels, rounds):
        scores[asked] = Learned(head, support[~leave], labels[~leave], seed).scores(support[asked])
    spare = counts[labels] > 1
    return LeftOut(scores[spare], labels[spare])


def turns(labels: Tensor, most: int = ROUNDS) -> Iterator[tuple[Tensor, Tensor]]:
    """Which images are left out together, and which of them are scored: bool [n] each, round by round (`left_out`)."""
    counts = labels.bincount()
    place = torch.empty_like(labels)
    for label, count in enumerate(counts.tolist()):
        place[labels == label] = torch.arange(count)
    rounds = min(int(counts.max()), most)
    size = counts[labels]
    for number in range(rounds if rounds > 1 else 0):
        turn = place % rounds == number
        yield (turn | (place == number % size)) & (size > 1), turn & (size > 1)


def check_head(head: str) -> None:
    """Raise `ConfigError` for an unknown name or option, before any work is done."""
    if head != AUTO:
        make_head(head, torch.zeros(1))


def choose_head(support: Tensor, labels: Tensor, seed: int) -> str:
    """Name of the head for a support, by stratified cross-validation (`left_out`).

    The first candidate, unless another gives more images their own class: by more than a standard error of the paired
    difference, the square root of the number of images of which one of the two alone is right.

    Args:
        support: float32 [n, dim].
        labels: int64 [n].
        seed: of heads that draw.
    """
    if int(labels.bincount().min()) < SHOTS:
        return FEW
    small = _isometric(support)
    heads = [_QuickLogistic(head.c) if isinstance(head, Logistic) else head
             for head in (make_head(name, small.mean(dim=0)) for name in CANDIDATES)]  # fmt: skip
    own = torch.stack([left_out(head, small, labels, seed, CHOICE_ROUNDS).own for head in heads])
    gained, lost = (own & ~own[0]).sum(dim=1), (own[0] & ~own).sum(dim=1)  # [candidates]
    margins = gained - lost - (gained + lost).sqrt()
    best = int(margins.argmax())  # of equal ones the first
    return CANDIDATES[best if margins[best] > 0 else 0]


class _QuickLogistic(Logistic):
    """Near enough to the minimum: 2 % of left-out images of hard classes get another class than from the exact head.

    With a tolerance of 1e-4 it was 9 %, and up to 14 points fewer were right.
    """

    tolerance, is_exact, end = 1e-5, False, 1e-5


def _isometric(support: Tensor) -> Tensor:
    """Features with the same inner products, which is what the candidates work with, of no more numbers than images."""
    if support.shape[1] <= len(support):
        return support
    triangle: Tensor = torch.linalg.qr(support.double().T, mode="r").R  # [images, images]
    return triangle.T.float()


def fitted_temperature(left: LeftOut, learned: Learned) -> float:
    """Temperature T of the probabilities softmax(scores / T).

    The T under which the left-out images' own classes are most likely (Guo et al., ICML 2017), where of N images
    1 / (N + 1) of one is assumed to be spread over all classes (Platt, 1999); otherwise T would be 0 if all images are
    right. If no class has two images, T is a guess: the standard deviation of the scores that the support gets for
    other classes than its own.

    Args:
        left: scores of left-out images.
        learned: the head on the whole support.
    """
    if not len(left.truth):
        scores = learned.scores(learned.support[0])
        others = scores[~F.one_hot(learned.labels[0], scores.shape[1]).bool()]
        return float(others.std(correction=0)) or 1.0
    scores = left.scores - left.scores.mean(dim=1, keepdim=True)
    spread = float(scores.std(correction=0))
    if not spread:
        return 1.0
    images, way = scores.shape
    target = (images * F.one_hot(left.truth, way).double() + 1 / way) / (images + 1)
    low, high = math.log(FINEST), math.log(COARSEST)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        # the likelihood's slope by 1 / T never falls as 1 / T grows
        slope = (((scores / (spread * math.exp(middle))).softmax(dim=1) - target) * scores).sum()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return spread * math.exp((low + high) / 2)


class ClassShare(NamedTuple):
    """How many of a class's left-out images are given their own class.

    Attributes:
        images: how many were left out; none of a class with one image.
    """

    name: str
    right: int
    images: int


def class_lines(worst_first: Sequence[ClassShare]) -> list[str]:
    """A line for each class, of the first `SHOWN_CLASSES`."""
    lines = [f"  {each.name}: {each.right} of {each.images}" for each in worst_first[:SHOWN_CLASSES]]
    if len(worst_first) > SHOWN_CLASSES:
        lines.append(f"  and {len(worst_first) - SHOWN_CLASSES} classes that do as well or better (--json has all)")
    return lines


@dataclass(frozen=True)
class LeftOutAccuracy:
    """Results of a classifier on its support images, each left out in turn.

    Attributes:
        names: of the classes.
        labels: class of each support image.
        own: for each image whose class has another one, in their order: whether the left-out image gets its own class.
        known: for the same images: `known_proba` of the left-out image.
        strange: for every support image: `known_proba` with its whole class left out; empty with two classes.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...]
    own: tuple[bool, ...]
    known: tuple[float, ...] = ()
    strange: tuple[float, ...] = ()

    @property
    def right(self) -> int:
        """How many left-out images are given their own class."""
        return sum(self.own)

    @property
    def images(self) -> int:
        """How many images were left out; none if no class has two."""
        return len(self.own)

    @property
    def by_class(self) -> list[ClassShare]:
        """Of every class."""
        asked, way = self._asked(), len(self.names)
        right = np.bincount(asked, np.asarray(self.own, np.float64), minlength=way).astype(int)
        images = np.bincount(asked, minlength=way)
        return [ClassShare(*each) for each in zip(self.names, right.tolist(), images.tolist(), strict=True)]

    @property
    def worst_first(self) -> list[ClassShare]:
        """Of the classes with left-out images, the smallest share first."""
        return sorted((each for each in self.by_class if each.images), key=lambda each: each.right / each.images)

    @property
    def mean(self) -> float:
        """Mean over the classes with left-out images of the share that is right, from 0 to 1.

        This estimates the accuracy on new images with equally many of each class. A class with few images counts
        as much as the others.
        """
        return float(np.mean([each.right / each.images for each in self.worst_first]))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean (`smkd.fewshot.intervals.of_class_mean`), of `SPREAD` times fewer images."""
        classes = self.worst_first
        return intervals.of_class_mean(
            [each.right / SPREAD for each in classes], [each.images / SPREAD for each in classes]
        )

    def kept(self, reject: float) -> float | None:
        """Of the left-out images that get their own class, the share whose chance is not below `reject`.

        The mean over classes; None if there are no such images.
        """
        own = np.asarray(self.own, bool)
        return _class_mean(np.asarray(self.known)[own] >= reject, self._asked()[own]) if own.any() else None

    def caught(self, reject: float) -> float | None:
        """Of the images of a class that is left out, the share whose chance is below `reject`.

        The mean over classes; None with two classes, of which one would be left.
        """
        return _class_mean(np.asarray(self.strange) < reject, np.asarray(self.labels)) if self.strange else None

    def threshold(self, reject: float, images: str = "images") -> str:
        """A sentence on what a threshold keeps and catches; empty if neither is known.

        Args:
            reject: the threshold.
            images: what to call them.
        """
        kept, caught = self.kept(reject), self.caught(reject)
        said = [] if kept is None else [f"keeps {100 * kept:.0f} % of the {images} that get their own class"]
        said += [] if caught is None else [f"catches {100 * caught:.0f} % of the {images} of a class left out"]
        return ", ".join(said)

    def as_dict(self, rejects: Sequence[float]) -> dict[str, Any] | None:
        """Plain values for JSON, shares from 0 to 1; None if no image was left out.

        Args:
            rejects: thresholds to report.
        """
        if not self.images:
            return None
        return {
            "mean": self.mean, "interval": list(self.interval), "right": self.right, "images": self.images,
            "classes": [
                {"class": name, "right": right, "images": images} for name, right, images in self.by_class
            ],
            "reject": [
                {"threshold": reject, "kept": self.kept(reject), "caught": self.caught(reject)} for reject in rejects
            ],
        }  # fmt: skip

    def _asked(self) -> Any:
        """Class of each left-out image, int64 [images]."""
        labels = np.asarray(self.labels, np.int64)
        return labels[np.bincount(labels)[labels] > 1]


def _class_mean(which: Any, labels: Any) -> float:
    """Mean over the classes that are there of the share of their images."""
    counts = np.bincount(labels)
    return float((np.bincount(labels, which)[counts > 0] / counts[counts > 0]).mean())
