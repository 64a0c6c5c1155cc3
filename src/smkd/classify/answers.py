"""Answers of a classifier: rows of many images, and one photograph's answer with the support nearest to it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from smkd.classify.classifier import ImageClassifier
from smkd.classify.encoder import Encoder
from smkd.classify.search import ImageIndex
from smkd.config.protocol import FeaturesConfig
from smkd.fewshot.candidates import narrowed

NEAREST = 5
NONE = "none of these"


@dataclass(frozen=True)
class Photo:
    """An image that can be read.

    Attributes:
        path: its file; two photographs of the same file are equal. Empty for one of the support whose file is not at
            hand.
        feature: float32 [dim].
    """

    path: str
    feature: NDArray[np.float32] = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        """Name of the file."""
        return Path(self.path).name


@dataclass(frozen=True)
class Lesson:
    """A classifier and the photographs that it learned from.

    Attributes:
        classifier: learned; its `encoder_` is the backbone.
        photos: in the order of its support.
        wide: what features of photographs are made of, where that is more than the classifier reads.
    """

    classifier: ImageClassifier
    photos: tuple[Photo, ...]
    wide: FeaturesConfig | None = None

    @property
    def encoder(self) -> Encoder:
        """The backbone."""
        encoder = self.classifier.encoder_
        assert encoder is not None
        return encoder

    def as_read(self, photo: Photo) -> Photo:
        """A photograph with what the classifier reads of its features."""
        if self.wide is None:
            return photo
        read = narrowed(torch.from_numpy(photo.feature)[None], self.wide, self.encoder.config.features)[0]
        return replace(photo, feature=read.numpy())


class Neighbour(NamedTuple):
    """A support photograph, its class, and the cosine of its feature with the query's."""

    photo: Photo
    label: str
    cosine: float


class Answer(NamedTuple):
    """The answer of a classifier for a photograph.

    Attributes:
        photo: the query.
        chances: probability of each class, given that it is one of them, the largest first.
        known: chance that it is of any of the classes; None if no class has two photographs.
        rejected: whether `known` is below the threshold.
        neighbours: the nearest support photographs, nearest first.
    """

    photo: Photo
    chances: dict[str, float]
    known: float | None
    rejected: bool
    neighbours: list[Neighbour]

    @property
    def text(self) -> str:
        """The most probable class, or 'none of these'."""
        return NONE if self.rejected else next(iter(self.chances))

    @property
    def caption(self) -> str:
        """The same with its probability."""
        return self.text if self.rejected else f"{self.text} {100 * self.chances[self.text]:.0f}\u00a0%"


def answer(lesson: Lesson, photo: Photo, reject: float) -> Answer:
    """The classifier's answer for a photograph.

    Args:
        lesson: the classifier and its photographs.
        photo: the query.
        reject: the answer is 'none of these' if `known` is below this.
    """
    classifier, query = lesson.classifier, photo.feature[None]
    chances = classifier.predict_proba(query)[0]
    known = None if classifier.known_ is None else float(classifier.known_proba(query)[0])
    names = [str(name) for name in classifier.classes_]
    # by row: two files may be called the same
    index = ImageIndex(lesson.encoder, classifier.support_, [str(row) for row in range(len(lesson.photos))])
    neighbours = [
        Neighbour(lesson.photos[int(row)], names[classifier.support_labels_[int(row)]], cosine)
        for row, cosine in index.search(query, NEAREST)[0]
    ]
    order = (-chances).argsort(kind="stable")
    return Answer(
        photo, {names[label]: float(chances[label]) for label in order}, known,
        known is not None and known < reject, neighbours,
    )  # fmt: skip


def answer_rows(
    classifier: ImageClassifier, images: Sequence[str], features: NDArray[np.float32], top: int, reject: float | None
) -> list[dict[str, Any]]:
    """Plain values of each image: its answer, the chance that it is known at all, and its most probable classes.

    Args:
        classifier: fitted.
        images: what each image is called.
        features: float32 [images, dim].
        top: how many classes to name.
        reject: chance of any of the classes below which the answer is 'none of these'; None never answers that.

    Raises:
        InputError: `reject` where no class has two images.
    """
    chances = classifier.predict_proba(features)
    # without a threshold an unknown chance is no mistake
    known = None if reject is None and classifier.known_ is None else classifier.known_proba(features)
    names = [str(name) for name in classifier.classes_]
    found = []
    for row, image in enumerate(images):
        best = [int(label) for label in (-chances[row]).argsort(kind="stable")[:top]]
        refused = reject is not None and known is not None and known[row] < reject
        found.append({
            "image": image, "answer": NONE if refused else names[best[0]],
            "known": None if known is None else round(float(known[row]), 4),
            "classes": [{"class": names[label], "probability": round(float(chances[row, label]), 4)} for label in best],
        })  # fmt: skip
    return found


def answers_csv(rows: Sequence[dict[str, Any]]) -> str:
    """What `answer_rows` gave as CSV, a row an image; at least one."""
    count = len(rows[0]["classes"])
    ranks = [column for rank in range(1, count + 1) for column in (f"class_{rank}", f"probability_{rank}")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "answer", "known", *ranks])
    for each in rows:
        pairs = [value for pair in each["classes"] for value in pair.values()]
        writer.writerow([each["image"], each["answer"], each["known"], *pairs])
    return text.getvalue()
