"""Whole optimiser steps against the reference's training loop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from golden_files import Golden, State, cases, close, load, own_name, own_state
from smkd.config import loading
from smkd.config.run_config import RunConfig
from smkd.data.loader import Views
from smkd.engine import step as engine_step
from smkd.engine.optim import Rates, rates_at
from smkd.engine.step import Learner

RUNS = cases("train_steps*.npz")
LOSSES = ("cls", "patch", "mim", "loss")


@dataclass
class Run:
    """What our learner did in a file's steps; every list has one entry per step."""

    rates: list[Rates]
    used: list[tuple[float, float, float]]
    """Learning rate, and weight decay of both groups, as the optimiser had them."""
    losses: list[dict[str, Tensor]]
    gradients: list[State]
    """Before clipping."""
    students: list[State]
    teachers: list[State]
    start: State
    learner: Learner


def run_config(golden: Golden) -> RunConfig:
    options = golden.options
    views, batch = len(golden.under("batch0/mask")), len(golden.tensor("batch0/labels"))
    layers = sum(bool(re.fullmatch(r"head\.mlp\.(\d+\.)?weight", n)) for n in golden.under("student_init"))
    crop = {"crop": options["gsize"], "resize": options["gsize"]}

    def warmup(suffix: str) -> dict[str, Any]:
        return {
            "start": options[f"wt{suffix}"], "end": options[f"tt{suffix}"], "warmup_epochs": options["twe"]
        }  # fmt: skip

    return loading.check({
        "phase": "distill" if options["supervised"] else "pretrain",
        "epochs": options["epochs"],
        "batch_size": batch,
        "accelerator": "cpu",
        "precision": "fp32",
        "model": {
            "image_size": options["gsize"], "patch_size": options["patch"], "embed_dim": options["dim"],
            "depth": options["depth"], "num_heads": options["heads"], "drop_path": 0.0,
        },
        "head": {
            "num_prototypes": options["out_dim"],
            "num_patch_prototypes": None if options["shared_head"] else options["patch_out_dim"],
            "hidden_dim": options["hidden"], "bottleneck_dim": options["bottleneck"], "layers": layers,
            "fixed_norm": options["norm_last_layer"],
        },
        "global_views": {"count": views, "size": options["gsize"], "scale": (0.25, 1.0)},
        "local_views": {"count": options["L"], "size": options["lsize"], "scale": (0.05, 0.25)},
        "objective": {
            "labels": options["supervised"],
            "cls": {"weight": options["lambda1"]},
            "patch": {
                "weight": options["lambda2"], "matching": "reference",
                "weighting": "attention" if options["weighted_pool"] else "mean",
            },
            "mim": {"weight": options["lambda3"]},
            "cls_temperature": warmup(""),
            "patch_temperature": warmup("2"),
        },
        "optim": {
            "lr": options["lr"], "lr_end": options["min_lr"], "warmup_epochs": options["warmup_epochs"],
            "weight_decay": options["wd"], "weight_decay_end": options["wd_end"], "clip_norm": options["clip"],
            "freeze_last_layer_epochs": options["freeze"], "teacher_momentum": options["momentum"],
            "teacher_momentum_end": 1.0,
        },
        "validation": crop,
        "evaluation": crop,
    })  # fmt: skip


def states(golden: Golden, prefix: str) -> State:
    return own_state(golden.under(prefix), shared_head=golden.options["shared_head"])


def views_of(golden: Golden, step: int) -> Views:
    def stacked(name: str) -> Tensor:
        parts = golden.under(f"batch{step}/{name}")
        return torch.stack([parts[number] for number in sorted(parts, key=int)])

    globals_ = stacked("global")
    local = f"batch{step}/local"
    return Views(
        global_views=globals_,
        local_views=golden.tensor(local) if local in golden else globals_[:0],
        masks=stacked("mask"),
        labels=golden.tensor(f"batch{step}/labels"),
    )


def copy(state: State) -> State:
    return {name: value.detach().clone() for name, value in state.items()}


@cache
def trained(path: Path) -> Run:
    golden = load(path)
    config, niter = run_config(golden), int(golden.options["niter"])
    learner = Learner.create(config, num_classes=1, device=torch.device("cpu"), autocast=None)
    student, teacher = learner.pair.student, learner.pair.teacher
    student.load_state_dict(states(golden, "student_init"))
    teacher.load_state_dict(states(golden, "teacher_init"))
    run = Run([], [], [], [], [], [], copy(student.state_dict()), learner)
    clip = engine_step.clip_each

    def record_and_clip(parameters: Iterator[torch.nn.Parameter], limit: float) -> None:
        run.gradients.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
        clip(parameters, limit)

    with mock.patch.object(engine_step, "clip_each", record_and_clip):
        for number, (epoch, iteration) in enumerate(
            zip(golden.arrays["epoch"], golden.arrays["iteration"], strict=True)
        ):
            # rates follow the iteration, temperatures and the freeze the epoch, as the file states both
            of_epoch = rates_at(config, int(epoch) * niter, niter)
            rates = replace(
                rates_at(config, int(iteration), niter),
                cls_temperature=of_epoch.cls_temperature, patch_temperature=of_epoch.patch_temperature,
                last_layer_frozen=of_epoch.last_layer_frozen,
            )  # fmt: skip
            run.rates.append(rates)
            run.losses.append(learner.step(iter([views_of(golden, number)]), rates).losses)
            groups = learner.optimizer.param_groups
            run.used.append((groups[0]["lr"], groups[0]["weight_decay"], groups[1]["weight_decay"]))
            run.students.append(copy(student.state_dict()))
            run.teachers.append(copy(teacher.state_dict()))
    return run


def without_keys(name: str, value: Tensor) -> Tensor:
    """Drop the key biases: their true gradient is zero, and AdamW makes full steps of its rounding noise."""
    if not name.endswith("attn.qkv.bias"):
        return value
    query, _, value_part = value.chunk(3)
    return torch.cat([query, value_part])


def compare(ours: State, expected: State, *, atol: float, rtol: float = 0.0) -> None:
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        close(without_keys(name, value), without_keys(name, expected[name]), atol=atol, rtol=rtol, what=name)


@pytest.mark.parametrize("path", RUNS)
def test_losses_of_each_step(path: Path) -> None:
    golden, run = load(path), trained(path)
    zero = torch.zeros(())
    ours = torch.stack([torch.stack([losses.get(name, zero) for name in LOSSES]) for losses in run.losses])
    close(ours, golden.tensor("losses"), atol=0.0, rtol=1e-5)


@pytest.mark.parametrize("path", RUNS)
def test_rates_of_each_step(path: Path) -> None:
    golden, run = load(path), trained(path)
    columns = {
        "lr": [lr for lr, _, _ in run.used],
        "weight_decay": [decay for _, decay, _ in run.used],
        "momentum": [rates.teacher_momentum for rates in run.rates],
    }
    for name, values in columns.items():
        assert values == pytest.approx(golden.arrays[name].tolist(), abs=1e-12), name
    assert all(plain == 0.0 for _, _, plain in run.used)


@pytest.mark.parametrize("path", RUNS)
def test_gradients_of_the_first_step(path: Path) -> None:
    golden, run = load(path), trained(path)
    compare(run.gradients[0], states(golden, "grad_step1"), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("path", RUNS)
def test_gradient_norms_of_each_step(path: Path) -> None:
    golden, run = load(path), trained(path)
    names = [own_name(name) for name in golden.words("grad_norm_names")]
    ours = torch.stack([
        torch.stack([grads[name].norm() if name in grads else torch.zeros(()) for name in names])
        for grads in run.gradients
    ])  # fmt: skip
    close(ours, golden.tensor("grad_norms"), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("path", RUNS)
def test_student_and_teacher_after_the_steps(path: Path) -> None:
    golden, run = load(path), trained(path)
    stored = [int(number) for number in golden.matching(r"student_step(\d+)/.+")]
    assert stored
    for number in stored:
        compare(run.students[number - 1], states(golden, f"student_step{number}"), atol=1e-5)
        compare(run.teachers[number - 1], states(golden, f"teacher_step{number}"), atol=1e-5)


@pytest.mark.parametrize("path", RUNS)
def test_the_same_parameters_do_not_move(path: Path) -> None:
    golden, run = load(path), trained(path)
    start = states(golden, "student_init")
    for number in golden.matching(r"student_step(\d+)/.+"):
        after = states(golden, f"student_step{number}")
        expected = {name for name in start if torch.equal(start[name], after[name])}
        ours = run.students[int(number) - 1]
        assert {name for name in ours if torch.equal(run.start[name], ours[name])} == expected


@pytest.mark.parametrize("path", RUNS)
def test_centers_at_the_end(path: Path) -> None:
    golden, learner = load(path), trained(path).learner
    close(learner.objective.cls_center, golden.tensor("center_end").flatten(), atol=1e-5, rtol=1e-5)
    # the reference moves the patch centre even if no term looks at patches
    if learner.pair.needs_patches:
        close(learner.objective.patch_center, golden.tensor("center2_end").flatten(), atol=1e-5, rtol=1e-5)
