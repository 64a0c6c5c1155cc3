"""The losses once more, as plain loops over views, images and patches in float64: slow and obvious.

Every function returns the mean over its terms and the number of terms; without a term the mean is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """H(p, softmax(z)) of two vectors [prototypes]."""
    return -(target * logits.log_softmax(dim=-1)).sum()


def softened(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Teacher's distribution of one vector of logits [prototypes]."""
    return ((logits - center) / temperature).softmax(dim=-1)


def cls_same_image(targets: Tensor, student_global: Tensor, student_local: Tensor) -> tuple[Tensor, int]:
    """Every teacher view q against every other view v of the same image."""
    terms = []
    for q in range(len(targets)):
        for i in range(targets.shape[1]):
            for v in range(len(student_global)):
                if v != q:
                    terms.append(cross_entropy(targets[q, i], student_global[v, i]))
            for v in range(len(student_local)):
                terms.append(cross_entropy(targets[q, i], student_local[v, i]))
    return _mean(terms, student_global)


def cls_same_class(
    targets: Tensor, student_global: Tensor, student_local: Tensor, labels: list[int], *, with_own_views: bool = False
) -> tuple[Tensor, int]:
    """Global views of different images of one class, v = q included, and the local views of the same image."""
    terms = []
    for q in range(len(targets)):
        for i in range(len(labels)):
            for v in range(len(student_global)):
                for j in range(len(labels)):
                    if i != j and labels[i] == labels[j]:
                        terms.append(cross_entropy(targets[q, i], student_global[v, j]))
                if with_own_views and v != q:
                    terms.append(cross_entropy(targets[q, i], student_global[v, i]))
            for v in range(len(student_local)):
                terms.append(cross_entropy(targets[q, i], student_local[v, i]))
    return _mean(terms, student_global)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two vectors, as a plain number: no gradient."""
    dot = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    return float(dot / (sum(x * x for x in a.tolist()) * sum(y * y for y in b.tolist())) ** 0.5)


def matched_patches_paper(
    targets: Tensor, student: Tensor, student_tokens: Tensor, teacher_tokens: Tensor, labels: list[int], *,
    attention: Tensor | None, same_image: bool,
) -> tuple[Tensor, int]:  # fmt: skip
    """For each teacher patch N of image i in view t, the most similar student patch of image j in view s."""
    views, _, patches, _ = student.shape
    terms = []
    for s in range(views):
        for t in range(views):
            if s == t:
                continue
            for i in range(len(labels)):
                for j in range(len(labels)):
                    if labels[i] != labels[j] or (i == j and not same_image):
                        continue
                    term = student.new_zeros(())
                    for place in range(patches):
                        similarity = [
                            cosine(student_tokens[s, j, n], teacher_tokens[t, i, place]) for n in range(patches)
                        ]
                        m = similarity.index(max(similarity))
                        weight = 1 / patches if attention is None else float(attention[t, i, place])
                        term = term + weight * cross_entropy(targets[t, i, place], student[s, j, m])
                    terms.append(term)
    return _mean(terms, student)


def masked_patches(targets: Tensor, student: Tensor, masks: Tensor) -> tuple[Tensor, int]:
    """Mean over views and images of the mean over masked patches; no masked patch counts as 0."""
    views, images, patches = masks.shape
    total, count = student.new_zeros(()), 0
    for v in range(views):
        for i in range(images):
            hidden = [n for n in range(patches) if bool(masks[v, i, n])]
            for n in hidden:
                total = total + cross_entropy(targets[v, i, n], student[v, i, n]) / len(hidden)
            count += len(hidden)
    return total / (views * images), count


def _mean(terms: list[Tensor], like: Tensor) -> tuple[Tensor, int]:
    if not terms:
        return like.new_zeros(()), 0
    return torch.stack(terms).mean(), len(terms)
