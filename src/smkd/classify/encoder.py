"""From images to features: a backbone with the transform and pooling of its run, which can be saved together."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from smkd.classify.pictures import InputError, Picture, Pictures, as_pictures
from smkd.config.loading import resolve
from smkd.config.protocol import FeaturesConfig
from smkd.config.run_config import RunConfig
from smkd.config.schema import ModelConfig, Section
from smkd.data.datasets import DatasetSpec, configured_spec
from smkd.device import autocast_type, pick_device
from smkd.engine.restore import backbone_of, has_settings, open_checkpoint
from smkd.errors import CheckpointError, ConfigError
from smkd.fewshot.candidates import numbered
from smkd.fewshot.features import PIXEL_SIDE, Stream, backbone_stream, pixel_stream
from smkd.files import expanded
from smkd.machine import cores
from smkd.models.vit import VisionTransformer, block_numbers
from smkd.processes import allowed
from smkd.progress import Track
from smkd.weights.architecture import check_described, check_finite
from smkd.weights.catalogue import find
from smkd.weights.fetch import is_remote
from smkd.weights.load import EXPORTED, FOREIGN_RECIPE, MARK
from smkd.weights.rename import BACKBONE, with_prefix, without_prefix
from smkd.weights.smkd_file import UNKNOWN_LICENSE, backbone_info, settings_fault

PIXELS = "pixels"
WORKERS_FROM, MOST_WORKERS = 256, 16
"""Fewer images are read before processes for it would have started."""
SMALL = 5e7
"""Products for an image, parameters times patches, below which a network gains nothing from threads."""
MOST_SIDE = 2**14
"""Pixels; an image of more would not fit into memory."""
Side = Annotated[int, Field(ge=1, le=MOST_SIDE)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LONGEST = 200
Line = Annotated[str, Field(max_length=LONGEST, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""Text without control characters."""


class EncoderConfig(Section):
    """How an image becomes a feature.

    Attributes:
        model: the backbone; None for the plain colours of a small square.
        resize, crop: shorter side in pixels, then the side of the centre square.
        mean, std: of each channel on the 0-1 scale.
        features: which tokens of which blocks.
        precision: arithmetic of the backbone.
        source: whose weights they are, without any path of a machine; empty where nothing is known.
        license: of these weights, as far as it is known.
    """

    model: ModelConfig | None = None
    resize: Side = PIXEL_SIDE
    crop: Side = PIXEL_SIDE
    mean: tuple[Finite, Finite, Finite] = (0.5, 0.5, 0.5)
    std: tuple[Above0, Above0, Above0] = (1.0, 1.0, 1.0)
    features: FeaturesConfig = FeaturesConfig()
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    source: Line = ""
    license: Line = UNKNOWN_LICENSE

    @model_validator(mode="after")
    def _check(self) -> EncoderConfig:
        if self.model is not None and self.crop % self.model.patch_size:
            raise ValueError(f"crop={self.crop} is no whole number of patches of {self.model.patch_size}")
        if self.crop > self.resize:
            raise ValueError(f"crop={self.crop} is larger than resize={self.resize}")
        return self

    @staticmethod
    def of_run(config: RunConfig, model: ModelConfig) -> EncoderConfig:
        """The transform and pooling that `smkd eval` uses for a run.

        Raises:
            ConfigError: its image size is not one for this backbone.
        """
        spec, protocol = configured_spec(config.data), config.evaluation
        try:
            return EncoderConfig(
                model=model, resize=protocol.resize, crop=protocol.crop, mean=spec.mean, std=spec.std,
                features=config.features, precision=config.precision,
            )  # fmt: skip
        except ValidationError as error:
            raise ConfigError(f"evaluation: {settings_fault(error)}") from error


class Encoded(NamedTuple):
    """Features of the images that can be read.

    Attributes:
        values: float32 [n, dim].
        rows: int64 [n], the place of each among the images that were given.
        unreadable: a line about each of the others.
    """

    values: NDArray[np.float32]
    rows: NDArray[np.int64]
    unreadable: list[str]


class Encoder:
    """Features of images.

    Args:
        config: transform and pooling.
        backbone: the network that `config.model` describes; None where that is None.
        accelerator: 'auto', 'cpu', 'cuda' or 'mps'.
        report: lines about how the weights were read.

    Raises:
        ConfigError: the accelerator is not there.
        CheckpointError: a weight is NaN or infinite.
    """

    def __init__(
        self, config: EncoderConfig, backbone: VisionTransformer | None, *, accelerator: str = "auto",
        report: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.config, self.report = config, list(report)
        self.device = pick_device(accelerator)
        if backbone is not None:
            check_finite(backbone.state_dict(), "backbone")
        self.backbone = None if backbone is None else backbone.to(self.device).eval()

    @property
    def dim(self) -> int:
        """Numbers of a feature."""
        if self.backbone is None:
            return 3 * PIXEL_SIDE**2
        return self.backbone.embed_dim * len(self.config.features.blocks) * len(self.config.features.parts)

    def reading(self, features: FeaturesConfig) -> Encoder:
        """The same backbone with other blocks and parts.

        Raises:
            ConfigError: there is no network, or it lacks a block.
        """
        if self.backbone is None:
            raise ConfigError("plain colours have no blocks and parts to choose")
        other = copy.copy(self)
        other.config = self.config.model_copy(update={"features": numbered(features, len(self.backbone.blocks))})
        return other

    def __call__(self, items: Sequence[Picture]) -> NDArray[np.float32]:
        """Features of every image, float32 [images, dim]; raises `DataError` naming the first unreadable one."""
        encoded = self.readable(items)
        if encoded.unreadable:
            raise InputError(encoded.unreadable[0])
        return encoded.values

    def readable(self, items: Sequence[Picture], track: Track | None = None) -> Encoded:
        """Features of the images that can be read, in order.

        Args:
            items: paths, Pillow images or uint8 arrays [height, width, 3].
            track: shows progress.

        Raises:
            DataError: an image for which the network gives NaN or infinity; `items` is no list.
        """
        found = as_pictures(items)
        if found is None and len(items):
            raise InputError("expected images: paths, Pillow images or uint8 arrays [height, width, 3]")
        images = Pictures(found or [])
        stream = self._stream(images)
        batches: Iterable[tuple[Tensor, NDArray[np.int64]]] = stream
        if track is not None:
            batches = track(stream, "features", len(stream.loader))
        with self._few_threads(len(images)):
            parts = list(batches)
        values = torch.cat([part[0] for part in parts]) if parts else torch.empty(0, self.dim)
        rows = np.concatenate([part[1] for part in parts]) if parts else np.empty(0, np.int64)
        missing = sorted(set(range(len(images))) - set(rows.tolist()))
        return Encoded(values.numpy(), rows, [_reason(images, index) for index in missing])

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Settings as plain values, and weights by name; `restored` reads them."""
        weights = {} if self.backbone is None else self.backbone.state_dict()
        kept = {name: value for name, value in weights.items() if name != "mask_token"}
        return self.config.model_dump(mode="json"), with_prefix(kept, BACKBONE)

    @staticmethod
    def restored(
        settings: Any, tensors: dict[str, Tensor], accelerator: str = "auto", where: str = "encoder"
    ) -> Encoder:
        """The encoder that `saved` described; messages call it `where`.

        Raises:
            CheckpointError: settings are missing or wrong, or do not fit the weights.
        """
        try:
            config = EncoderConfig.model_validate(settings)
        except ValidationError as error:
            raise CheckpointError(f"'{where}': encoder: {settings_fault(error)}") from error
        if config.model is None:
            return Encoder(config, None, accelerator=accelerator)
        weights = without_prefix(tensors, BACKBONE)
        # before a network of these sizes is made
        check_described(weights, config.model, where)
        backbone = VisionTransformer.with_weights(config.model, weights)
        try:
            block_numbers(config.features.blocks, len(backbone.blocks))
        except ConfigError as error:
            raise CheckpointError(f"'{where}': encoder: {error}") from error
        return Encoder(config, backbone, accelerator=accelerator)

    @contextmanager
    def _few_threads(self, images: int) -> Iterator[None]:
        """Use one thread for a small network while processes read images; more threads would take their cores."""
        before = torch.get_num_threads()
        if self.backbone is not None and self.device.type == "cpu" and _reading_processes(images):
            tokens = (self.config.crop // self.backbone.patch_size) ** 2
            if tokens * sum(p.numel() for p in self.backbone.parameters()) < SMALL:
                torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _stream(self, images: Pictures) -> Stream:
        if self.backbone is None:
            return pixel_stream(images, on_error="skip")
        config = self.config
        return backbone_stream(
            self.backbone, images, DatasetSpec(config.mean, config.std), config.features, resize=config.resize,
            crop=config.crop, device=self.device, autocast=autocast_type(config.precision, self.device),
            num_workers=_reading_processes(len(images)), on_error="skip",
        )  # fmt: skip


def open_encoder(
    backbone: str | Path | VisionTransformer | Encoder, recipe: str | RunConfig | None = None,
    accelerator: str = "auto", heads: int | None = None,
) -> Encoder:  # fmt: skip
    """Encoder of a backbone.

    Args:
        backbone: run folder, checkpoint, weights of another project (docs/weights.md), 'pixels' for plain colours, a
            network, or an encoder, which is taken as it is.
        recipe: gives image size, normalisation and pooling to a network, or to weights that have none (default
            'folder-pretrain').
        accelerator: 'auto', 'cpu', 'cuda' or 'mps'.
        heads: number of attention heads of weights of another project; none finds or guesses it (docs/weights.md).

    Raises:
        CheckpointError: missing, unreadable, with NaN, or no ViT of a kind that this package has.
        ConfigError: a network without a recipe, an unknown recipe, or one for what has settings of its own.
    """
    if heads is not None and (isinstance(backbone, Encoder | VisionTransformer) or str(backbone) == PIXELS):
        raise ConfigError(f"heads={heads} is for files of weights, which do not say how many they have")
    if isinstance(backbone, Encoder):
        return backbone
    if isinstance(backbone, VisionTransformer):
        if recipe is None:
            raise ConfigError(
                "a network by itself says nothing of image size and normalisation: add recipe=, or give its run "
                "folder or file instead"
            )
        config = resolve(recipe) if isinstance(recipe, str) else recipe
        return Encoder(EncoderConfig.of_run(config, _configuration(backbone)), backbone, accelerator=accelerator)
    if str(backbone) == PIXELS:
        if recipe is not None:
            raise ConfigError(f"recipe={_name(recipe)} has no effect: '{PIXELS}' is no network; leave it out")
        return Encoder(EncoderConfig(), None, accelerator=accelerator)
    base = recipe if isinstance(recipe, RunConfig) else resolve(recipe or FOREIGN_RECIPE)
    state, _ = open_checkpoint(backbone, base, heads)
    if recipe is not None and has_settings(state):
        raise ConfigError(f"recipe={_name(recipe)} has no effect: '{backbone}' has settings of its own; leave it out")
    network, config = backbone_of(state, str(backbone), "teacher")
    settings = EncoderConfig.of_run(config, network.config).model_copy(update=_origin(str(backbone), state))
    return Encoder(settings, network, accelerator=accelerator, report=state.get(MARK, []))


def _origin(where: str, state: dict[str, Any]) -> dict[str, str]:
    """What to call a backbone, without any path of this machine, and its licence."""
    known = find(where)
    if known is not None:
        return {"source": known.name, "license": known.licence}
    place = expanded(where).resolve()
    run = place.parent.parent if place.parent.name == "checkpoints" else place
    said = {"source": where.partition("#")[0] if is_remote(where) else run.name}
    if EXPORTED in state:
        said["license"] = backbone_info(state[EXPORTED], where).license
    # names and headers of others may hold anything
    return {key: text for key, text in said.items() if text.isprintable() and len(text) <= LONGEST}


def _name(recipe: str | RunConfig) -> str:
    return recipe if isinstance(recipe, str) else recipe.recipe


def _configuration(backbone: VisionTransformer) -> ModelConfig:
    """The configuration of a network that a user gives.

    Raises:
        ConfigError: it was changed since it was made.
    """
    with torch.device("meta"):
        fresh = VisionTransformer.from_config(backbone.config, mask_token=hasattr(backbone, "mask_token"))
    if _anatomy(backbone) != _anatomy(fresh):
        raise ConfigError("this network is not one that settings describe: give its run folder or file instead")
    return backbone.config


def _anatomy(network: VisionTransformer) -> list[tuple[object, ...]]:
    """The parts of a network with the numbers that decide what they compute in evaluation, and its weights' shapes."""
    training_only = {"training", "recompute", "rate"}
    parts: list[tuple[object, ...]] = [(name, value.shape) for name, value in network.state_dict().items()]
    for name, part in network.named_modules():
        # the network itself may be of a class of one's own
        parts.append((name, type(part) if name else None))
        parts += [
            (name, key, value)
            for key, value in sorted(vars(part).items())
            if isinstance(value, int | float | str | tuple) and key not in training_only
        ]
    return parts


def _reading_processes(images: int) -> int:
    """How many processes read images while this one runs the network; they wait if the network is slower."""
    # a script without a main guard cannot start processes that are not forked
    if images < WORKERS_FROM or multiprocessing.get_start_method() != "fork":
        return 0
    return allowed(min(MOST_WORKERS, cores() - 1))


def _reason(images: Pictures, index: int) -> str:
    """Why an image could not be read; reads it again to find out."""
    try:
        images.load(index)
    except ValueError as error:
        return str(error)
    return f"cannot read image {images.name(index)}"
