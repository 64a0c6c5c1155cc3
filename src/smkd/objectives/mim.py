"""Masked-patch prediction (Zhou et al., iBOT, ICLR 2022)."""

from __future__ import annotations

from torch import Tensor


def masked_patches(targets: Tensor, student: Tensor, masks: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy of masked student patches with the teacher's patch at the same place.

    mean over views and images of:  sum over masked patches N of H(targets[v, i, N], student[v, i, N]) / masked

    An image without masked patches counts as 0.

    Args:
        targets: teacher distributions [global, batch, patches, prototypes].
        student: logits over temperature, same shape.
        masks: bool [global, batch, patches] on the CPU.

    Returns:
        The mean, and the number of masked patches.
    """
    rows = masks.flatten().nonzero()[:, 0]
    per_image = masks.sum(dim=-1, keepdim=True).clamp(min=1)
    weights = (masks / (per_image * masks.shape[0] * masks.shape[1])).flatten()[rows]
    rows = rows.to(student.device, non_blocking=True)
    z, p = student.flatten(0, 2)[rows], targets.flatten(0, 2)[rows]
    entropy = z.logsumexp(dim=-1) - (p * z).sum(dim=-1)
    return (entropy * weights.to(entropy, non_blocking=True)).sum(), len(rows)
