"""Accuracy on held-out images of the training classes: the head learns from all training images, once."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from smkd.config.schema import ProtocolConfig, RunConfig
from smkd.data.datasets import open_split
from smkd.errors import ConfigError, DataError
from smkd.fewshot.accuracy import backbone_features
from smkd.fewshot.heads import make_head
from smkd.models.vit import VisionTransformer

Z95 = 1.959964
Verdicts = NDArray[np.bool_]
"""[images], which held-out images are given their own class."""


class HeldOutImages:
    """Evaluator for the training loop, where training and validation images are of the same classes."""

    def check(self, config: RunConfig) -> None:
        """Raise `SmkdError` if the head is unknown, or a validation class is not a training class."""
        make_head(config.validation.head)
        if config.validation.data is not None:
            raise ConfigError("validation.data is not used here: held-out images of the training classes are measured")
        train, val = (open_split(config.data, split).class_names for split in ("train", config.validation.split))
        check_known(train, val, config.validation.split)

    def measure(self, backbone: VisionTransformer, config: RunConfig, device: torch.device) -> dict[str, float]:
        """Accuracy in percent."""
        return {"accuracy": 100 * float(verdicts(backbone, config, config.validation, device).mean())}


def verdicts(
    backbone: VisionTransformer, config: RunConfig, protocol: ProtocolConfig, device: torch.device
) -> Verdicts:
    """Which images of the protocol's split the protocol's head gives their own class, learning from the training split.

    Args:
        backbone: in evaluation mode, on `device`.
        config: data, pooling and precision.
        protocol: split, head, its seed, resize and crop; ways, shots and episodes do not matter.

    Raises:
        DataError: a class of the split is not a training class.
    """
    support = backbone_features(backbone, config, protocol.model_copy(update={"split": "train"}), device).collect()
    query = backbone_features(backbone, config, protocol, device).collect()
    check_known(support.class_names, query.class_names, protocol.split)
    places = np.array([support.class_names.index(name) for name in query.class_names])
    generator = torch.Generator().manual_seed(protocol.seed)
    head = make_head(protocol.head, support.values.mean(dim=0))
    with torch.inference_mode():
        scores = head(support.values[None], torch.from_numpy(support.labels)[None], query.values[None], generator)[0]
    right: Verdicts = scores.argmax(dim=1).numpy() == places[query.labels]
    return right


def check_known(train: list[str], held_out: list[str], split: str) -> None:
    """Raise `DataError` naming the first held-out class that is not a training class."""
    for name in held_out:
        if name not in train:
            raise DataError(f"class '{name}' of the {split} split is not a training class")


class Gain(NamedTuple):
    """Second less first, in percentage points, with its 95 % interval."""

    points: float
    low: float
    high: float


def paired_gain(first: Verdicts, second: Verdicts) -> Gain:
    """How much more of the same images the second gets right.

    The interval is that of Agresti and Min (Statistics in Medicine, 2005): half an image is added to each of the four
    outcomes, so that it is of use for few images too.
    """
    images = len(first)
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    middle = (gained - lost) / (images + 2)
    half = Z95 * math.sqrt((gained + lost + 1) / (images + 2) - middle**2) / math.sqrt(images + 2)
    return Gain(100 * (gained - lost) / images, 100 * (middle - half), 100 * (middle + half))
