"""What a step promises beside its losses: the mean over passes, late masks, and the state that a resumed run needs."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smkd import api
from smkd.config.run_config import RunConfig
from smkd.data.datasets import open_split
from smkd.data.loader import MultiCropDataset, Views, batches, make_loader
from smkd.data.sampler import EpochSampler
from smkd.engine import checkpoint
from smkd.engine.bench import synthetic_views
from smkd.engine.optim import Rates, make_optimizer, rates_at, set_rates
from smkd.engine.restore import restore
from smkd.engine.step import Learner
from smkd.models.pair import StudentTeacher

CPU = torch.device("cpu")
STEADY = (
    "batch_size=4", "model.drop_path=0", "optim.warmup_epochs=0", "optim.freeze_last_layer_epochs=0",
    "optim.teacher_momentum=0.5", "optim.teacher_momentum_end=0.5",
)  # fmt: skip


def made(*words: str, recipe: str = "debug-pretrain") -> RunConfig:
    return api.resolve(recipe, [*STEADY, *words])


def gradients(config: RunConfig, passes: list[Views]) -> tuple[dict[str, Tensor], dict[str, float]]:
    learner = Learner.create(config, 4, CPU, None)
    losses = learner.step(passes, rates_at(config, 0, 10)).losses
    found = {name: p.grad.clone() for name, p in learner.pair.student.named_parameters() if p.grad is not None}
    return found, {name: float(value) for name, value in losses.items()}


@pytest.mark.parametrize("recipe", ["debug-pretrain", "debug-distill"])
def test_accumulated_gradients_are_a_mean(recipe: str) -> None:
    """The same images in every pass: as if they had been seen once. Adam would hide a factor, so gradients count."""
    words = ["optim.clip_norm=0", "objective.cls_center_momentum=1", "objective.patch_center_momentum=1"]
    if recipe == "debug-distill":
        words += ["data.sampler=null"]
    one = made(*words, recipe=recipe)
    views = synthetic_views(one, CPU)
    expected, losses = gradients(one, [views])
    for count in (2, 3):
        several = made(*words, f"accumulate={count}", f"batch_size={4 * count}", recipe=recipe)
        found, mean = gradients(several, [views] * count)
        assert mean == pytest.approx(losses, rel=1e-6)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert float((gradient - expected[name]).norm()) <= 1e-4 * float(expected[name].norm()) + 1e-6, name
    assert max(float(gradient.norm()) for gradient in expected.values()) > 1e-2


def test_a_step_tells_what_the_teacher_said_of_the_first_views() -> None:
    config = made("accumulate=2", "batch_size=8")
    learner = Learner.create(config, 4, CPU, None)
    learner.objective.cls_center.uniform_()
    center = learner.objective.cls_center.clone()
    passes = [synthetic_views(made("seed=1"), CPU), synthetic_views(made("seed=2"), CPU)]
    said = [learner.pair.teacher_outputs(views.global_views) for views in passes]
    result = learner.step(passes, rates_at(config, 0, 10))
    assert result.answers is not None
    torch.testing.assert_close(result.answers.logits, torch.cat([each.cls[0] for each in said]))
    features = [each.features[0] for each in said if each.features is not None]
    torch.testing.assert_close(result.answers.features, torch.cat(features))
    assert torch.equal(result.answers.center, center.squeeze())
    assert not torch.equal(learner.objective.cls_center, center)
    assert torch.equal(result.assigned, result.answers.logits.argmax(dim=1))


def test_gradients_are_clipped_and_the_last_layer_is_frozen() -> None:
    config = made("optim.clip_norm=0.001", "optim.freeze_last_layer_epochs=1")
    views = synthetic_views(config, CPU)
    learner = Learner.create(config, 4, CPU, None)
    before = {name: p.detach().clone() for name, p in learner.pair.student.named_parameters()}
    learner.step([views], rates_at(config, 0, 1))
    for name, parameter in learner.pair.student.named_parameters():
        if "last_layer" in name:
            assert torch.equal(parameter, before[name]), name
        elif parameter.grad is not None:
            assert float(parameter.grad.norm()) < 0.00101, name
    learner.step([views], rates_at(config, 1, 1))
    after = dict(learner.pair.student.named_parameters())
    assert any("last_layer" in name and not torch.equal(after[name], start) for name, start in before.items())


def test_a_new_optimiser_moves_nothing_and_rates_are_set_by_group() -> None:
    rates = dataclasses.replace(rates_at(made(), 0, 1), lr=0.5, weight_decay=0.3)
    for words, expected in (
        ([], [(0.5, 0.3), (0.5, 0)]),
        (["optim.lr=1e-3", "optim.head_lr=4e-3"], [(0.5, 0.3), (0.5, 0), (2.0, 0.3), (2.0, 0)]),
        (["optim.lr=1e-3", "optim.head_lr=1e-3"], [(0.5, 0.3), (0.5, 0), (0.5, 0.3), (0.5, 0)]),
    ):
        config = made(*words)
        student = StudentTeacher(config, 4).student
        optimiser = make_optimizer(student, CPU, config)
        groups = optimiser.param_groups
        assert {(group["lr"], group["weight_decay"]) for group in groups} == {(0, 0)}
        set_rates(optimiser, rates)
        assert [(group["lr"], group["weight_decay"]) for group in groups] == expected
        names = {id(parameter): name for name, parameter in student.named_parameters()}
        for number, group in enumerate(groups):
            found = {names[id(parameter)] for parameter in group["params"]}
            assert {name.startswith("backbone.") for name in found} == ({number < 2} if words else {True, False})
            assert all((parameter.ndim == 1) == (number % 2 == 1) for parameter in group["params"])
        everything = sorted(names[id(parameter)] for group in groups for parameter in group["params"])
        assert everything == sorted(name for name, each in student.named_parameters() if each.requires_grad)


def test_heads_have_a_rate_of_their_own() -> None:
    """Adam's first step moves each weight by its rate, less what rounding makes of small gradients."""
    config = made("optim.lr=1e-4", "optim.head_lr=1e-2", "optim.warmup_epochs=0", "optim.weight_decay=0")
    learner = Learner.create(config, 4, CPU, None)
    before = {name: p.detach().clone() for name, p in learner.pair.student.named_parameters()}
    learner.step([synthetic_views(config, CPU)], rates_at(config, config.optim.freeze_last_layer_epochs, 1))
    after = learner.pair.student.named_parameters()
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in after}
    backbone = [far for name, far in moved.items() if name.startswith("backbone.")]
    heads = [far for name, far in moved.items() if not name.startswith("backbone.")]
    assert 0 < max(backbone) < 1.1e-4
    assert max(heads) > 50 * max(backbone)


GROUPINGS = ("optim.head_lr=null", "optim.head_lr=1e-2", "optim.head_lr=2e-2")


@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(GROUPINGS, 2)])
def test_the_optimisers_state_follows_its_parameters_into_other_groups(tmp_path: Path, first: str, second: str) -> None:
    before = made(first)
    old = Learner.create(before, 4, CPU, None)
    stepped(old, before, range(2))
    save(old, tmp_path / "a.pt")
    new = Learner.create(made(second), 4, CPU, None)
    restore(new, checkpoint.load_checkpoint(tmp_path / "a.pt"), optimizer=True)
    for mine, theirs in zip(old.pair.student.parameters(), new.pair.student.parameters(), strict=True):
        assert old.optimizer.state[mine].keys() == new.optimizer.state[theirs].keys()
        for key, value in old.optimizer.state[mine].items():
            assert torch.equal(value, new.optimizer.state[theirs][key])


def test_prototypes_are_assigned_by_the_teacher_and_the_first_view() -> None:
    config = made()
    views, learner = synthetic_views(config, CPU), Learner.create(config, 4, CPU, None)
    with torch.no_grad():
        of_views = [learner.pair.teacher_outputs(views.global_views).cls[view].argmax(dim=1) for view in (0, 1)]
    assert not torch.equal(*of_views)
    assert torch.equal(learner.step([views], rates_at(config, 0, 1)).assigned, of_views[0])


# ---- masks


def test_masks_wait_for_their_epoch_on_the_way_to_the_networks() -> None:
    config = made("mask.start_epoch=2", "mask.ratio=[0.5]", "mask.ratio_jitter=[0.0]", "epochs=4")
    images = open_split(config.data, "train")
    sampler = EpochSampler(images.labels[:16], 4, config.seed)
    loader = make_loader(MultiCropDataset(images, config), sampler, 0, pin_memory=False)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        for batch in batches(loader):
            hidden = batch.masks.flatten(2).sum(dim=2)
            assert bool((hidden > 0).all() if epoch >= 2 else (hidden == 0).all()), epoch


def test_the_patch_temperature_waits_for_the_masks() -> None:
    warm = ("start=0.04", "end=0.07", "warmup_epochs=4")
    words = [f"objective.{name}_temperature.{word}" for name in ("cls", "patch") for word in warm]
    config = made("mask.start_epoch=3", "epochs=10", *words)
    rates = [rates_at(config, 5 * epoch, 5) for epoch in range(10)]
    assert [r.cls_temperature for r in rates] == pytest.approx([0.04, 0.05, 0.06] + [0.07] * 7)
    assert [r.patch_temperature for r in rates] == pytest.approx([0.04] * 4 + [0.05, 0.06] + [0.07] * 4)


# ---- what a resumed run needs


def stepped(learner: Learner, config: RunConfig, numbers: range) -> list[Any]:
    rates: list[Rates] = [rates_at(config, number, 10) for number in numbers]
    made_views = [synthetic_views(config.model_copy(update={"seed": number}), CPU) for number in numbers]
    return [float(learner.step([v], r).losses["loss"]) for v, r in zip(made_views, rates, strict=True)]


def save(learner: Learner, path: Path) -> None:
    place = {"epoch": 0, "step": 7, "best": 0.0, "config": learner.config.model_dump(mode="json")}
    checkpoint.save_checkpoint({**learner.state(), **place}, path)


@pytest.mark.parametrize("autocast", [None, torch.float16], ids=["float32", "float16"])
def test_a_restored_learner_goes_on_as_the_first_would(tmp_path: Path, autocast: torch.dtype | None) -> None:
    """With the loss scaler of float16, which has met overflows, grown again and counts towards its next growth."""
    config = made()
    first, second = (Learner.create(config, 4, CPU, autocast) for _ in range(2))
    with torch.no_grad():
        for parameter in second.pair.student.parameters():
            parameter.add_(1.0)
    if autocast is not None:
        first.scaler.load_state_dict({**first.scaler.state_dict(), "growth_interval": 3})
        stepped(first, config, range(7))
        assert first.scaler.get_scale() < 2.0**16, "it overflowed at first"
    else:
        stepped(first, config, range(3))
    save(first, tmp_path / "a.pt")
    assert restore(second, checkpoint.load_checkpoint(tmp_path / "a.pt"), optimizer=True) == []
    assert second.scaler.state_dict() == first.scaler.state_dict()
    assert stepped(first, config, range(7, 12)) == stepped(second, config, range(7, 12))
    assert second.scaler.state_dict() == first.scaler.state_dict()
    for name, value in first.pair.teacher.state_dict().items():
        assert torch.equal(second.pair.teacher.state_dict()[name], value), name


def test_without_the_optimiser_only_weights_and_centres_come_along(tmp_path: Path) -> None:
    config = made()
    first, second = (Learner.create(config, 4, CPU, torch.float16) for _ in range(2))
    fresh = second.scaler.state_dict()
    stepped(first, config, range(12))  # the first ones overflow and are skipped
    save(first, tmp_path / "a.pt")
    restore(second, checkpoint.load_checkpoint(tmp_path / "a.pt"), optimizer=False)
    assert second.scaler.state_dict() == fresh
    assert not second.optimizer.state
    assert np.isfinite(float(first.objective.cls_center.norm()))
    assert float(first.objective.cls_center.norm()) > 0
    assert torch.equal(second.objective.cls_center, first.objective.cls_center)
