"""Results of a classifier on labelled images: how often it is right, how sure it is, what thresholds keep and catch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix, roc_auc_score

from smkd.classify.added import learned_rows, own_labels
from smkd.classify.classifier import ImageClassifier
from smkd.classify.left_out import SPREAD, ClassShare, left_out
from smkd.classify.pictures import InputError
from smkd.errors import DataError
from smkd.fewshot import intervals
from smkd.fewshot.heads import make_head
from smkd.files import nearest

BINS = 10
"""Of the calibration error, each with as many images."""


class Threshold(NamedTuple):
    """What a threshold for `reject` does; shares from 0 to 1.

    Attributes:
        reject: the threshold.
        kept: share of the images whose chance to be known is not below it.
        accuracy: share of these that get their own class; None if none is kept.
        caught: share of the images of no class whose chance is below it; None if there are none.
    """

    reject: float
    kept: float
    accuracy: float | None
    caught: float | None


class CalibrationGroup(NamedTuple):
    """Images whose answers are about as probable.

    Attributes:
        images: how many.
        confidence: mean probability of the answers.
        accuracy: share that is right.
    """

    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Scored:
    """Labelled images, and what a classifier answers.

    Attributes:
        names: of the classifier's classes.
        images: what each image is called.
        truth: int64 [images], place of its class in `names`.
        probabilities: float64 [images, classes].
        known: float64 [images], chance of being of any class (`known_proba`); None where that is not learned.
        unknown: the same for images of no class, [others]; None without such images.
        learned_from: how many of the images look the same as one that the classifier has learned from.
        spread: variance of the accuracies over that of as many independent images (`smkd.classify.left_out.SPREAD`).
    """

    names: tuple[str, ...]
    images: tuple[str, ...]
    truth: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    known: NDArray[np.float64] | None = None
    unknown: NDArray[np.float64] | None = None
    learned_from: int = 0
    spread: float = 1.0

    @property
    def answers(self) -> NDArray[np.int64]:
        """Place of each answer in `names`, [images]."""
        found: NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return found

    @property
    def confidence(self) -> NDArray[np.float64]:
        """Probability of each answer, [images]."""
        found: NDArray[np.float64] = self.probabilities.max(axis=1)
        return found

    @property
    def own(self) -> NDArray[np.bool_]:
        """Whether each image gets its own class, [images]."""
        right: NDArray[np.bool_] = self.answers == self.truth
        return right

    @property
    def by_class(self) -> list[ClassShare]:
        """Of the classes that have images, the smallest share first."""
        way = len(self.names)
        right, images = np.bincount(self.truth[self.own], minlength=way), np.bincount(self.truth, minlength=way)
        found = [ClassShare(*each) for each in zip(self.names, right.tolist(), images.tolist(), strict=True)]
        return sorted((each for each in found if each.images), key=lambda each: each.right / each.images)

    @property
    def accuracy(self) -> float:
        """Share of all images that get their own class, from 0 to 1."""
        return float(self.own.mean())

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of `accuracy`."""
        return intervals.of_share(int(self.own.sum()) / self.spread, len(self.own) / self.spread)

    @property
    def mean(self) -> float:
        """Mean over the classes of the share that is right; every class counts the same."""
        return float(np.mean([each.right / each.images for each in self.by_class]))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `mean` (`smkd.fewshot.intervals.of_class_mean`)."""
        classes = self.by_class
        return intervals.of_class_mean(
            [each.right / self.spread for each in classes], [each.images / self.spread for each in classes]
        )

    @property
    def confusion(self) -> NDArray[np.int64]:
        """Number of images of each class (row) that are given each class (column), [classes, classes]."""
        found: NDArray[np.int64] = confusion_matrix(self.truth, self.answers, labels=np.arange(len(self.names)))
        return found

    @property
    def mix_ups(self) -> list[tuple[str, str, int]]:
        """Class, the class that is answered, and how often, for all mistakes; the most frequent first."""
        counts = self.confusion.copy()
        np.fill_diagonal(counts, 0)
        rows, columns = np.nonzero(counts)
        found = [(self.names[row], self.names[column], int(counts[row, column]))
                 for row, column in zip(rows, columns, strict=True)]  # fmt: skip
        return sorted(found, key=lambda each: -each[2])

    @property
    def calibration_groups(self) -> list[CalibrationGroup]:
        """Images by the probability of their answers, in at most `BINS` groups of equally many."""
        parts = np.array_split(np.argsort(self.confidence, kind="stable"), BINS)
        return [
            CalibrationGroup(len(part), float(self.confidence[part].mean()), float(self.own[part].mean()))
            for part in parts if len(part)
        ]  # fmt: skip

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of the answers' probabilities (Guo et al., ICML 2017), in groups of equal size
        (Nixon et al., CVPR workshops 2019)."""
        return sum(each.images * abs(each.accuracy - each.confidence) for each in self.calibration_groups) / len(
            self.own
        )

    def threshold(self, reject: float) -> Threshold | None:
        """What a threshold keeps and catches; None where 'none of these' is not learned."""
        if self.known is None:
            return None
        kept = self.known >= reject
        return Threshold(
            reject, float(kept.mean()), float(self.own[kept].mean()) if kept.any() else None,
            None if self.unknown is None else float((self.unknown < reject).mean()),
        )  # fmt: skip

    @property
    def auroc(self) -> float | None:
        """Chance that an image of a class seems more familiar than one of none; None without images of none."""
        if self.known is None or self.unknown is None:
            return None
        chances = np.concatenate([self.known, self.unknown])
        return float(roc_auc_score(np.repeat([1, 0], [len(self.known), len(self.unknown)]), chances))

    @property
    def mistakes(self) -> list[int]:
        """Places of the images that get another class, the surest answers first."""
        wrong = np.flatnonzero(~self.own)
        order: list[int] = wrong[np.argsort(-self.confidence[wrong], kind="stable")].tolist()
        return order

    def as_dict(self, rejects: Sequence[float]) -> dict[str, Any]:
        """Plain values for JSON; shares from 0 to 1.

        Args:
            rejects: thresholds to report.
        """
        thresholds = [found._asdict() for each in rejects if (found := self.threshold(each)) is not None]
        known = [None] * len(self.images) if self.known is None else self.known.tolist()
        return {
            "images": len(self.images), "accuracy": self.accuracy, "accuracy_interval": list(self.accuracy_interval),
            "mean": self.mean, "interval": list(self.interval),
            "classes": [
                {"class": each.name, "right": each.right, "images": each.images,
                 "interval": list(intervals.of_share(each.right, each.images))} for each in self.by_class
            ],
            "confusion": [{"class": own, "answer": given, "images": count} for own, given, count in self.mix_ups],
            "confidence": float(self.confidence.mean()), "calibration_error": self.calibration_error,
            "reject": thresholds, "auroc": self.auroc,
            "unknown": 0 if self.unknown is None else len(self.unknown), "learned_from": self.learned_from,
            "answers": [
                {"image": image, "class": self.names[own], "answer": self.names[answer],
                 "probability": round(sure, 4), "known": None if chance is None else round(chance, 4)}
                for image, own, answer, sure, chance in zip(
                    self.images, self.truth.tolist(), self.answers.tolist(), self.confidence.tolist(), known,
                    strict=True,
                )
            ],
        }  # fmt: skip


def score_features(
    classifier: ImageClassifier, features: Any, labels: Sequence[Any], *, images: Sequence[str] | None = None,
    unknown: Any = None,
) -> Scored:  # fmt: skip
    """Results on features that the classifier has not learned from.

    Args:
        classifier: fitted.
        features: floats [images, dim]; images where the classifier has a backbone.
        labels: class of each, [images].
        images: what each image is called; its number if not given.
        unknown: features or images of no class, [others, dim].

    Raises:
        InputError: a label is no class of the classifier, or features do not fit it.
    """
    names = tuple(map(str, classifier.classes_))
    known = {name: place for place, name in enumerate(names)}
    for label in labels:
        if str(label) not in known:
            raise InputError(f"'{label}' is no class of the classifier ({', '.join(names[:8])})")
    values = classifier.features(features)
    learned = classifier.known_ is not None
    strange = None if unknown is None or not learned else classifier.known_proba(unknown)
    return Scored(
        names, tuple(map(str, range(len(values)) if images is None else images)),
        np.array([known[str(label)] for label in labels], np.int64), classifier.predict_proba(values),
        classifier.known_proba(values) if learned else None, strange,
        int((learned_rows(classifier, values) >= 0).sum()),
    )  # fmt: skip


def score_left_out(classifier: ImageClassifier, images: Sequence[str]) -> Scored | None:
    """The same results from the support images, each left out in turn; None if no class has two images.

    Images of no class are those of a class that is left out.

    Args:
        classifier: fitted.
        images: what each support image is called.
    """
    left = classifier.left_out_
    if not left.images:
        return None
    support, labels = torch.from_numpy(classifier.support_), torch.from_numpy(classifier.support_labels_)
    found = left_out(make_head(classifier.head_, support.mean(dim=0)), support, labels, classifier.seed)
    spare = (labels.bincount()[labels] > 1).numpy()
    return Scored(
        left.names, tuple(image for image, there in zip(images, spare, strict=True) if there), found.truth.numpy(),
        (found.scores / classifier.temperature_).softmax(dim=1).numpy(),
        np.array(left.known) if left.known else None, np.array(left.strange) if left.strange else None,
        spread=SPREAD,
    )  # fmt: skip


def check_classes(names: Sequence[str], classifier: ImageClassifier, folder: str) -> dict[str, Any]:
    """From the names of class folders to the classifier's own labels (`smkd.classify.added.own_labels`).

    Raises:
        DataError: a folder is no class of the classifier, or another spelling of one; names the nearest.
    """
    found, classes = own_labels(names, classifier), classifier.classes_.tolist()
    for name, label in found.items():
        if label not in classes:
            some = ", ".join(map(str, classes[:8])) + (", ..." if len(classes) > 8 else "")
            raise DataError(
                f"'{folder}' holds '{name}', which is no class of the classifier ({some}); images of no class go into "
                f"a folder of their own: --unknown FOLDER{nearest(name, map(str, classes))}"
            )
    return found
