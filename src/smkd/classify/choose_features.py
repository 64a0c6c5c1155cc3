"""Which blocks and parts of a backbone a classifier reads: chosen by the support images, left out in turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from smkd.classify.encoder import Encoder
from smkd.classify.left_out import LeftOut, turns
from smkd.config.protocol import FeaturesConfig
from smkd.fewshot.candidates import candidates, features_from, narrowed, places, together

AUTO, OWN = "auto", "own"
"""Words besides those of `smkd.fewshot.candidates`: a choice, and what the backbone's run says."""
SHARPNESS = 2.0
"""Of the soft accuracy, by the scores' own spread; chosen on validation classes (`benchmarks/features_auto.py`)."""


def check_reading(word: str) -> None:
    """Raise `ConfigError` for what is neither of the words nor blocks and parts, before any work is done for it."""
    if word not in (AUTO, OWN):
        features_from(word)


class Reader:
    """From images to the features that a word asks for; `auto` decides once the features of the support are there.

    Args:
        encoder: the backbone, with the features of its run.
        word: 'auto', 'own', or blocks and parts (`smkd.fewshot.candidates.features_from`).

    Attributes:
        encoder: what the support is to be seen with; for 'auto' it gives all that the candidates need.

    Raises:
        ConfigError: no such word; blocks that the backbone lacks, or any where there is no network.
    """

    def __init__(self, encoder: Encoder, word: str) -> None:
        self.encoder = encoder
        self.tried: list[FeaturesConfig] = []
        if word == AUTO and encoder.backbone is not None:
            self.tried = candidates(encoder.config.features, len(encoder.backbone.blocks))
            self.encoder = encoder.reading(together(self.tried))
        elif word not in (AUTO, OWN):
            self.encoder = encoder.reading(features_from(word))

    def decided(self, values: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[Encoder, NDArray[np.float32]]:
        """The encoder to keep, and its features of the support.

        Args:
            values: what `encoder` gave for the support, [images, dim].
            labels: [images], every class from 0 on at least once.
        """
        if not self.tried:
            return self.encoder, values
        wide, held = self.encoder.config.features, torch.from_numpy(values)
        best = choose_features(held, torch.from_numpy(labels), wide, self.tried)
        return self.encoder.reading(best), narrowed(held, wide, best).numpy()


def choose_features(
    values: Tensor, labels: Tensor, wide: FeaturesConfig, tried: Sequence[FeaturesConfig]
) -> FeaturesConfig:
    """The best by `soft_right` of prototypes, if it is better than the first by more than a standard error.

    The error is that of the mean over classes of the paired differences. The first is also taken where no class has two
    images.

    Args:
        values: float32 [images, dim of `wide`].
        labels: int64 [images], every class at least once.
        wide: what the values are made of.
        tried: what to choose among; the first is what is taken without a reason to change.
    """
    counts = labels.bincount()
    spare = counts[labels] > 1
    asked = labels[spare]
    if not len(asked):
        return tried[0]
    given = values.unflatten(1, (len(wide.parts) * len(wide.blocks), -1)).transpose(0, 1).double()
    norms = given.square().sum(dim=2)  # [pieces, images]
    products, lengths = _left_out_products(given, labels)
    soft = []
    for each in tried:
        pieces = places(wide, each)
        sizes = norms[pieces].sum(dim=0)[:, None] * lengths[pieces].sum(dim=0)
        cosines = products[pieces].sum(dim=0) / sizes.clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        soft.append(soft_right(LeftOut(cosines[spare], asked)))
    right = torch.stack(soft)  # [tried, images that were left out]
    shares = asked.unique().numel() * counts[asked].double()
    gains = right - right[0]
    means = (gains / shares).sum(dim=1)
    errors = ((gains - means[:, None]) / shares).square().sum(dim=1).sqrt()
    best = int(means.argmax())
    return tried[best if means[best] > errors[best] else 0]


def soft_right(left: LeftOut) -> Tensor:
    """How far each image is given its own class, from 0 to 1: float64 [images].

    Softmax of the scores, each image's less their mean, over their spread over all images. Unlike whether it is right,
    this also says by how much; unlike the likelihood, one image that is far off counts no more than 1.
    """
    scores = left.scores - left.scores.mean(dim=1, keepdim=True)
    spread = scores.std(correction=0).clamp(min=torch.finfo(scores.dtype).tiny)
    return (SHARPNESS * scores / spread).softmax(dim=1).gather(1, left.truth[:, None])[:, 0]


def _left_out_products(pieces: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What makes the scores that `left_out` gives for prototypes, of any pieces side by side: both sum over pieces.

    Args:
        pieces: float64 [pieces, images, dim].
        labels: int64 [images].

    Returns:
        Products of each image with the sum of each class, without the images that are left out with it, and that sum's
        squared length: float64 [pieces, images, classes]. Images that are alone in their class get 0.
    """
    members = F.one_hot(labels).T.double()  # [classes, images]
    sums = members @ pieces  # [pieces, classes, dim]
    products = torch.zeros(len(pieces), len(labels), len(members), dtype=torch.float64)
    lengths = torch.zeros_like(products)
    for leave, asked in turns(labels):
        left = sums - members[:, leave] @ pieces[:, leave]
        products[:, asked] = pieces[:, asked] @ left.transpose(1, 2)
        lengths[:, asked] = left.square().sum(dim=2)[:, None]
    return products, lengths
