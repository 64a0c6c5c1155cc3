"""What the tests of the classifier share: separable features and a tiny network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from made_images import photographs
from smkd.config.loading import resolve
from smkd.engine import checkpoint
from smkd.models.vit import VisionTransformer


def blobs(
    counts: tuple[int, ...], *, dim: int = 16, noise: float = 0.35, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """Features around one random direction per class, and the classes' names; centres do not depend on `seed`."""
    centres = np.random.default_rng(7).normal(size=(len(counts), dim))
    labels = np.repeat(np.arange(len(counts)), counts)
    values = centres[labels] + noise * np.random.default_rng(seed).normal(size=(len(labels), dim))
    return values, np.array([f"kind {label}" for label in labels])


def tiny_network() -> VisionTransformer:
    """Random weights of the debug recipes."""
    torch.manual_seed(0)
    return VisionTransformer.from_config(resolve("debug-pretrain").model).eval()


def support_and_rest(folder: Path) -> None:
    """Photographs of two classes to learn from, others of them, and a checkpoint `net.pt`."""
    photographs(folder / "support", (4, 5))
    photographs(folder / "rest", (2, 2), skip=5)
    tiny_checkpoint(folder / "net.pt")


def tiny_checkpoint(path: Path) -> Path:
    """The same as a checkpoint of a run in float32, so that it does not matter in which batch an image is."""
    weights = {f"backbone.{name}": value for name, value in tiny_network().state_dict().items()}
    config = resolve("debug-pretrain", ["accelerator=cpu", "precision=fp32"]).model_dump(mode="json")
    checkpoint.save_checkpoint({"teacher": weights, "config": config}, path)
    return path
