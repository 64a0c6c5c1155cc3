"""`FewShotClassifier`: a scikit-learn estimator over images or features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d, validate_data

from smkd.classify import choose_features
from smkd.classify.choose_features import OWN, Reader, check_reading
from smkd.classify.classifier import ImageClassifier
from smkd.classify.encoder import Encoder, open_encoder
from smkd.classify.left_out import check_head
from smkd.classify.pictures import InputError, as_pictures
from smkd.errors import ConfigError, DataError
from smkd.fewshot.features import check_finite_rows, plain


class FewShotClassifier(ClassifierMixin, BaseEstimator, ImageClassifier):  # type: ignore[misc]
    """A few labelled images become a classifier.

    >>> import numpy as np
    >>> from smkd.classify import FewShotClassifier
    >>> features = np.array([[1.0, 0.1], [0.9, 0.0], [0.1, 1.0], [0.0, 0.8]])
    >>> classifier = FewShotClassifier().fit(features, ["ant", "ant", "bee", "bee"])
    >>> classifier.predict([[0.8, 0.2]]).tolist()
    ['ant']

    X is a list of images (paths, Pillow images, uint8 arrays [height, width, 3]; or one array [n, height, width, 3]),
    or features, floats [n, dim]. Images need a backbone. Classes may have different numbers of images.

    Args:
        backbone: run folder, checkpoint, weights of another project, 'pixels', network or `Encoder`, as
            `smkd.classify.open_encoder` takes them; None for features only.
        head: few-shot classifier with options as in 'logistic:c=3' (docs/heads.md), or 'auto' for a choice by
            cross-validation where every class has five images. Transductive heads see all images of one call together.
        reading: blocks and parts to read, such as '11:cls' (docs/classifier.md); 'own' as the backbone's run says; or
            'auto' for a choice by cross-validation on the images of the first `fit` or `partial_fit`.
        recipe: gives image size and normalisation to a network, or to weights that have none.
        seed: of heads that draw.
        accelerator: 'auto', 'cpu', 'cuda' or 'mps', for the backbone.
        heads: number of attention heads of weights of another project; none finds or guesses it (docs/weights.md).

    Attributes:
        classes_: sorted labels.
        head_: the head in use, as `head` takes it.
        support_: float32 [images, dim], the features it learned from.
        support_labels_: int64 [images], places in `classes_`.
        temperature_: probabilities are softmax(scores / temperature).
        known_: the model of `known_proba`; None if no class has two images.
        left_out_: results on left-out support images: accuracy of each class, the mean over classes with its
            interval, and what a threshold for `reject` keeps and catches.
        encoder_: from images to features; None without a backbone.
    """

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803
        """Learn from images or features X and their labels y, [n]; earlier learning is dropped.

        Raises:
            InputError: (a `DataError` and `ValueError`) one class only, an unreadable image, features that are not
                finite, or another number of labels than of images.
            ConfigError: unknown head or option.
            CheckpointError: the backbone cannot be read.
        """
        check_head(self.head)
        check_reading(self.reading)
        self.encoder_: Encoder | None = None
        if self.backbone is not None:
            self.encoder_ = open_encoder(self.backbone, self.recipe, self.accelerator, self.heads)
        features, labels = self._read(X, y)
        self._learn(features, labels)
        return self

    def partial_fit(self, X: Any, y: Any, classes: Sequence[Any] | None = None) -> Self:  # noqa: N803
        """Add images of old or new classes: the same as one `fit` on everything, in this order.

        Args:
            X: images or features.
            y: their labels, [n].
            classes: scikit-learn's list of all labels to come; if given, others are refused.

        Raises:
            InputError: as `fit`; also a label that is not in `classes`, or of another type than those before.
        """
        if not hasattr(self, "support_"):
            _check_among(y, classes)
            return self.fit(X, y)
        features, labels = self._checked(X, y, reset=False)
        _check_among(labels, classes)
        if (labels.dtype.kind in "US") != (self.classes_.dtype.kind in "US") and "O" not in (
            labels.dtype.kind + self.classes_.dtype.kind
        ):
            raise InputError(f"labels are {labels.dtype}, but those before are {self.classes_.dtype}")
        before = self.classes_[self.support_labels_]
        self._learn(np.concatenate([self.support_, features]), np.concatenate([before, labels]))
        return self

    def save(self, path: str | Path) -> None:
        """See `ImageClassifier.save`."""
        check_is_fitted(self, "support_")
        super().save(path)

    def features(self, X: Any) -> NDArray[np.float32]:  # noqa: N803
        """See `ImageClassifier.features`."""
        check_is_fitted(self, "support_")
        return self._features(X, None, reset=False)

    def _read(self, X: Any, y: Any) -> tuple[NDArray[np.float32], NDArray[Any]]:  # noqa: N803
        """Features to learn from and their labels; settles which blocks and parts the backbone gives from now on."""
        if self.encoder_ is None:
            if self.reading not in (choose_features.AUTO, OWN):
                raise ConfigError(f"reading={self.reading} are blocks and parts of a backbone: add backbone=")
            return self._checked(X, y, reset=True)
        # features that are given have been chosen before
        given = self.reading == choose_features.AUTO and as_pictures(X) is None
        reader = Reader(self.encoder_, OWN if given else self.reading)
        self.encoder_ = reader.encoder
        features, labels = self._checked(X, y, reset=True)
        self.encoder_, features = reader.decided(features, np.unique(labels, return_inverse=True)[1])
        return features, labels

    def _checked(self, X: Any, y: Any, *, reset: bool) -> tuple[NDArray[np.float32], NDArray[Any]]:  # noqa: N803
        try:
            plain(y, "y")
            features = self._features(X, y, reset=reset)
            labels: NDArray[Any] = column_or_1d(y, warn=True)
            check_consistent_length(features, labels)
            check_classification_targets(labels)
        except (ValueError, DataError) as error:
            raise InputError(_line(error)) from error
        return features, labels

    def _features(self, X: Any, y: Any | Literal["no_validation"], *, reset: bool) -> NDArray[np.float32]:  # noqa: N803
        images = as_pictures(X)
        if images is not None:
            return self._encoded(images)
        checked = {"X": X} if y is None and not reset else {"X": X, "y": y}
        try:
            # which rows are not finite is said below
            values = validate_data(self, **checked, dtype=np.float32, reset=reset, ensure_all_finite=False)
            found: NDArray[np.float32] = np.array(values if isinstance(values, np.ndarray) else values[0], order="C")
            check_finite_rows(found, "X")
        except (ValueError, DataError) as error:
            raise InputError(_line(error)) from error
        if self.encoder_ is not None and found.shape[1] != self.encoder_.dim:
            raise InputError(f"X has {found.shape[1]} features, but those of the backbone are {self.encoder_.dim}")
        return found


def _check_among(y: Any, classes: Sequence[Any] | None) -> None:
    if classes is not None:
        others = sorted(set(np.unique(np.asarray(y)).tolist()) - set(np.asarray(classes).tolist()), key=str)
        if others:
            raise InputError(f"label '{others[0]}' is not among classes=")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
