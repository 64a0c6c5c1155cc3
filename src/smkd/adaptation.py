"""`smkd adapt`: phase 2 on a few labelled images from any backbone; the result is kept if held-out images gain."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from smkd.api import logged_pictures
from smkd.config import loading
from smkd.config.run_config import RunConfig
from smkd.data.datasets import configured_spec, open_source, open_split
from smkd.data.images import Images
from smkd.data.sources import opened_once
from smkd.device import pick_device
from smkd.engine import checkpoint, run_folder
from smkd.engine.launch import launch
from smkd.engine.restore import backbone_of, open_checkpoint
from smkd.errors import ConfigError, DataError
from smkd.fewshot.accuracy import Result, evaluate_features
from smkd.fewshot.candidates import written
from smkd.fewshot.validation import (
    FewShotValidation,
    HeldOutImages,
    Verdicts,
    backbone_features,
    best_features,
    verdicts,
)
from smkd.files import listed
from smkd.models.vit import VisionTransformer, block_numbers
from smkd.weights.architecture import Architecture
from smkd.weights.load import MARK

RECIPE = "adapt"
ENOUGH_CLASSES = 30
"""With so many classes whole ones are held out: then at least five select the checkpoint, and five others measure."""
WAY, SHOTS, QUERY = 5, (1, 5), 15
PER_CLASS, SMALLEST_BATCH = 4, 16
"""Images of each class in a batch, more if the batch would be smaller than that, fewer if classes are."""
STEPS = 300
"""Few images are seen in more epochs, until there are so many steps."""
VALIDATIONS = 10
SMALL = 192
"""Networks of fewer channels are small: they were measured apart."""
LR_SMALL, LR_LARGE = 0.096, 0.00768
"""Learning rate times channels: wider networks take smaller steps (Yang et al., NeurIPS 2021), and large ones, which
have been trained on many images, much smaller ones."""
HEAD_LR = 1e-3
"""Of the heads of a large network, which start from nothing."""
HeldOut = Literal["classes", "images"]
SettingValues = Mapping[str, Any]


@dataclass(frozen=True)
class Adapted:
    """The result of `adapt`.

    Attributes:
        run: the run folder. Its best checkpoint is the unchanged backbone if no epoch was better.
        held_out: classes never seen in training, or other images of the training classes.
        split: the part that was measured: 'test', or without a test 'val', which also selected the checkpoint.
        epoch: epoch of the best checkpoint; 0 is the unchanged backbone.
        features: blocks and parts that were read, before and after (`smkd.fewshot.candidates.written`).
        before, after: results of the unchanged backbone and of the best checkpoint. For held-out classes these are
            few-shot accuracies of the same episodes, one per number of shots; for held-out images bool [images],
            True where the answer is right.
    """

    run: Path
    held_out: HeldOut
    split: str
    epoch: int
    features: str
    before: list[Result] | Verdicts
    after: list[Result] | Verdicts


@opened_once()
def adapt(
    data: str | Path, out: str | Path, backbone: str | Path, settings: Iterable[str] = (), heads: int | None = None
) -> Adapted:
    """Adapt a backbone to labelled images, and measure the gain on held-out ones (docs/adapt.md).

    The same call goes on with an interrupted run.

    Args:
        data: labelled images in any form of docs/own-images.md.
        out: run folder.
        backbone: run folder, checkpoint, or weights of another project (docs/weights.md).
        settings: words such as `optim.lr=3e-5`; they replace what is worked out here.
        heads: number of attention heads of weights of another project; none finds or guesses it (docs/weights.md).

    Raises:
        SmkdError: wrong settings, data or weights; the message is one line that says what to change.
    """
    config, held_out = planned(data, out, backbone, settings, heads)
    evaluator = (FewShotValidation if held_out == "classes" else HeldOutImages)(logged_pictures)
    run = launch(config, evaluator)
    best = checkpoint.find_checkpoint(run)
    return Adapted(
        run, held_out, config.evaluation.split, int(checkpoint.load_checkpoint(best)["epoch"]),
        written(config.features),
        _measured(backbone, config, held_out), _measured(best, config, held_out),
    )  # fmt: skip


@opened_once()
def planned(
    data: str | Path, out: str | Path, backbone: str | Path, settings: Iterable[str] = (), heads: int | None = None
) -> tuple[RunConfig, HeldOut]:
    """The run that `adapt` starts with the same arguments, and what it holds out."""
    settings = list(settings)
    _check_settings(settings)
    places = {"data.root": str(data), "out": str(out), "init": str(backbone)}
    typed = [*_words(places), *_words({} if heads is None else {"model.num_heads": heads}), *settings]
    state, _ = open_checkpoint(backbone, loading.resolve(RECIPE), heads)
    words = [*_words(_of_backbone(state)), *typed]
    config = loading.resolve(RECIPE, words, typed=settings)
    keys = {word.partition("=")[0] for word in typed}
    held_out, split = _held_out(config, keys)
    words = [*_words({"data.split_by": held_out, "evaluation.split": split}), *words]
    config = loading.resolve(RECIPE, words, typed=settings)
    train = open_split(config.data, "train")
    _check_training(train)
    if config.data.sampler is None and "data.sampler" not in keys:
        sampler = _sampler(train, config)
        # what is typed is the most that a batch may hold
        words = [word for word in words if not word.startswith("batch_size=")]
        words += _words({"data.sampler": sampler, "batch_size": sampler["classes"] * sampler["per_class"]})
        config = loading.resolve(RECIPE, words, typed=settings)
    steps = max(1, len(train) // config.batch_size)
    epochs = config.epochs if "epochs" in keys else max(config.epochs, math.ceil(STEPS / steps))
    protocols = {
        f"{group}.{key}": value
        for group, part in (("validation", "val"), ("evaluation", config.evaluation.split))
        for key, value in _protocol(open_split(config.data, part), part, held_out).items()
    }
    fitted = {**_schedule(steps * epochs, epochs), **_large(config, keys), **protocols}
    words = [*_words(fitted), *words]
    config = loading.resolve(RECIPE, words, typed=settings)
    words = [*words, *_words(_read(backbone, config, held_out, keys))]
    return loading.resolve(RECIPE, words, typed=settings), held_out


def _check_settings(settings: Iterable[str]) -> None:
    """Refuse words for what the call says already: the one or the other would be ignored."""
    for word in settings:
        key = word.partition("=")[0]
        if key in ("data", "data.root", "out", "init"):
            raise ConfigError(f"{word}: `smkd adapt` is told that by DATA, --out and --backbone; leave it out")


def _words(settings: SettingValues) -> list[str]:
    # JSON is YAML
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _of_backbone(state: dict[str, Any]) -> SettingValues:
    """What a checkpoint says of its backbone: architecture, head, normalisation, pooling, view sizes and colours."""
    given = loading.check(state["config"])
    spec = configured_spec(given.data)
    taken: dict[str, Any] = {
        "model": given.model.model_dump(mode="json", exclude={"train_blocks"}),
        "head": given.head.model_dump(mode="json"),
        "features": given.features.model_dump(mode="json"), "data.mean": spec.mean, "data.std": spec.std,
    }  # fmt: skip
    side, local, resize = given.global_views.size, given.local_views.size, given.validation.resize
    crop = given.validation.crop
    if MARK not in state:
        taken["augment"] = given.augment.model_dump(mode="json")
    elif given.model.image_size < side:
        # weights alone say nothing of views: as large as what they were trained on, in the recipe's proportions
        patch, shrunk = given.model.patch_size, given.model.image_size / side
        side = crop = given.model.image_size
        local, resize = max(patch, int(local * shrunk) // patch * patch), round(resize * shrunk)
    sizes = {"global_views.size": side, "local_views.size": local}
    return taken | sizes | {
        f"{group}.{key}": value
        for group in ("validation", "evaluation") for key, value in (("resize", resize), ("crop", crop))
    }  # fmt: skip


def _held_out(config: RunConfig, keys: Set[str]) -> tuple[HeldOut, str]:
    """What is held out, and the split that measures it.

    Raises:
        DataError: there is no val split, or some of its classes are training classes and some are not.
    """
    source = open_source(config.data.model_copy(update={"split_by": "images"}))
    if not source.own_splits:
        if "data.split_by" in keys:
            return config.data.split_by, config.evaluation.split
        by_class = config.data.split_file is not None or len(source.classes["train"]) >= ENOUGH_CLASSES
        return ("classes" if by_class else "images"), config.evaluation.split
    for split in ("train", "val"):
        source.open(split)
    train = set(source.classes["train"])
    val, test = (set(source.classes.get(split, ())) for split in ("val", "test"))
    known = sorted(val & train)
    if known and val - train:
        raise DataError(
            f"'{source.root}': val has classes that are in train too ({listed(known)}) and others "
            f"({listed(sorted(val - train))}); hold out either whole classes or images of all classes"
        )
    if known:
        return "images", "test" if test and test <= train else "val"
    return "classes", "test" if test and not test & (train | val) else "val"


def _check_training(train: Images) -> None:
    if len(train.class_names) < 2:
        raise DataError(f"there is one class to train on, '{train.class_names[0]}'; adapting needs at least two")
    for name, count in zip(train.class_names, np.bincount(train.labels).tolist(), strict=True):
        if count < 2:
            raise DataError(f"class '{name}' has one image to train on; adapting compares at least two of each class")


def _sampler(train: Images, config: RunConfig) -> dict[str, int]:
    """Class-balanced batches of as many classes as fit, with two images or more of each."""
    total = len(train.class_names)
    passes, most = config.passes, config.batch_size
    # a class lies within one pass, where its pairs form
    classes = min(total, most // PER_CLASS) // passes * passes
    if not classes:
        raise DataError(
            f"batches of {most} images from {total} classes cannot be shared by {passes} devices or passes; "
            "use fewer, or a larger batch_size"
        )
    wanted = max(PER_CLASS, min(SMALLEST_BATCH, most) // classes)
    return {"classes": classes, "per_class": min(wanted, len(train) // total)}


def _read(backbone: str | Path, config: RunConfig, held_out: HeldOut, keys: Set[str]) -> SettingValues:
    """Which features are read, and how many blocks the run has: those up to the deepest that is read.

    What is typed stays; a run that has begun goes on with its own; else what does best in validation is taken.
    """
    begun = run_folder.run_path(config) / "config.yaml"
    if begun.is_file() and not config.overwrite:
        own = loading.load_config(begun)
        return {"features": own.features.model_dump(mode="json"), "model.depth": own.model.depth}
    features, depth = config.features, Architecture.of(config.model).depth
    if {"features", "features.blocks", "features.parts"}.isdisjoint(keys):
        network = _opened(backbone, config)
        device = next(network.parameters()).device
        features, depth = best_features(network, config, device, by_class=held_out == "classes"), len(network.blocks)
    deepest = max(block_numbers(features.blocks, depth))
    shorter = {"model.depth": deepest} if deepest < depth and "model.depth" not in keys else {}
    return {"features": features.model_dump(mode="json"), **shorter}


def _schedule(steps: int, epochs: int) -> SettingValues:
    # the teacher averages over a tenth of the run
    momentum = 1 - 10 / steps
    return {
        "epochs": epochs, "optim.warmup_epochs": epochs // 10, "validation.every": max(1, epochs // VALIDATIONS),
        "optim.teacher_momentum": round(min(max(momentum, 0.9), 0.996), 4),
    }  # fmt: skip


def _large(config: RunConfig, keys: Set[str]) -> SettingValues:
    """Rates, which depend on the size of the network, and whether it sees views with masks."""
    channels = Architecture.of(config.model).embed_dim
    if channels < SMALL:
        return {"optim.lr": round(LR_SMALL / channels, 6)}
    lr = LR_LARGE / channels
    masked = any(key.partition(".")[0] == "mask" for key in keys)
    return {
        "optim.lr": round(lr, 8), "optim.lr_end": round(lr / 2, 8), "optim.head_lr": HEAD_LR,
        "optim.weight_decay_end": config.optim.weight_decay,
        **({} if masked else {"mask.ratio": [0.0], "mask.ratio_jitter": [0.0]}),
    }  # fmt: skip


def _protocol(images: Images, split: str, held_out: HeldOut) -> SettingValues:
    """Ways, shots and queries that the classes with two images or more allow; the others fall out, and are named.

    Raises:
        DataError: fewer than two held-out classes have two images.
    """
    sizes = np.bincount(images.labels, minlength=len(images.class_names))
    large = sizes[sizes >= 2]
    if len(large) < 2:
        if held_out == "images":  # no episodes are drawn
            return {}
        raise DataError(
            f"the {split} split has {len(sizes)} classes, the smallest with {sizes.min()} images; measuring needs two "
            "classes with two images each"
        )
    smallest, way = int(large.min()), len(large)
    shots = [shot for shot in SHOTS if smallest >= 2 * shot]
    return {"way": min(WAY, way), "shots": shots, "query": min(QUERY, smallest - shots[-1])}


def _measured(where: str | Path, config: RunConfig, held_out: HeldOut) -> list[Result] | Verdicts:
    backbone = _opened(where, config)
    device = next(backbone.parameters()).device
    if held_out == "images":
        return verdicts(backbone, config, config.evaluation, device)
    return evaluate_features(
        backbone_features(backbone, config, config.evaluation, device).collect(), config.evaluation
    )


def _opened(where: str | Path, config: RunConfig) -> VisionTransformer:
    """The teacher's backbone of a checkpoint, with all its blocks, on the device of the run."""
    state, _ = open_checkpoint(where, config)
    return backbone_of(state, str(where), "teacher")[0].to(pick_device(config.accelerator))
