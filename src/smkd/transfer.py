"""From the host to the device, without waiting."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for; `values` may be changed or dropped at once.

    From memory that is not pinned, CUDA may first wait for all work that is queued.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
