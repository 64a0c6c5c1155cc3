"""The [CLS] terms: views of one image (DINO, iBOT) and images of one class (SMKD, section 3.2).

Both compare a teacher distribution p with student logits z by the cross-entropy lse(z) - p . z, so that all pairs
of a batch are one matrix product and one logsumexp. Each function returns a sum and the number of its summands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smkd.device import to_device


def same_image(targets: Tensor, student_global: Tensor, student_local: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy of every teacher view with every other view of the same image (DINO, equation 3).

    for q in global views, v in all views, v != q, i in images:  H(targets[q, i], student[v, i])

    Args:
        targets: teacher distributions [global, batch, prototypes].
        student_global: logits over temperature [global, batch, prototypes].
        student_local: the same for local views [local, batch, prototypes].

    Returns:
        The sum, and how many cross-entropies it has.
    """
    views, batch, _ = targets.shape
    # a mask of numbers: picking by booleans would wait for the device to count them
    other = 1 - torch.eye(views, dtype=targets.dtype, device=targets.device)  # [global, global]
    across = _own_views(targets, student_global) * other[:, :, None]  # [global, global, batch]
    local = _own_views(targets, student_local)  # [global, local, batch]
    return across.sum() + local.sum(), views * (views - 1) * batch + local.numel()


def same_class(
    targets: Tensor, student_global: Tensor, student_local: Tensor, pairs: Tensor, start: int = 0,
    *, with_own_views: bool = False,
) -> tuple[Tensor, int]:  # fmt: skip
    """Cross-entropy of global views across images of one class, and with the local views of the same image.

    for q in global views, v in global views (q included), (i, j) in pairs:  H(targets[q, i], student[v, j])
    for q in global views, v in local views, i in images:                    H(targets[q, i], student[v, i])

    Args:
        targets: teacher distributions [global, images, prototypes]; images may come from all devices.
        student_global: logits over temperature of this device [global, batch, prototypes].
        student_local: the same for local views [local, batch, prototypes].
        pairs: bool [images, batch] on the CPU, True where image i and image j differ and share their class.
        start: position of this device's first image among `images`.
        with_own_views: also H(targets[q, i], student[v, i]) for different global views q and v.

    Returns:
        The sum, and how many cross-entropies it has.
    """
    own = targets[:, start : start + student_global.shape[1]]  # [global, batch, prototypes]
    local = _own_views(own, student_local)  # [global, local, batch]
    chosen = to_device(pairs, targets.device).to(targets.dtype)  # [images, batch]
    products = torch.einsum("qik,vjk->qivj", targets, student_global)  # [global, images, global, batch]
    entropy = student_global.logsumexp(dim=-1) - products
    total = (entropy * chosen[None, :, None, :]).sum() + local.sum()
    count = targets.shape[0] * student_global.shape[0] * int(pairs.sum()) + local.numel()
    if with_own_views:
        across, number = same_image(own, student_global, student_local[:0])
        total, count = total + across, count + number
    return total, count


def _own_views(targets: Tensor, student: Tensor) -> Tensor:
    """Cross-entropies [teacher views, student views, batch] between views of the same image."""
    return student.logsumexp(dim=-1) - torch.einsum("qik,vik->qvi", targets, student)
