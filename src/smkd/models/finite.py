"""Checks that weights are plain finite floats; every reader and writer of weights calls them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from smkd.errors import CheckpointError

WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def weight_fault(value: Tensor) -> str:
    """What is wrong with a tensor of weights, in words; empty for a dense tensor of floats."""
    if value.is_nested or value.layout != torch.strided:
        return "sparse or nested; weights should be dense"
    if value.device.type == "meta":
        return "without numbers (a 'meta' tensor)"
    if value.dtype not in WEIGHT_TYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHT_TYPES)
        return f"{str(value.dtype).removeprefix('torch.')}; weights should be {names}"
    return ""


def check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are NaN or infinite.

    Args:
        weights: dense tensors of floats, by name.
        where: what messages call the file or network.

    Raises:
        CheckpointError: one is not finite; names it.
    """
    for name, value in weights.items():
        bad = value.numel() - int(value.isfinite().sum())
        if bad:
            raise CheckpointError(f"'{where}': {bad} of {value.numel()} numbers of {name} are NaN or infinite")
