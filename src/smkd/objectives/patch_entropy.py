"""Cross-entropy of matched patches, with its gradient, in memory that does not grow with patches times prototypes.

Logits are an embedding times the prototypes: t = E_t W_t' for the teacher, z = E_s W_s' / tau for the student. With
p = softmax((t - c) / tau_t), the sum over matches (s, t, weight) of weight * H(p_t, z_s) is

    sum_s m_s lse(z_s) - sum_t (p_t W_s) . x_t / tau      m_s = sum of the weights of the matches of s
                                                          x_t = sum of weight * E_s over the matches of t

so matches are added up in the few channels of the embeddings, and each row of p and softmax(z) is needed once. Some
rows at a time are computed, used for the value and the gradient, and freed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ELEMENTS_AT_ONCE = {"cpu": 2**22, "cuda": 2**26}
"""Rows times prototypes that are in memory together: near the caches on the CPU, enough work for a GPU."""


class Matches(NamedTuple):
    """Matched patches; the three tensors have one entry per match.

    Attributes:
        student: int64 [matches], row of the student's patches.
        teacher: int64 [matches], row of the teacher's patches.
        weight: float [matches]; the term is the weighted sum of cross-entropies.
        terms: number of terms that the weights average over; 0 if nothing matched.
    """

    student: Tensor
    teacher: Tensor
    weight: Tensor
    terms: int


class Targets(NamedTuple):
    """The teacher's distributions, not yet multiplied out: softmax((embedded @ prototypes.T - center) / temperature).

    Attributes:
        embedded: [rows, dim].
        prototypes: [prototypes, dim].
        center: [prototypes].
        temperature: above 0.
    """

    embedded: Tensor
    prototypes: Tensor
    center: Tensor
    temperature: float

    def distributions(self, rows: slice) -> Tensor:
        """[rows, prototypes], at least in float32."""
        logits = (self.embedded[rows] @ self.prototypes.T).to(self.center.dtype)
        return logits.sub_(self.center).div_(self.temperature).softmax(dim=-1)


def matched_entropy(
    embedded: Tensor, prototypes: Tensor, targets: Targets, matches: Matches, temperature: float
) -> Tensor:
    """Weighted sum of the cross-entropies of all matches; exactly zero, with zero gradient, if there are none.

    Args:
        embedded: of the student's patches [rows, dim]; matrix products are in its precision, sums at least in float32.
        prototypes: the student's [prototypes, dim].
        targets: the teacher's side; gets no gradient.
        matches: pairs of rows.
        temperature: of the student.

    Returns:
        A scalar.
    """
    entropy: Tensor = _MatchedEntropy.apply(embedded, prototypes, targets, matches, temperature)  # type: ignore[no-untyped-call]
    return entropy


class _MatchedEntropy(torch.autograd.Function):
    """Computes the gradient together with the value, while the rows are at hand."""

    @staticmethod
    def forward(
        ctx: Any, embedded: Tensor, prototypes: Tensor, targets: Targets, matches: Matches, temperature: float
    ) -> Tensor:
        exact = torch.promote_types(embedded.dtype, torch.float32)
        # weights around 1 instead of 1 / rows: no underflow in float16
        scale = max(len(embedded), 1)
        weight = matches.weight.to(exact) * scale  # [matches]
        mass = weight.new_zeros(len(embedded)).index_add_(0, matches.student, weight)  # [rows]
        # [teacher rows, dim]
        of_teacher = _gathered(embedded.to(exact), matches.student, matches.teacher, weight, len(targets.embedded))
        projected = torch.empty_like(of_teacher)  # [teacher rows, dim]
        grad_embedded = torch.empty(embedded.shape, dtype=exact, device=embedded.device)
        grad_prototypes = torch.zeros(prototypes.shape, dtype=exact, device=embedded.device)

        for rows in _chunks(len(of_teacher), len(prototypes), embedded.device):
            p = targets.distributions(rows).to(embedded.dtype)  # [some teacher rows, prototypes]
            projected[rows] = p @ prototypes
            grad_prototypes -= p.T @ of_teacher[rows].to(embedded.dtype)
        total = -(projected * of_teacher).sum() / temperature
        for rows in _chunks(len(embedded), len(prototypes), embedded.device):
            z = (embedded[rows] @ prototypes.T).to(exact).div_(temperature)  # [some rows, prototypes]
            largest, at = z.max(dim=-1, keepdim=True)  # [some rows, 1]
            softmax = z.softmax(dim=-1)  # [some rows, prototypes]
            # at the largest logit the softmax is at least 1 / prototypes, so its logarithm is safe
            lse = (largest - softmax.gather(1, at).log()).squeeze(1)  # [some rows]
            total += mass[rows] @ lse
            share = softmax.mul_(mass[rows, None]).to(embedded.dtype)
            grad_embedded[rows] = share @ prototypes
            grad_prototypes += share.T @ embedded[rows]
        grad_embedded -= _gathered(projected, matches.teacher, matches.student, weight, len(embedded))

        factor = 1 / (temperature * scale)
        ctx.save_for_backward(grad_embedded.mul_(factor), grad_prototypes.mul_(factor))
        ctx.types = embedded.dtype, prototypes.dtype
        return total / scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        embedded, prototypes = ctx.saved_tensors
        of_embedded, of_prototypes = ctx.types
        return (embedded * gradient).to(of_embedded), (prototypes * gradient).to(of_prototypes), None, None, None


def _gathered(values: Tensor, source: Tensor, destination: Tensor, weight: Tensor, rows: int) -> Tensor:
    """[rows, dim]: for each destination row, the weighted sum of the source rows of `values` that belong to it."""
    order = destination.argsort()  # [matches]
    size = torch.zeros(rows, dtype=torch.long, device=values.device)  # [rows]
    size.index_add_(0, destination, torch.ones_like(destination))
    return F.embedding_bag(
        source[order], values, size.cumsum(0) - size, mode="sum", per_sample_weights=weight[order]
    )  # fmt: skip


def _chunks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    step = max(1, ELEMENTS_AT_ONCE.get(device.type, ELEMENTS_AT_ONCE["cuda"]) // columns)
    for start in range(0, rows, step):
        yield slice(start, start + step)
