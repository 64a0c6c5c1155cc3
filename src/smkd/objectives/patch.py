"""The patch terms: masked patches (Zhou et al., iBOT, ICLR 2022, section 3.1) and matched ones (SMKD, section 3.3).

A matching says which student patch is compared with which teacher patch, and with what weight. The term is the sum over
all matches of weight * H(p[teacher patch], z[student patch]), by `objectives/patch_entropy.py`. A masked patch is
matched with itself. docs/extending.md shows how to add a matching.
"""

from __future__ import annotations

from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from smkd.device import to_device
from smkd.objectives.patch_entropy import Matches


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


PAIRS_AT_ONCE = {"cpu": 16, "cuda": 256}
"""Image pairs whose similarities are in memory together: near the caches on the CPU, enough work for a GPU."""


@torch.no_grad()
def match_paper(student_tokens: Tensor, teacher_tokens: Tensor, pairs: Tensor, attention: Tensor | None) -> Matches:
    """For every teacher patch, the student patch of the other image that is most similar.

    for (s, t) different global views, (i, j) in pairs, N patch of teacher image i in view t:
        m = argmax_n cosine(student_tokens[s, j, n], teacher_tokens[t, i, N])
        a match of student patch (s, j, m) with teacher patch (t, i, N)

    Each pair of images in each pair of views is one term: its weights sum to 1 / terms.

    Args:
        student_tokens: backbone patch tokens [global, batch, patches, dim].
        teacher_tokens: the same [global, images, patches, dim]; images may come from all devices.
        pairs: bool [images, batch] on the CPU, True where teacher image i is paired with student image j.
        attention: weights of the teacher's patches [global, images, patches], or None for a plain mean.
    """
    views, batch, patches, _ = student_tokens.shape
    images = teacher_tokens.shape[1]
    device = student_tokens.device
    of_student, of_teacher = F.normalize(student_tokens, dim=-1), F.normalize(teacher_tokens, dim=-1)
    rows, columns = pairs.nonzero(as_tuple=True)  # [all pairs] each
    view_pairs = list(permutations(range(views), 2))
    terms = len(rows) * len(view_pairs)
    student, teacher = [], []
    some = PAIRS_AT_ONCE["cpu" if device.type == "cpu" else "cuda"]
    for i, j in zip(rows.split(some), columns.split(some), strict=True):
        i, j = to_device(i, device), to_device(j, device)
        for s, t in view_pairs:
            # [pairs, patches of the teacher, patches of the student]
            similarity = of_teacher[t, i] @ of_student[s, j].transpose(1, 2)
            best = similarity.argmax(dim=2)  # [pairs, patches of the teacher]
            student.append(((s * batch + j) * patches)[:, None] + best)
            teacher.append(((t * images + i) * patches)[:, None] + torch.arange(patches, device=device))
    if not terms:
        return no_matches(device)
    to_teacher = torch.cat(teacher).flatten()  # [matches]
    weights = _weights(attention, (views, images, patches), device)[to_teacher] / terms  # [matches]
    return Matches(torch.cat(student).flatten(), to_teacher, weights, terms)


@torch.no_grad()
def match_reference(student_tokens: Tensor, teacher_tokens: Tensor, pairs: Tensor, attention: Tensor | None) -> Matches:
    """The matching of the published code, which is not the paper's formula (docs/fidelity.md).

    for (s, t) different global views, i image, a image of the same class, N patch:
        m = argmax_n sum(student_tokens[s, a, n]) * sum(teacher_tokens[t, i, N])   (sums over channels)
        a match of student patch (s, first image of the class in the batch, m) with teacher patch (s, a, N)

    Without attention a = i is left out and a term is the mean over its matches; with attention a = i stays and a
    term is the sum weighted by the teacher's attention in view t. The terms (s, t, i) are averaged.

    Args:
        student_tokens, teacher_tokens: backbone patch tokens [global, batch, patches, dim].
        pairs: bool [batch, batch] on the CPU, True where two images share their class, as each does with itself.
        attention: weights of the teacher's patches [global, batch, patches], or None.
    """
    views, batch, patches, _ = student_tokens.shape
    device = student_tokens.device
    first_of_class = pairs.int().argmax(dim=1)  # [batch]
    same = pairs if attention is not None else pairs & ~torch.eye(batch, dtype=torch.bool)  # [batch, batch]
    group = same.sum(dim=1)  # [batch]
    terms = int((group > 0).sum()) * views * (views - 1)
    if not terms:
        return no_matches(device)
    i, a = same.nonzero(as_tuple=True)  # [pairs] each
    share = to_device(1.0 / (group[i] * patches * terms), device)  # [pairs]
    first, i, a = (to_device(images, device) for images in (first_of_class[a], i, a))
    student_sum = F.normalize(student_tokens, dim=-1).sum(dim=-1)  # [global, batch, patches]
    teacher_sum = F.normalize(teacher_tokens, dim=-1).sum(dim=-1)
    # a product of two sums is largest at the largest student sum, or at the smallest if the teacher's is negative
    largest, smallest = student_sum.argmax(dim=-1), student_sum.argmin(dim=-1)  # [global, batch]
    patch = torch.arange(patches, device=device)
    student, teacher, weights = [], [], []
    for s, t in permutations(range(views), 2):
        best = torch.where(teacher_sum[t, i] > 0, largest[s, a][:, None], smallest[s, a][:, None])  # [pairs, patches]
        best = torch.where(teacher_sum[t, i] == 0, 0, best)
        student.append(((s * batch + first) * patches)[:, None] + best)
        teacher.append(((s * batch + a) * patches)[:, None] + patch)
        weights.append(share[:, None].expand(-1, patches) if attention is None else attention[t, a] / terms)
    return Matches(torch.cat(student).flatten(), torch.cat(teacher).flatten(), torch.cat(weights).flatten(), terms)


def image_terms(partners: Tensor, matching: str, *, own: bool, weighted: bool) -> int:
    """Number of terms of a matching in each pair of views, for each image.

    Args:
        partners: int64 [images], how many other images each is paired with.
        matching: its name.
        own, weighted: as `objective.patch` has it.
    """
    if matching == "reference":  # a term for each image that has partners; with attention it is one itself
        return len(partners) if weighted else int((partners > 0).sum())
    return int((partners + own).sum())


def _weights(attention: Tensor | None, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """[views * images * patches]."""
    if attention is not None:
        return attention.flatten()
    views, images, patches = shape
    return torch.full((views * images * patches,), 1 / patches, device=device)


def no_matches(device: torch.device) -> Matches:
    """What a matching gives where there is no pair."""
    none = torch.empty(0, dtype=torch.long, device=device)
    return Matches(none, none, torch.empty(0, device=device), 0)
