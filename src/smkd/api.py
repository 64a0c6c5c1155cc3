"""The package in Python: the verbs of the command line as functions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from smkd.config.loading import resolve
from smkd.config.schema import ProtocolConfig, RunConfig
from smkd.data.datasets import open_split
from smkd.engine.device import pick_device
from smkd.engine.launch import launch
from smkd.engine.restore import load_backbone
from smkd.errors import ConfigError
from smkd.fewshot.evaluate import FewShotValidation, Result, evaluate_backbone, evaluate_features
from smkd.fewshot.features import pixel_features
from smkd.models.vit import VisionTransformer

__all__ = ["Result", "RunConfig", "distill", "evaluate", "load", "pretrain", "resolve"]


def pretrain(config: RunConfig) -> Path:
    """Phase 1: self-supervised training; returns the run folder.

    Raises:
        SmkdError: wrong settings or data; the message is one line that says what to change.
    """
    return _train(config, "pretrain")


def distill(config: RunConfig) -> Path:
    """Phase 2: supervised masked knowledge distillation, from `config.init`; returns the run folder.

    Raises:
        SmkdError: wrong settings or data; the message is one line that says what to change.
    """
    return _train(config, "distill")


def load(where: str | Path, network: Literal["teacher", "student"] = "teacher") -> VisionTransformer:
    """Trained backbone of a run folder or checkpoint, in evaluation mode on the CPU."""
    return load_backbone(Path(where), network)[0]


def evaluate(
    source: VisionTransformer | Literal["pixels"], config: RunConfig, protocol: ProtocolConfig | None = None
) -> list[Result]:
    """Few-shot accuracy of a backbone on a split of a run's data.

    Args:
        source: a backbone, or 'pixels' for the floor of plain colours.
        config: data set, pooling, precision and device.
        protocol: how to measure; none takes the configuration's own `evaluation`.

    Returns:
        One result per number of shots.
    """
    protocol = protocol or config.evaluation
    if isinstance(source, str):
        features = pixel_features(open_split(config.data, protocol.split), on_error=config.data.on_error)
        return evaluate_features(features, protocol)
    device = pick_device(config.accelerator)
    return evaluate_backbone(source.to(device).eval(), config, protocol, device)


def random_backbone(config: RunConfig) -> VisionTransformer:
    """The configured backbone with the random weights that a run with this seed starts from."""
    torch.manual_seed(config.seed)
    return VisionTransformer.from_config(config.model).eval()


def _train(config: RunConfig, phase: str) -> Path:
    if config.phase != phase:
        raise ConfigError(f"phase={config.phase}: this recipe is for `{config.phase}`, not for `{phase}`")
    return launch(config, FewShotValidation())
