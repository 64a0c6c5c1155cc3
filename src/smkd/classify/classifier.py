"""What a few labelled images teach: scores, probabilities and 'none of these' for others; written to a file and read.

The scikit-learn estimator around it is in `smkd.classify.estimator`, which takes a second to load.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator
from threadpoolctl import threadpool_limits
from torch import Tensor

from smkd.classify.choose_features import OWN, check_reading
from smkd.classify.encoder import Encoder, Finite
from smkd.classify.known import Familiarities, Known, familiarity
from smkd.classify.left_out import AUTO, LeftOut, LeftOutAccuracy, check_head, choose_head, fitted_temperature, left_out
from smkd.classify.pictures import InputError, Picture, as_pictures
from smkd.config.run_config import RunConfig
from smkd.config.schema import Count, Section
from smkd.errors import CheckpointError, ConfigError
from smkd.fewshot.features import check_finite_rows
from smkd.fewshot.head import Learned
from smkd.fewshot.heads import make_head
from smkd.files import expanded
from smkd.models.vit import VisionTransformer
from smkd.weights import smkd_file
from smkd.weights.fetch import locate_classifier

PARTS = {"own": torch.bool, "known": torch.float64, "strange": torch.float64}
"""What a file holds of `LeftOutAccuracy` besides labels and classes."""
CONTROL = ("Cc", "Zl", "Zp")
"""Categories of Unicode that end a line or steer a terminal."""
MOST_BYTES = 2**23
"""Of the names of all classes."""


class _Settings(Section):
    """The settings in a classifier's file; the rest are tensors."""

    encoder: dict[str, Any] | None
    reading: str = OWN
    head: str
    chosen: str
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    known: tuple[Finite, Finite] | None
    left_out: tuple[Count, Count]
    classes: Annotated[list[bool | int | float | str], Field(min_length=2)]
    label_type: Annotated[str, Field(pattern=r"^([<>=|]?[biufSU][0-9]{1,6}|[|]O)$")]

    @model_validator(mode="after")
    def _check(self) -> _Settings:
        if self.left_out[0] > self.left_out[1]:
            raise ValueError(f"left_out: {self.left_out[0]} of {self.left_out[1]} images cannot be right")
        for name in self.classes:
            if isinstance(name, str) and any(unicodedata.category(sign) in CONTROL for sign in name):
                raise ValueError(f"class {name[:40]!r}: a name should be one line without control characters")
        self.class_array()
        return self

    def class_array(self) -> NDArray[Any]:
        """The classes as an array of their type; raises `ValueError` if a value has another type."""
        kind = np.dtype(self.label_type)
        if kind.itemsize * len(self.classes) > MOST_BYTES:
            raise ValueError(f"label_type: {self.label_type} for {len(self.classes)} classes")
        try:
            found = np.array(self.classes, dtype=kind)
        except (OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"classes are not of type {self.label_type}") from error
        texts = found.astype(str) if kind.kind == "S" else found
        if texts.tolist() != self.classes:
            raise ValueError(f"classes are not of type {self.label_type}")
        return found


class ImageClassifier:
    """A few labelled images as a classifier, without scikit-learn's checks of what it is given.

    Args and attributes are those of `smkd.classify.FewShotClassifier`.
    """

    encoder_: Encoder | None

    def __init__(
        self, backbone: str | Path | VisionTransformer | Encoder | None = None, head: str = "prototype", *,
        reading: str = OWN, recipe: str | RunConfig | None = None, seed: int = 0, accelerator: str = "auto",
        heads: int | None = None,
    ) -> None:  # fmt: skip
        self.backbone = backbone
        self.head = head
        self.reading = reading
        self.recipe = recipe
        self.seed = seed
        self.accelerator = accelerator
        self.heads = heads

    @classmethod
    def taught(
        cls, encoder: Encoder, features: NDArray[np.float32], labels: Sequence[str], *, head: str, reading: str
    ) -> Self:
        """Learn from features that the encoder made of images.

        Args:
            encoder: made the features, and will make those of other images.
            features: float32 [n, dim].
            labels: class of each, [n].
            head, reading: see the class.

        Raises:
            InputError: one class only.
            ConfigError: unknown head or option.
        """
        check_head(head)
        made = cls(encoder, head, reading=reading)
        made.encoder_ = encoder
        made._learn(features, np.asarray(labels))
        return made

    def predict(self, X: Any, reject: float | None = None) -> NDArray[Any]:  # noqa: N803
        """The label of each image.

        Args:
            X: images or features.
            reject: between 0 and 1; images whose `known_proba` is below get None, 'none of these', in an array of
                objects. At 0.5 a known and an unknown class are equally likely.

        Raises:
            InputError: an unreadable image, features of another dimension; `reject` where no class has two images.
            ConfigError: `reject` is not between 0 and 1.
        """
        features = self.features(X)
        labels: NDArray[Any] = self.classes_[self._scores(features).argmax(dim=1).numpy()]
        if reject is None:
            return labels
        if not 0 <= reject <= 1:
            raise ConfigError(f"reject={reject}: should be between 0 and 1")
        answers = labels.astype(object)
        answers[self.known_proba(features) < reject] = None
        return answers

    def predict_proba(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        """Probability of each class in the order of `classes_`, given that it is one of them: [n, classes]."""
        scores = self._scores(self.features(X))
        return (scores / self.temperature_).softmax(dim=1).numpy()

    def known_proba(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        """Chance that an image is of any of the classes, [n] (docs/classifier.md).

        Raises:
            InputError: no class has two images, so familiarity cannot be learned.
        """
        features = torch.from_numpy(self.features(X))
        if self.known_ is None:
            raise InputError("reject needs a class with two or more images, to learn what is familiar")
        support, labels = torch.from_numpy(self.support_), torch.from_numpy(self.support_labels_)
        chance: NDArray[np.float64] = self.known_.chance(familiarity(features, support, labels))
        return chance

    def features(self, X: Any) -> NDArray[np.float32]:  # noqa: N803
        """Features float32 [n, dim] of images; X itself, checked, if it is features already."""
        images = as_pictures(X)
        if images is not None:
            return self._encoded(images)
        found: NDArray[np.float32] = np.asarray(X, np.float32)
        if found.ndim != 2 or found.shape[1] != self.n_features_in_:
            raise InputError(f"X is {list(found.shape)}, expected features [n, {self.n_features_in_}]")
        check_finite_rows(found, "X")
        return found

    def save(self, path: str | Path) -> None:
        """Write everything, the backbone included, into one file (`smkd.weights.smkd_file`).

        Raises:
            CheckpointError: it cannot be written, or a class has a name of more than one line.
        """
        encoder, tensors = (None, {}) if self.encoder_ is None else self.encoder_.saved()
        tensors["support"] = torch.from_numpy(self.support_)
        tensors["labels"] = torch.from_numpy(self.support_labels_)
        tensors |= {
            f"left_out.{part}": torch.tensor(getattr(self.left_out_, part), dtype=kind) for part, kind in PARTS.items()
        }
        try:
            settings = _Settings(
                encoder=encoder, reading=self.reading, head=self.head, chosen=self.head_, seed=self.seed,
                temperature=self.temperature_,
                known=self.known_, left_out=(self.left_out_.right, self.left_out_.images),
                classes=self.classes_.tolist(), label_type=self.classes_.dtype.str,
            )  # fmt: skip
        except ValidationError as error:
            raise CheckpointError(f"cannot write '{path}': {smkd_file.settings_fault(error)}") from error
        smkd_file.write(expanded(path), smkd_file.CLASSIFIER, settings.model_dump(mode="json"), tensors)

    @classmethod
    def load(cls, path: str | Path, accelerator: str = "auto") -> Self:
        """Read what `save` wrote; predictions are the same.

        Args:
            path: its file; a folder of `smkd export --to hub`; or 'hf:owner/name' of the Hugging Face Hub.
            accelerator: 'auto', 'cpu', 'cuda' or 'mps', for the backbone.

        Raises:
            CheckpointError: missing, cut short, or not a classifier.
        """
        values, tensors = smkd_file.read(locate_classifier(path), smkd_file.CLASSIFIER)
        try:
            settings = _Settings.model_validate(values)
            make_head(settings.chosen, torch.zeros(1))
            check_head(settings.head)
            check_reading(settings.reading)
        except ValidationError as error:
            raise CheckpointError(f"'{path}': {smkd_file.settings_fault(error)}; make it again") from error
        except ConfigError as error:
            raise CheckpointError(f"'{path}': {error}; make it again") from error
        encoder = None
        if settings.encoder is not None:
            encoder = Encoder.restored(settings.encoder, tensors, accelerator, str(path))
        support = smkd_file.tensor(tensors, "support", torch.float32, 2, path)
        labels = smkd_file.tensor(tensors, "labels", torch.int64, 1, path)
        classes = settings.class_array()
        if len(support) != len(labels) or not torch.equal(labels.unique(), torch.arange(len(classes))):
            raise CheckpointError(f"'{path}': its labels are not those of its classes; make it again")
        if not support.shape[1] or (encoder is not None and encoder.dim != support.shape[1]):
            raise CheckpointError(f"'{path}': its features are not those of its backbone; make it again")
        check_finite_rows(support, f"'{path}': support")
        left = _left_out(tensors, classes, labels, path)
        loaded = cls(encoder, settings.head, reading=settings.reading, seed=settings.seed, accelerator=accelerator)
        loaded.encoder_ = encoder
        loaded._keep(support, labels, classes, settings.chosen)
        if left is None:  # a file from before they were kept
            loaded._leave_out()
        else:
            loaded.left_out_ = left
        loaded.temperature_ = settings.temperature
        loaded.known_ = None if settings.known is None else Known(*settings.known)
        return loaded

    def _learn(self, features: NDArray[np.float32], y: NDArray[Any]) -> None:
        classes, places = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise InputError(f"only one class, '{classes[0]}'; a classifier needs at least two")
        support, labels = torch.from_numpy(features), torch.from_numpy(places.astype(np.int64))
        # for products so small, SciPy's threads beside PyTorch's only wait for each other
        with threadpool_limits(1, "blas"):
            chosen = choose_head(support, labels, self.seed) if self.head == AUTO else self.head
            self._keep(support, labels, classes, chosen)
            left = self._leave_out()
            self.temperature_ = fitted_temperature(left, self._learned)

    def _leave_out(self) -> LeftOut:
        """Results on left-out images, apart from the temperature."""
        support, labels = self._learned.support[0], self._learned.labels[0]
        left, familiarities = left_out(self._learned.head, support, labels, self.seed), Familiarities(support, labels)
        self.known_ = familiarities.fit()
        known, strange = ((), ()) if self.known_ is None else map(tuple, familiarities.chances(self.known_))
        self.left_out_ = LeftOutAccuracy(
            tuple(map(str, self.classes_)), tuple(labels.tolist()), tuple(left.own.tolist()), known, strange
        )
        return left

    def _keep(self, support: Tensor, labels: Tensor, classes: NDArray[Any], chosen: str) -> None:
        # no training features are at hand: what 'simpleshot:transform=cl2n' subtracts is the support's mean
        self._learned = Learned(make_head(chosen, support.mean(dim=0)), support, labels, self.seed)
        self.head_, self.classes_ = chosen, classes
        self.support_: NDArray[np.float32] = support.numpy()
        self.support_labels_: NDArray[np.int64] = labels.numpy()
        self.n_features_in_ = support.shape[1]

    def _scores(self, features: NDArray[np.float32]) -> Tensor:
        with torch.inference_mode():
            return self._learned.scores(torch.from_numpy(features))

    def _encoded(self, images: Sequence[Picture]) -> NDArray[np.float32]:
        if self.encoder_ is None:
            raise InputError("X is images, but there is no backbone: add backbone=, or give features [n, dim]")
        return self.encoder_(images)


def _left_out(
    tensors: dict[str, Tensor], classes: NDArray[Any], labels: Tensor, path: str | Path
) -> LeftOutAccuracy | None:
    """From the tensors of a file; None if there are none. Raises `CheckpointError` where they do not fit."""
    if "left_out.own" not in tensors:
        return None
    parts = {
        part: tuple(smkd_file.tensor(tensors, f"left_out.{part}", kind, 1, path).tolist())
        for part, kind in PARTS.items()
    }
    spare = int((labels.bincount()[labels] > 1).sum())
    wanted = {"own": spare, "known": spare, "strange": len(labels) if spare and len(classes) > 2 else 0}
    if {part: len(values) for part, values in parts.items()} != wanted:
        raise CheckpointError(f"'{path}': its left-out images are not those of the support; make it again")
    if not all(0 <= chance <= 1 for chance in parts["known"] + parts["strange"]):
        raise CheckpointError(f"'{path}': its chances of left-out images are none; make it again")
    return LeftOutAccuracy(tuple(map(str, classes)), tuple(labels.tolist()), **parts)
