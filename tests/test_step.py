"""A whole training step against its plain twin of benchmarks/plain_step.py: losses and weights, step after step."""

from __future__ import annotations

import pytest
import torch

from plain_step import PlainStep
from smkd import api
from smkd.engine.bench import synthetic_views
from smkd.engine.optim import rates_at
from smkd.engine.step import Learner

CPU = torch.device("cpu")
CASES = [
    ("debug-pretrain",), ("debug-pretrain", "head.num_patch_prototypes=48"), ("debug-distill",),
    ("debug-distill", "objective.mim.weight=0.5", "objective.patch.weight=0.5", "recompute=true"),
    ("debug-distill", "global_views.count=3", "objective.patch.weighting=attention"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_steps_agree(case: tuple[str, ...]) -> None:
    config = api.resolve(case[0], [*case[1:], "model.drop_path=0", "optim.freeze_last_layer_epochs=1", "optim.lr=1e-3"])
    ours, plain = (Learner.create(config, 8, CPU, None) for _ in range(2))
    with torch.no_grad():  # prototypes whose norms differ, biases that are not zero
        for learner in (ours, plain):
            torch.manual_seed(0)
            for network in (learner.pair.student, learner.pair.teacher):
                for parameter in network.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            learner.objective.patch_center.normal_()
    take = PlainStep(plain)
    for step in range(4):
        views = synthetic_views(config.model_copy(update={"seed": step}), CPU)
        rates = rates_at(config, step, 2)
        assert float(ours.step([views], rates).losses["loss"]) == pytest.approx(take(views, rates), rel=1e-5)
        torch.testing.assert_close(ours.objective.patch_center, plain.objective.patch_center, rtol=1e-5, atol=1e-6)
        norms = {name: (p.grad, q.grad) for (name, p), (_, q) in zip(
            ours.pair.student.named_parameters(), plain.pair.student.named_parameters(), strict=True)}  # fmt: skip
        for name, (mine, theirs) in norms.items():
            assert (mine is None) == (theirs is None), name
            if mine is not None and theirs is not None:
                assert float((mine - theirs).norm()) <= 1e-4 * float(theirs.norm()) + 1e-8, name
    for name, weight in ours.pair.teacher.state_dict().items():
        torch.testing.assert_close(weight, plain.pair.teacher.state_dict()[name], rtol=1e-4, atol=1e-5)
