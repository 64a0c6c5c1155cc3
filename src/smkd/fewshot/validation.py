"""Validation during training: on episodes of other classes, or on other images of the training classes.

For the second, the head learns once from all training images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from smkd import distributed
from smkd.config.protocol import FeaturesConfig, ProtocolConfig
from smkd.config.run_config import RunConfig
from smkd.data.datasets import configured_spec, open_split, open_validation
from smkd.data.images import Images
from smkd.data.loader import worker_count
from smkd.device import autocast_type
from smkd.engine.evaluator import INTERVAL
from smkd.engine.log import console
from smkd.errors import ConfigError, DataError
from smkd.fewshot.accuracy import compare_results, evaluate_features, shape_of
from smkd.fewshot.candidates import candidates, narrowed, together
from smkd.fewshot.episodes import Members, large_enough, too_small
from smkd.fewshot.features import Features, Stream, backbone_stream, joined
from smkd.fewshot.heads import make_head
from smkd.fewshot.intervals import of_paired_gain
from smkd.models.vit import VisionTransformer, block_numbers
from smkd.weights.architecture import Architecture

Verdicts = NDArray[np.bool_]
"""[images], which held-out images are given their own class."""


def backbone_features(
    backbone: VisionTransformer, config: RunConfig, protocol: ProtocolConfig, device: torch.device,
    images: Images | None = None, *, shared: bool = False,
) -> Stream:  # fmt: skip
    """Features of the protocol's split, or of other images; with `shared`, of this process's share of them."""
    images = open_split(config.data, protocol.split) if images is None else images
    return backbone_stream(
        backbone, images, configured_spec(config.data), config.features,
        resize=protocol.resize, crop=protocol.crop, device=device, on_error=config.data.on_error,
        autocast=autocast_type(config.precision, device), num_workers=worker_count(config, device),
        rows=distributed.share(len(images)) if shared else None,
    )  # fmt: skip


def best_features(
    backbone: VisionTransformer, config: RunConfig, device: torch.device, *, by_class: bool
) -> FeaturesConfig:
    """The blocks and parts (`smkd.fewshot.candidates`) that do best in validation, from one pass.

    Others than the configured ones are taken only if the 95 % interval of their paired gain is above 0.

    Args:
        backbone: in evaluation mode, on `device`.
        config: data, protocol and precision; its own features are the first candidate.
        device: of the backbone.
        by_class: whether episodes of other classes are measured, or other images of the training classes.

    Raises:
        SmkdError: the backbone lacks a block of the configured features, or the validation split is too small.
    """
    tried = candidates(config.features, len(backbone.blocks))
    wide = together(tried)
    config = config.model_copy(update={"features": wide})
    if by_class:
        features = backbone_features(backbone, config, config.validation, device, open_validation(config)).collect()
        results = [evaluate_features(_narrowed(features, wide, each), config.validation) for each in tried]
        gains = [[compare_results(*pair) for pair in zip(results[0], each, strict=True)] for each in results]
        bounds = [sum(gain.difference - gain.ci95 for gain in of_shots) for of_shots in gains]
    else:
        support, query = held_out_features(backbone, config, config.validation, device)
        right = [
            _right(_narrowed(support, wide, each), _narrowed(query, wide, each), config.validation) for each in tried
        ]
        bounds = [of_paired_gain(right[0], each).low for each in right]
    best = max(range(len(tried)), key=bounds.__getitem__)
    return tried[best if bounds[best] > 0 else 0]


def _narrowed(features: Features, wide: FeaturesConfig, chosen: FeaturesConfig) -> Features:
    return replace(features, values=narrowed(features.values, wide, chosen))


Draw = Callable[[VisionTransformer, RunConfig, torch.device], dict[str, Image]]
"""Pictures by name, for the log."""


class _Pictured:
    """An evaluator whose pictures are logged.

    Args:
        draw: makes them; None makes none.
    """

    def __init__(self, draw: Draw | None = None) -> None:
        self.draw = draw

    def pictures(self, backbone: VisionTransformer, config: RunConfig, device: torch.device) -> dict[str, Image]:
        """See `smkd.engine.evaluator.Evaluator`."""
        return {} if self.draw is None else self.draw(backbone, config, device)


class FewShotValidation(_Pictured):
    """Evaluator for the training loop: accuracy per number of shots on validation classes."""

    def check(self, config: RunConfig) -> None:
        """Say which validation classes are too small for the episodes.

        Raises:
            SmkdError: the head is unknown, the backbone lacks a block of the features, or the validation split has too
                few classes that are large enough.
        """
        _check_blocks(config)
        images, protocol = open_validation(config), config.validation
        make_head(protocol.head)
        sizes = Members(images.labels, len(images.class_names)).sizes.numpy()
        for shape in (shape_of(protocol, shot) for shot in protocol.shots):
            kept = large_enough(
                sizes, images.class_names, shape, what=f"the {protocol.split} split", group="validation",
                other="train without measuring: validation.every=0",
            )  # fmt: skip
            if len(kept) < len(sizes) and distributed.is_main():
                console.print(f"validation: {too_small(sizes, images.class_names, shape)}")

    def extract(self, backbone: VisionTransformer, config: RunConfig, device: torch.device) -> Features:
        """Features of this process's share of the validation images."""
        images = open_validation(config)
        return backbone_features(backbone, config, config.validation, device, images, shared=True).collect_rows()

    def score(self, shares: Sequence[Features], config: RunConfig) -> dict[str, float]:
        """Accuracy in percent: the mean over the numbers of shots, which selects, and each with its interval."""
        results = evaluate_features(joined(shares), config.validation)
        scores = {"accuracy": sum(r.mean for r in results) / len(results)}
        for result in results:
            name = f"{result.way}-way {result.shot}-shot"
            scores |= {name: result.mean, f"{name}{INTERVAL}": result.ci95}
        return scores


class HeldOutImages(_Pictured):
    """Evaluator for the training loop if training and validation images have the same classes."""

    def check(self, config: RunConfig) -> None:
        """Raise `SmkdError` for an unknown head, a block that is not there, or a validation class without training."""
        _check_blocks(config)
        make_head(config.validation.head)
        if config.validation.data is not None:
            raise ConfigError("validation.data is not used here: held-out images of the training classes are measured")
        train, val = (open_split(config.data, split).class_names for split in ("train", config.validation.split))
        check_known(train, val, config.validation.split)

    def extract(
        self, backbone: VisionTransformer, config: RunConfig, device: torch.device
    ) -> tuple[Features, Features]:
        """Features of this process's share of the training images, and of the held-out ones."""
        support, query = _held_out_streams(backbone, config, config.validation, device, shared=True)
        return support.collect_rows(), query.collect_rows()

    def score(self, shares: Sequence[tuple[Features, Features]], config: RunConfig) -> dict[str, float]:
        """Accuracy in percent."""
        support, query = (joined(parts) for parts in zip(*shares, strict=True))
        return {"accuracy": 100 * float(_right(support, query, config.validation).mean())}


def _check_blocks(config: RunConfig) -> None:
    """Raise `ConfigError` before the training for features that the backbone cannot give after it."""
    block_numbers(config.features.blocks, Architecture.of(config.model).depth)


def verdicts(
    backbone: VisionTransformer, config: RunConfig, protocol: ProtocolConfig, device: torch.device
) -> Verdicts:
    """Which images of the protocol's split get their own class from a head that learned from the training split.

    Args:
        backbone: in evaluation mode, on `device`.
        config: data, pooling and precision.
        protocol: split, head, its seed, resize and crop; ways, shots and episodes do not matter.

    Raises:
        DataError: a class of the split is not a training class.
    """
    return _right(*held_out_features(backbone, config, protocol, device), protocol)


def held_out_features(
    backbone: VisionTransformer, config: RunConfig, protocol: ProtocolConfig, device: torch.device
) -> tuple[Features, Features]:
    """Features of the training images and of the protocol's split; arguments and errors as `verdicts` has them."""
    support, query = (
        stream.collect() for stream in _held_out_streams(backbone, config, protocol, device, shared=False)
    )
    check_known(support.class_names, query.class_names, protocol.split)
    return support, query


def _held_out_streams(
    backbone: VisionTransformer, config: RunConfig, protocol: ProtocolConfig, device: torch.device, *, shared: bool
) -> tuple[Stream, Stream]:
    train = protocol.model_copy(update={"split": "train"})
    return (
        backbone_features(backbone, config, train, device, shared=shared),
        backbone_features(backbone, config, protocol, device, shared=shared),
    )


def _right(support: Features, query: Features, protocol: ProtocolConfig) -> Verdicts:
    """Which of the queries get their own class from the protocol's head."""
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
