"""From dropped photographs to a classifier, and from a classifier to answers with their reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from smkd.app.explain import Match, attention_picture, central_square, match_patches, matches_picture, see
from smkd.app.support import Photo, Support
from smkd.classify.encoder import Encoder
from smkd.classify.estimator import FewShotClassifier
from smkd.classify.pictures import Pictures
from smkd.classify.search import ImageIndex
from smkd.errors import DataError

NEAREST = 5
MATCHES = 6
NONE = "none of these"


@dataclass(frozen=True)
class Lesson:
    """A classifier and the photographs that it learned from.

    Attributes:
        classifier: learned; its `encoder_` is the backbone.
        photos: in the order of its support.
    """

    classifier: FewShotClassifier
    photos: tuple[Photo, ...]

    @property
    def encoder(self) -> Encoder:
        """The backbone."""
        encoder = self.classifier.encoder_
        assert encoder is not None
        return encoder


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


class Reasons(NamedTuple):
    """Pictures of an answer, and the matches that are drawn.

    Attributes:
        attention: attention of [CLS] over the query.
        matches: lines between patches of the query and of the nearest support photograph.
        drawn: those matches, the largest contribution first.
        similarity: weighted sum of the cosines of all matches, from -1 to 1.
    """

    attention: Image.Image
    matches: Image.Image
    drawn: list[Match]
    similarity: float


def learn(encoder: Encoder, support: Support) -> Lesson:
    """A classifier of the photographs; the head is chosen by cross-validation where there are enough.

    Raises:
        DataError: fewer than two classes, or one without photographs.
    """
    if len(support.groups) < 2:
        raise DataError("a classifier needs at least two classes: add one")
    for group in support.groups:
        if not group.photos:
            raise DataError(f"'{group.name}' has no photographs: add some, or remove the class")
    photos = tuple(photo for group in support.groups for photo in group.photos)
    labels = [group.name for group in support.groups for _ in group.photos]
    features = np.stack([photo.feature for photo in photos])
    return Lesson(FewShotClassifier(encoder, "auto").fit(features, labels), photos)


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


def reasons(lesson: Lesson, given: Answer) -> Reasons | None:
    """Pictures of why the query is like its nearest support photograph; None for a backbone of plain colours.

    Raises:
        DataError: one of the two can no longer be read.
    """
    encoder = lesson.encoder
    pair = Pictures([given.photo.path, given.neighbours[0].photo.path])
    images = [pair.load(0), pair.load(1)]
    seen = see(encoder, images)
    if seen is None:
        return None
    squares = [central_square(image, encoder.config.resize, encoder.config.crop) for image in images]
    matches = match_patches(seen.patches[0], seen.patches[1], seen.attention[0])
    drawn = matches[:MATCHES]
    return Reasons(
        attention_picture(squares[0], seen.attention[0], seen.grid),
        matches_picture(squares[0], squares[1], drawn, seen.grid),
        drawn, sum(match.weight * match.cosine for match in matches),
    )  # fmt: skip
