"""The package in Python: the verbs of the command line as functions."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image

from smkd import distributed
from smkd.config.loading import changed, resolve
from smkd.config.protocol import FeaturesConfig, ProtocolConfig
from smkd.config.run_config import RunConfig
from smkd.data.datasets import GIVEN, configured_spec, give_images, is_of_others, open_split
from smkd.data.hub import PREFIX as HUB
from smkd.data.images import SPLITS
from smkd.data.sources import opened_once
from smkd.data.torch_dataset import LabelledImages
from smkd.device import pick_device
from smkd.engine.launch import launch
from smkd.engine.restore import backbone_of, has_settings, load, open_checkpoint
from smkd.errors import ConfigError, DataError
from smkd.fewshot.accuracy import Result, evaluate_features
from smkd.fewshot.candidates import candidates, narrowed, numbered, together, written
from smkd.fewshot.feature_file import FeatureSource, read_features, read_source
from smkd.fewshot.features import PIXEL_SIDE, Features, Stream, pixel_stream
from smkd.fewshot.validation import FewShotValidation, backbone_features
from smkd.files import expanded, printable, sha256
from smkd.models.vit import VisionTransformer
from smkd.weights.architecture import check_finite
from smkd.weights.load import MARK

__all__ = ["Result", "RunConfig", "distill", "evaluate", "load", "open_features", "pretrain", "resolve"]

FEATURE_SUFFIXES = (".h5", ".hdf5")


GivenImages = LabelledImages | Mapping[str, LabelledImages]
"""A data set of (image, label) to train on, or one for each of the splits 'train', 'val' and 'test'."""


def pretrain(config: RunConfig, images: GivenImages | None = None) -> Path:
    """Phase 1: self-supervised training; returns the run folder.

    Args:
        config: every setting.
        images: a PyTorch data set in place of the configured one (docs/extending.md).

    Raises:
        SmkdError: wrong settings or data; the message is one line that says what to change.
    """
    return _train(config, "pretrain", images)


def distill(config: RunConfig, images: GivenImages | None = None) -> Path:
    """Phase 2: supervised masked knowledge distillation, from `config.init`; returns the run folder.

    Args:
        config: every setting.
        images: a PyTorch data set in place of the configured one (docs/extending.md).

    Raises:
        SmkdError: wrong settings or data; the message is one line that says what to change.
    """
    return _train(config, "distill", images)


def evaluate(
    source: VisionTransformer | Literal["pixels"], config: RunConfig, protocol: ProtocolConfig | None = None
) -> list[Result]:
    """Few-shot accuracy of a backbone on a split of a run's data.

    Args:
        source: a backbone, or 'pixels' for the floor of plain colours.
        config: data set, pooling, precision and device.
        protocol: how to measure; none takes `config.evaluation`.

    Returns:
        One result per number of shots.
    """
    protocol = protocol or config.evaluation
    return evaluate_features(_stream(source, config, protocol).collect(), protocol)


@dataclass(frozen=True)
class Opened:
    """A source of features.

    Attributes:
        name: what it is called in tables.
        about: where the features come from.
        protocol: how its run is measured.
        stream: features batch by batch, or None for a feature file.
        unused: what was given and has no effect on it, such as 'recipe=debug-pretrain', and why.
        tried: blocks and parts to measure one by one, all of which are in the stream's features.
        checkpoint: which file of a run it is, and after which epoch; empty for what is no checkpoint.
    """

    name: str
    about: FeatureSource
    protocol: ProtocolConfig
    stream: Stream | None
    unused: Mapping[str, str] = field(default_factory=dict)
    tried: tuple[FeaturesConfig, ...] = ()
    checkpoint: str = ""

    def features(self) -> Features:
        """All features; those of a file are mapped into memory."""
        return self.stream.collect() if self.stream is not None else read_features(Path(self.name))

    def one_by_one(self) -> Iterator[tuple[Opened, Features]]:
        """What is tried, each by itself, of the same images."""
        wide, all_of_them = together(self.tried), self.features()
        for each in self.tried:
            about = replace(self.about, parts=each.parts, blocks=each.blocks)
            values = narrowed(all_of_them.values, wide, each)
            yield replace(self, name=f"{self.name} {written(each)}", about=about), replace(all_of_them, values=values)


@opened_once()
def open_all(
    sources: Iterable[str | Path], *, recipe: str | None = None, network: Literal["teacher", "student"] | None = None,
    changes: Mapping[str, Any] | None = None, heads: int | None = None, every: bool = False,
) -> list[Opened]:  # fmt: skip
    """Several sources of features, of which each setting that is given has an effect on one; see `open_features`.

    Images that several are measured on are looked for once.
    """
    opened = [_open(each, recipe, network, changes or {}, heads, every) for each in sources]
    for given, reason in opened[0].unused.items():
        if all(given in each.unused for each in opened):
            raise ConfigError(f"{given} has no effect: {reason}; leave it out")
    return opened


def open_features(
    what: str | Path, *, recipe: str | None = None, network: Literal["teacher", "student"] | None = None,
    changes: Mapping[str, Any] | None = None, heads: int | None = None, every: bool = False,
) -> Opened:  # fmt: skip
    """Features of a run, a checkpoint or a feature file; or, with a recipe, of 'pixels' or 'random' weights.

    Args:
        what: path or name of the source; weights of another project (docs/weights.md) need a recipe.
        recipe: recipe that gives data and image size to 'pixels', 'random' and weights of other projects.
        network: which of a checkpoint's two; none is the teacher.
        changes: settings that replace the run's, such as `{"evaluation": {"split": "val"}}`.
        heads: number of attention heads of weights of another project; none finds or guesses it (docs/weights.md).
        every: fill in `tried` with all candidates (`smkd.fewshot.candidates`).

    Raises:
        SmkdError: there is no such source, or a setting does not fit it, or has no effect.
    """
    return open_all([what], recipe=recipe, network=network, changes=changes, heads=heads, every=every)[0]


def _open(
    what: str | Path, recipe: str | None, network: Literal["teacher", "student"] | None, given: Mapping[str, Any],
    heads: int | None, every: bool,
) -> Opened:  # fmt: skip
    name = str(what)
    words = {"recipe": recipe, "network": network, "heads": heads}
    if Path(name).suffix in FEATURE_SUFFIXES:
        if heads is not None:
            raise ConfigError(f"'{name}' is a feature file: --heads {heads} cannot be changed")
        if every:
            raise ConfigError(f"'{name}' is a feature file: its blocks and parts are what they are")
        unused = _unused(words, ("recipe", "network"), f"'{name}' is a feature file")
        return replace(_open_file(str(expanded(name)), given), unused=unused)
    source: VisionTransformer | Literal["pixels"] = "pixels"
    checkpoint = ""
    digest, unused = "", dict[str, str]()
    if name in ("pixels", "random"):
        if recipe is None:
            raise ConfigError(f"'{name}' needs --recipe, whose data and image size it takes")
        config = changed(resolve(recipe), given)
        unused = _unused(words, ("network", "heads"), f"'{name}' is no file of weights")
        if name == "random":
            source = random_backbone(config)
        else:
            unused |= _unused(_words(given), PIXELS_WITHOUT, "plain colours need no network")
    else:
        state, file = open_checkpoint(name, None if recipe is None else resolve(recipe), heads)
        if has_settings(state):
            unused = _unused(words, ("recipe",), f"'{name}' has settings of its own")
        source, config = backbone_of(state, name, network or "teacher")
        for line in state.get(MARK, []):
            print(printable(line), file=sys.stderr)
        config = changed(config, given)
        digest = sha256(file)
        if "epoch" in state and MARK not in state:
            checkpoint = f"{file}, after epoch {state['epoch']}"
    tried: list[FeaturesConfig] = []
    if every:
        if isinstance(source, str):
            raise ConfigError("plain colours have no blocks and parts to choose")
        tried = candidates(config.features, len(source.blocks))
        config = changed(config, {"features": together(tried).model_dump(mode="json")})
    _check_data(name, config)
    protocol = config.evaluation
    stream = _stream(source, config, protocol)
    return Opened(
        name, _about(source, name, config, stream, digest), protocol, stream, unused, tuple(tried), checkpoint
    )


PIXELS_WITHOUT = (
    "evaluation.resize", "evaluation.crop", "features.blocks", "features.parts", "precision",
)  # fmt: skip
"""Settings of networks, which plain colours are without."""


def _words(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key."""
    groups = {key: value if isinstance(value, Mapping) else {"": value} for key, value in given.items()}
    return {f"{group}.{key}".strip("."): value for group, values in groups.items() for key, value in values.items()}


def _unused(given: Mapping[str, Any], names: Iterable[str], reason: str) -> dict[str, str]:
    """Those of the settings that are given."""
    return {f"{name}={given[name]}": reason for name in names if given.get(name) is not None}


def random_backbone(config: RunConfig) -> VisionTransformer:
    """The configured backbone with the random weights that a run with this seed starts from."""
    torch.manual_seed(config.seed)
    return VisionTransformer.from_config(config.model).eval()


def _open_file(name: str, given: Mapping[str, Any]) -> Opened:
    about = read_source(Path(name))
    split = given.get("evaluation", {}).get("split")
    if split and about.split and split != about.split:
        raise ConfigError(f"'{name}' holds features of {about.split} classes, not of {split}")
    # a file's images and network are what they are
    for place, value in _words(given).items():
        if value is not None and place not in ("accelerator", "evaluation.split"):
            raise ConfigError(f"'{name}' is a feature file: {place}={value} cannot be changed")
    said = about.split or split  # other programs' files do not say it
    known = {"split": said} if said in SPLITS else {}
    return Opened(name, about, ProtocolConfig.model_validate(known), None)


def _check_data(name: str, config: RunConfig) -> None:
    """Raise `DataError` if the images of a run are no longer where they were."""
    root = config.data.root
    if config.data.dataset == "patterns" or is_of_others(config.data):
        return
    if root is not None and (root.exists() or str(root).startswith(HUB)):
        return
    gone = "does not say where its images lie" if root is None else f"has its images in '{root}', which does not exist"
    here = "" if root is None or root.is_absolute() else f" in '{Path.cwd()}'"
    raise DataError(f"'{name}' {gone}{here}; say where they are: --data FOLDER")


def _stream(source: VisionTransformer | Literal["pixels"], config: RunConfig, protocol: ProtocolConfig) -> Stream:
    if isinstance(source, str):
        return pixel_stream(open_split(config.data, protocol.split), on_error=config.data.on_error)
    check_finite(source.state_dict(), "backbone")
    device = pick_device(config.accelerator)
    return backbone_features(source.to(device).eval(), config, protocol, device)


def _about(
    source: VisionTransformer | str, name: str, config: RunConfig, stream: Stream, checkpoint_sha256: str
) -> FeatureSource:
    protocol, pixels = config.evaluation, isinstance(source, str)
    size = config.model
    network = f"{name}: ViT-{size.size}/{size.patch_size}"
    transform = (
        f"resize {PIXEL_SIDE}, crop {PIXEL_SIDE}" if pixels else f"resize {protocol.resize}, crop {protocol.crop}"
    )
    blocks = () if isinstance(source, str) else numbered(config.features, len(source.blocks)).blocks
    return FeatureSource(
        model="pixels" if pixels else network, checkpoint_sha256=checkpoint_sha256, dataset=config.data.name,
        split=protocol.split, transform=transform, parts=() if pixels else config.features.parts,
        blocks=blocks, class_names=tuple(stream.images.class_names),
    )  # fmt: skip


def _train(config: RunConfig, phase: str, images: GivenImages | None) -> Path:
    if config.phase != phase:
        raise ConfigError(f"phase={config.phase}: this recipe is for `{config.phase}`, not for `{phase}`")
    if images is not None:
        config = _with_images(config, images)
    if is_of_others(config.data):
        # others who read the run may not have the data set
        spec = configured_spec(config.data)
        config = changed(config, {"data": {"mean": spec.mean, "std": spec.std}})
    return launch(config, FewShotValidation(logged_pictures))


def logged_pictures(backbone: VisionTransformer, config: RunConfig, device: torch.device) -> dict[str, Image]:
    """What TensorBoard shows of a run beside its numbers; nothing if an image of them cannot be read."""
    from smkd.viz.validation_pictures import validation_pictures  # loads matplotlib

    try:
        return validation_pictures(backbone, config, device)
    except DataError:  # `data.on_error` says what becomes of such an image in training
        return {}


def _with_images(config: RunConfig, images: GivenImages) -> RunConfig:
    if config.data.root is not None:
        raise ConfigError(f"data={config.data.root} and images= are two data sets; leave one out")
    if config.devices > 1 and distributed.place() is None:
        raise ConfigError(
            f"devices={config.devices} starts processes that do not have images=; use torchrun, or "
            "smkd.register_dataset at the top of the script"
        )
    give_images(images)
    return changed(config, {"data": {"dataset": GIVEN}})
