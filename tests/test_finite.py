"""Nothing becomes infinite or NaN: the losses of odd batches, and two thousand steps in bfloat16."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from smkd.config.loading import check
from smkd.config.run_config import RunConfig
from smkd.config.schema import HeadConfig, ObjectiveConfig
from smkd.data.loader import Views
from smkd.engine.optim import rates_at
from smkd.engine.step import Learner
from smkd.models.head import PatchLogits
from smkd.models.pair import Outputs
from smkd.objectives.objective import Objective

PROTOTYPES, PATCHES, DIM = 16, 4, 8
LABELS = {"distinct": [0, 1, 2, 3], "equal": [5, 5, 5, 5], "single": [0], "mixed": [0, 1, 0, 2, 0, 1]}


def outputs(views: int, images: int, *, dtype: torch.dtype, scale: float, local: int, attention: bool) -> Outputs:
    """Random outputs; some patch tokens are exactly zero, so that a cosine has nothing to divide by."""
    tokens = torch.randn(views, images, PATCHES, DIM)
    tokens[:, 0, 0] = 0
    weights = (scale * torch.randn(views, images, PATCHES)).softmax(-1) if attention else None
    # with unit vectors as prototypes, logits are embeddings
    patches = PatchLogits(
        (scale * torch.randn(views * images * PATCHES, PROTOTYPES)).to(dtype), torch.eye(PROTOTYPES, dtype=dtype)
    )
    given = (
        scale * torch.randn(views, images, PROTOTYPES), tokens, weights,
        scale * torch.randn(local, images, PROTOTYPES) if local else None, torch.randn(views, images, 10),
    )  # fmt: skip
    cls, *others = (None if x is None else x.to(dtype) for x in given)
    assert cls is not None
    return Outputs(cls, patches, *others)


def mask_like(kind: str, views: int, images: int) -> Tensor:
    masks = torch.zeros(views, images, 2, 2, dtype=torch.bool)
    if kind == "all":
        masks[:] = True
    elif kind == "some":
        masks[0, 0, 0, 0] = True
    return masks


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("matching", ["paper", "reference"])
@pytest.mark.parametrize("pattern", LABELS)
def test_losses_and_gradients(pattern: str, matching: str, precision: str) -> None:
    torch.manual_seed(0)
    labels = torch.tensor(LABELS[pattern])
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    for number in range(36):
        views, local = 1 + number % 3, 2 * (number // 3 % 2)
        masking = ("none", "some", "all")[number // 6 % 3]
        # logits of a trained head stay near 1; 50 is far beyond, and saturates every softmax
        scale = (1.0, 50.0)[number // 18]
        with_labels, attention = number % 4 != 0, number % 5 < 3
        config = ObjectiveConfig.model_validate(
            {
                "labels": with_labels,
                "cls": {"same_image": number % 2 == 0},
                "mim": {"weight": 1.0},
                "patch": {
                    "weight": 1.0, "matching": matching, "same_image": number % 7 != 0,
                    "weighting": "attention" if attention else "mean",
                },
                "supervised": {"weight": 1.0},
            }
        )  # fmt: skip
        objective = Objective(config, HeadConfig(num_prototypes=PROTOTYPES))
        student = outputs(views, len(labels), dtype=dtype, scale=scale, local=local, attention=False)
        teacher = outputs(views, len(labels), dtype=dtype, scale=scale, local=0, attention=attention)
        assert student.patches is not None
        leaves = [x.requires_grad_() for x in (*student, *student.patches) if isinstance(x, Tensor)]
        autocast = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()
        with autocast:
            losses = objective(
                student, teacher, mask_like(masking, views, len(labels)), labels,
                cls_temperature=0.04, patch_temperature=0.04,
            )  # fmt: skip
        losses.total.backward()
        assert losses.total.dtype == torch.float32
        for name, term in losses.terms.items():
            assert torch.isfinite(term), (name, number)
            assert name not in losses.empty or float(term.detach()) == 0.0
        for leaf in leaves:
            assert leaf.grad is None or bool(torch.isfinite(leaf.grad).all()), number
        for center in (objective.cls_center, objective.patch_center):
            assert bool(torch.isfinite(center).all())


def tiny_config(phase: str) -> RunConfig:
    labels = phase == "distill"
    return check(
        {
            "phase": phase, "epochs": 10, "batch_size": 8, "seed": 1,
            "model": {"size": "debug", "patch_size": 8, "image_size": 16},
            "head": {"num_prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16},
            "global_views": {"count": 2, "size": 16, "scale": [0.25, 1.0]},
            "local_views": {"count": 2, "size": 8, "scale": [0.05, 0.25]},
            "objective": {
                "labels": labels,
                "mim": {"weight": 1.0},
                "patch": {"weight": 1.0 if labels else 0.0, "matching": "paper", "weighting": "attention"},
            },
            "optim": {"lr": 1e-3, "warmup_epochs": 1, "teacher_momentum": 0.99},
            "validation": {"resize": 16, "crop": 16},
            "evaluation": {"resize": 16, "crop": 16},
        }
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "steps"), [("pretrain", 300), ("distill", 2000)])
def test_many_steps_in_bfloat16(phase: str, steps: int) -> None:
    config = tiny_config(phase)
    learner = Learner.create(config, 4, torch.device("cpu"), torch.bfloat16)
    before = {name: p.clone() for name, p in learner.pair.student.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    parameters = [*learner.pair.parameters(), *learner.objective.buffers()]
    for step in range(steps):
        # labels of all kinds turn up: with 1 class all are equal, with 1000 hardly two are
        classes = (1, 4, 1000)[step % 3]
        share = (0.0, 0.3, 1.0)[step // 3 % 3]
        views = Views(
            torch.randn(2, 8, 3, 16, 16, generator=generator), torch.randn(2, 8, 3, 8, 8, generator=generator),
            torch.rand(2, 8, 2, 2, generator=generator) < share,
            torch.randint(classes, (8,), generator=generator),
        )  # fmt: skip
        result = learner.step([views], rates_at(config, step, steps // config.epochs))
        assert torch.isfinite(torch.stack(list(result.losses.values()))).all(), (step, result.losses)
        if step % 50 == 0 or step == steps - 1:
            assert all(bool(torch.isfinite(p).all()) for p in parameters), step
    # the run has moved every trained tensor, so the checks above looked at something
    assert all(not torch.equal(before[n], p) for n, p in learner.pair.student.named_parameters())
