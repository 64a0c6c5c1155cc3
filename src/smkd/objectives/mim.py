"""Masked-patch prediction (Zhou et al., iBOT, ICLR 2022, section 3.1): every masked patch is matched with itself."""

from __future__ import annotations

import torch
from torch import Tensor

from smkd.objectives.matched import Matches
from smkd.transfer import to_device


def match_masked(masks: Tensor, device: torch.device) -> Matches:
    """Masked student patches with the teacher's patch at the same place.

    The term is the mean over views and images of the mean over their masked patches; an image without masked patches
    counts as 0.

    Args:
        masks: bool [global, batch, patches] on the CPU.
        device: of the result.

    Returns:
        Rows counted over [global, batch, patches]; as many terms as masked patches.
    """
    rows = masks.flatten().nonzero()[:, 0]  # [masked]
    per_image = masks.sum(dim=-1, keepdim=True).clamp(min=1)  # [global, batch, 1]
    weights = (masks / (per_image * masks.shape[0] * masks.shape[1])).flatten()[rows]  # [masked]
    on_device = to_device(rows, device)
    return Matches(on_device, on_device, to_device(weights, device), len(rows))
