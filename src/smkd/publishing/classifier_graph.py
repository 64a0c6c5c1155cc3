"""A classifier as a graph that can become a program: pixels in, probabilities out, with the whole backbone in it.

It computes what `ImageClassifier` does, in the same steps: features in float32, the head and 'none of these' in
float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smkd import __version__
from smkd.classify.classifier import ImageClassifier
from smkd.classify.encoder import Encoder
from smkd.classify.known import class_directions, nearest_cosine
from smkd.data.color import normalize
from smkd.errors import ConfigError
from smkd.fewshot.candidates import numbered, written
from smkd.fewshot.features import pool
from smkd.fewshot.head import InductiveHead, Learned, Rule, rule_products
from smkd.fewshot.heads import make_head
from smkd.fewshot.nearest import KNN
from smkd.publishing.program import INPUT, Computation

NONE_OF_THESE = -1
"""What `answer` is then."""


def classifier_program(classifier: ImageClassifier, *, reject: float | None, license: str) -> Computation:
    """What a classifier of images computes.

    Args:
        classifier: on the CPU, with a backbone.
        reject: as `ImageClassifier.predict` has it.
        license: of the weights.

    Raises:
        ConfigError: its head does not answer images one by one.
    """
    assert classifier.encoder_ is not None
    graph = ClassifierGraph(classifier, classifier.encoder_, reject)
    outputs = ("probabilities", "answer") if graph.known is None else ("probabilities", "answer", "known")
    crop = classifier.encoder_.config.crop
    return Computation(
        graph=graph, traceable=graph, outputs=outputs, sizes=((crop, crop),),
        about=_about(classifier, classifier.encoder_, reject, license),
    )  # fmt: skip


def learned_rule(classifier: ImageClassifier) -> tuple[InductiveHead, Rule]:
    """The head of a classifier, and what it has learned.

    Raises:
        ConfigError: it does not answer images one by one, or not in a form that a program can hold.
    """
    support, labels = torch.from_numpy(classifier.support_), torch.from_numpy(classifier.support_labels_)
    learned = Learned(make_head(classifier.head_, support.mean(dim=0)), support, labels, classifier.seed)
    if learned.rule is None or not isinstance(learned.head, InductiveHead):
        why = "is no smkd.fewshot.InductiveHead, of which alone a program can be made"
        if getattr(learned.head, "transductive", False):
            why = "looks at all images of a call together, and a program answers each by itself"
        raise ConfigError(
            f"head '{classifier.head_}' {why}: make the classifier with another head, such as --head auto or logistic "
            "(docs/heads.md)"
        )
    return learned.head, learned.rule


class ClassifierGraph(nn.Module):
    """From pixels to probabilities.

    Args:
        classifier: what was learned.
        encoder: its own.
        reject: see `classifier_program`.

    Raises:
        ConfigError: its head does not answer images one by one.
    """

    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    directions: Tensor

    def __init__(self, classifier: ImageClassifier, encoder: Encoder, reject: float | None) -> None:
        super().__init__()
        self.config, self.backbone = encoder.config, encoder.backbone
        self.head, rule = learned_rule(classifier)
        self.way, self.temperature = len(classifier.classes_), classifier.temperature_
        self.known, self.reject = classifier.known_, reject
        support, labels = torch.from_numpy(classifier.support_), torch.from_numpy(classifier.support_labels_)
        self.register_buffer("weight", rule.weight)
        self.register_buffer("bias", rule.bias)
        self.register_buffer("labels", labels[None])
        self.register_buffer("directions", class_directions(support, labels))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Probabilities, answers, and chances to be of any class.

        Args:
            images: uint8 [images, 3, crop, crop], RGB.

        Returns:
            float32 [images, classes]; int64 [images], places among the classes, -1 for 'none of these'; and float32
            [images], unless the classifier has not learned it.
        """
        features = self.features(images).double()  # [images, dim]
        scores = self.scores(features)  # [images, classes]
        probabilities = (scores / self.temperature).softmax(dim=1).float()
        answer = scores.argmax(dim=1)
        if self.known is None:
            return probabilities, answer
        familiar = nearest_cosine(features, self.directions)  # [images]
        known = (self.known.slope * familiar + self.known.intercept).sigmoid()
        if self.reject is not None:
            answer = torch.where(known < self.reject, NONE_OF_THESE, answer)
        return probabilities, answer, known.float()

    def features(self, images: Tensor) -> Tensor:
        """Features [images, dim], as the encoder makes them in float32."""
        pixels = images.float() / 255
        if self.backbone is None:
            return pixels.flatten(1) - 0.5
        blocks = self.backbone.last_blocks(
            normalize(pixels, self.config.mean, self.config.std), self.config.features.blocks
        )
        return pool(blocks, self.config.features)

    def scores(self, features: Tensor) -> Tensor:
        """Scores [images, classes] of float64 features, as the head gives them."""
        rule, query = Rule(self.weight, self.bias), features[None]
        if isinstance(self.head, KNN):
            products = rule_products(rule, self.head.prepare(query))
            return self.head.votes(products, self.labels, self.way).transpose(1, 2)[0]
        return self.head.answer(rule, self.labels, query)[0]


def _about(classifier: ImageClassifier, encoder: Encoder, reject: float | None, license: str) -> dict[str, Any]:
    """What a caller of the program has to know, as plain values."""
    config, known = encoder.config, classifier.known_ is not None
    which = None if encoder.backbone is None else written(numbered(config.features, len(encoder.backbone.blocks)))
    return {
        "kind": "classifier", "version": __version__,
        "input": f"{INPUT}: uint8 RGB [batch, 3, {config.crop}, {config.crop}]; normalised inside",
        "outputs": "probabilities: float32 [batch, classes]; answer: int64 [batch], -1 is none of these"
        + ("; known: float32 [batch]" if known else ""),
        "classes": named_classes(classifier), "images": images_per_class(classifier), "reject": reject,
        "resize": config.resize, "crop": config.crop, "interpolation": "bicubic", "mean": list(config.mean),
        "std": list(config.std), "features": which, "head": classifier.head_, "temperature": classifier.temperature_,
        "left_out": classifier.left_out_.as_dict([] if reject is None else [reject]),
        "backbone": config.source, "license": license,
    }  # fmt: skip


def named_classes(classifier: ImageClassifier) -> list[str]:
    """Names of the classes, in the order of the probabilities."""
    names: list[str] = classifier.classes_.astype(str).tolist()
    return names


def images_per_class(classifier: ImageClassifier) -> list[int]:
    """How many images each class was learned from."""
    return torch.from_numpy(classifier.support_labels_).bincount().tolist()
