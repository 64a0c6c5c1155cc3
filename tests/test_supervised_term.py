"""The supervised term: a plain cross-entropy of every global view, weighed."""

from __future__ import annotations

import pytest
import torch

from smkd.config.schema import HeadConfig, ObjectiveConfig
from smkd.models.pair import Outputs
from smkd.objectives.objective import Objective


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_mean_over_views_and_images(weight: float) -> None:
    torch.manual_seed(0)
    views, batch, classes, prototypes = 2, 3, 4, 5
    settings = ObjectiveConfig.model_validate({"cls": {"weight": 1.0}, "supervised": {"weight": weight}})
    logits = torch.randn(views, batch, classes, requires_grad=True)
    student = Outputs(cls=torch.randn(views, batch, prototypes), classes=logits)
    teacher = Outputs(cls=torch.randn(views, batch, prototypes))
    labels = torch.tensor([3, 0, 2])
    losses = Objective(settings, HeadConfig(num_prototypes=prototypes))(
        student, teacher, torch.zeros(views, batch, 1, 1, dtype=torch.bool), labels,
        cls_temperature=0.1, patch_temperature=0.1,
    )  # fmt: skip
    entropies = [
        torch.logsumexp(logits[v, i], dim=0) - logits[v, i, labels[i]] for v in range(views) for i in range(batch)
    ]
    expected = weight * sum(entropies) / len(entropies)
    torch.testing.assert_close(losses.terms["supervised"], expected)
    torch.testing.assert_close(losses.total, losses.terms["cls"] + expected)
    (found,) = torch.autograd.grad(losses.total, logits)
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(found, wanted)
