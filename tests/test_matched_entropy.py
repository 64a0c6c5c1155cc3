"""The matched cross-entropy against all logits written out, where patches outnumber prototypes too, and its pieces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smkd.objectives import patch_entropy
from smkd.objectives.patch_entropy import Matches, Targets, matched_entropy

DIM, TEMPERATURE = 4, 0.3


def drawn(students: int, teachers: int, prototypes: int, matches: int) -> tuple[Tensor, Tensor, Targets, Matches]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    torch.manual_seed(students + 10 * teachers + 100 * prototypes)
    of_student, of_teacher = (torch.randint(rows, (matches,)) for rows in (students, teachers))
    targets = Targets(normal(teachers, DIM), normal(prototypes, DIM), normal(prototypes), 0.5)
    found = Matches(of_student, of_teacher, torch.rand(matches, dtype=torch.float64), matches)
    return normal(students, DIM).requires_grad_(), normal(prototypes, DIM).requires_grad_(), targets, found


def written_out(embedded: Tensor, prototypes: Tensor, targets: Targets, matches: Matches) -> Tensor:
    p = ((targets.embedded @ targets.prototypes.T - targets.center) / targets.temperature).softmax(dim=1)
    z = (embedded @ prototypes.T / TEMPERATURE).log_softmax(dim=1)
    return -(matches.weight * (p[matches.teacher] * z[matches.student]).sum(dim=1)).sum()


@pytest.mark.parametrize("at_once", [1, 40, 2**22])
@pytest.mark.parametrize(
    ("students", "teachers", "prototypes", "matches"),
    [(23, 19, 5, 40), (19, 23, 5, 40), (5, 6, 31, 9), (1, 1, 2, 1), (7, 3, 4, 0)],
)
def test_value_and_gradients(
    students: int, teachers: int, prototypes: int, matches: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch_entropy, "ELEMENTS_AT_ONCE", {"cpu": at_once, "cuda": at_once})
    embedded, weights, targets, pairs = drawn(students, teachers, prototypes, matches)
    ours = matched_entropy(embedded, weights, targets, pairs, TEMPERATURE)
    plain = written_out(embedded, weights, targets, pairs)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    for factor in (1.0, -3.0):
        mine = torch.autograd.grad(factor * ours, (embedded, weights), retain_graph=True)
        theirs = torch.autograd.grad(factor * plain, (embedded, weights), retain_graph=True)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_logits_far_apart_stay_finite() -> None:
    """The softmax of the smallest is 0 then, and its logarithm infinite."""
    embedded, weights, targets, pairs = drawn(7, 5, 6, 9)
    embedded = (1000 * embedded).detach().requires_grad_()
    ours = matched_entropy(embedded, weights, targets, pairs, TEMPERATURE)
    plain = written_out(embedded, weights, targets, pairs)
    assert plain.item() > 100
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_no_more_than_so_many_logits_are_in_memory_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_entropy, "ELEMENTS_AT_ONCE", {"cpu": 50, "cuda": 50})
    taken: list[int] = []

    class Watched(Targets):
        def distributions(self, rows: slice) -> Tensor:
            found = super().distributions(rows)
            taken.append(len(found))
            return found

    embedded, weights, targets, pairs = drawn(23, 19, 8, 40)
    matched_entropy(embedded, weights, Watched(*targets), pairs, TEMPERATURE)
    assert taken == [6, 6, 6, 1]


def test_float16_keeps_gradients_that_many_rows_make_small() -> None:
    """Each of 4096 rows weighs 1/4096, and each of 4096 prototypes gets about as little of that."""
    torch.manual_seed(0)
    rows = torch.arange(4096)
    embedded, weights = torch.randn(4096, 8), torch.randn(4096, 8)
    targets = Targets(torch.randn(4096, 8), torch.randn(4096, 8), torch.zeros(4096), 1.0)
    matches = Matches(rows, rows, torch.full((4096,), 1 / 4096), 4096)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        leaves = [value.to(dtype).requires_grad_() for value in (embedded, weights)]
        low = targets._replace(embedded=targets.embedded.to(dtype), prototypes=targets.prototypes.to(dtype))
        loss = matched_entropy(leaves[0], leaves[1], low, matches, 30.0)
        # what the loss scaler of training does
        return [gradient.double() for gradient in torch.autograd.grad(1024 * loss, leaves)]

    for half, full in zip(gradients(torch.float16), gradients(torch.float32), strict=True):
        assert float((half - full).norm()) < 0.01 * float(full.norm())
