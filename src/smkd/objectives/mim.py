"""Masked-patch prediction (Zhou et al., iBOT, ICLR 2022): every masked patch is matched with itself."""

from __future__ import annotations

import torch
from torch import Tensor

from smkd.objectives.matched import Matches


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
    rows = masks.flatten().nonzero()[:, 0]
    per_image = masks.sum(dim=-1, keepdim=True).clamp(min=1)
    weights = (masks / (per_image * masks.shape[0] * masks.shape[1])).flatten()[rows]
    on_device = rows.to(device, non_blocking=True)
    return Matches(on_device, on_device, weights.to(device, non_blocking=True), len(rows))
