"""`model.train_blocks=last:N`: what is trained learns as it would among weights that happen to stay; the rest stays."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from command_line import refused, smkd
from run_files import run
from smkd import api
from smkd.classify.encoder import open_encoder
from smkd.config.run_config import RunConfig
from smkd.data.loader import Views
from smkd.engine.bench import synthetic_views
from smkd.engine.checkpoint import find_checkpoint, load_checkpoint
from smkd.engine.optim import rates_at
from smkd.engine.step import Learner

CPU = torch.device("cpu")
FROZEN = "model.train_blocks=last:2"
STEADY = (
    "batch_size=4", "data.sampler=null", "optim.warmup_epochs=0", "optim.freeze_last_layer_epochs=0", "precision=fp32",
    "model.depth=4", "init=somewhere", "objective.mim.weight=1",
)  # fmt: skip


def made(*words: str) -> RunConfig:
    return api.resolve("debug-distill", [*STEADY, "model.drop_path=0", *words])


def learner_of(config: RunConfig) -> Learner:
    """With a teacher that is not the student, but for the frozen blocks."""
    learner = Learner.create(config, 4, CPU, None)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in learner.pair.parameters():
            each.add_(0.05 * torch.randn(each.shape, generator=noise))
    learner.pair.share_frozen()
    return learner


def half_masked(config: RunConfig) -> Views:
    """Views of which every second one has masked patches."""
    views = synthetic_views(config, CPU)
    masks = views.masks.clone()
    masks[:, ::2] = False
    masks[:, 1::2, 0] = True
    return dataclasses.replace(views, masks=masks)


def is_frozen(name: str) -> bool:
    return name.startswith("backbone.") and not name.startswith(
        ("backbone.blocks.2", "backbone.blocks.3", "backbone.n")
    )


@pytest.mark.parametrize("more", [(), ("recompute=true",), ("accumulate=2", "batch_size=8"), ("model.rotary=true",)])
def test_what_is_trained_learns_as_among_weights_that_stay(more: tuple[str, ...]) -> None:
    """The twin trains all blocks with the same weights; its frozen ones are put back before each step."""
    config, plain = made(FROZEN, *more), made(*more)
    views = half_masked(config)
    learner, twin = learner_of(config), learner_of(plain)
    twin.pair.load_state_dict(learner.pair.state_dict())
    start = {name: each.clone() for name, each in learner.pair.state_dict().items()}
    for step in range(3):
        found = learner.step([views] * config.accumulate, rates_at(config, step, 10)).losses
        expected = twin.step([views] * config.accumulate, rates_at(plain, step, 10)).losses
        assert {k: float(v) for k, v in found.items()} == pytest.approx({k: float(v) for k, v in expected.items()})
        gradients = dict(twin.pair.student.named_parameters())
        for name, parameter in learner.pair.student.named_parameters():
            if is_frozen(name):
                assert parameter.grad is None
                gradients[name].data.copy_(parameter)
                dict(twin.pair.teacher.named_parameters()).get(name, parameter).data.copy_(parameter)
            elif parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-6)
    for name, each in learner.pair.state_dict().items():
        network, _, within = name.partition(".")
        if is_frozen(within):
            assert torch.equal(each, start[name]), name
        elif not within.endswith("weight_g"):
            assert not torch.equal(each, start[name]), name
            # Adam turns the smallest gradients into whole steps, so single weights differ
            far = (each - twin.pair.state_dict()[name]).abs().mean()
            assert far < 0.02 * (each - start[name]).abs().mean() + 1e-7, (network, name)


def test_the_frozen_part_has_no_moments_and_keeps_no_activations() -> None:
    kept = {}
    for words in ((FROZEN,), ()):
        config = made(*words)
        learner, sizes = learner_of(config), []

        def size_of(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(size_of, lambda tensor: tensor):
            learner.step([half_masked(config)], rates_at(config, 0, 10))
        kept[words] = sum(sizes)
        names = {id(each): name for name, each in learner.pair.student.named_parameters()}
        stated = [names[id(each)] for each in learner.optimizer.state]
        assert any(map(is_frozen, stated)) == (not words)
        assert any(name.startswith("backbone.blocks.3") for name in stated)
    assert kept[FROZEN,] < 0.7 * kept[()]


@pytest.mark.parametrize(("share", "views"), [(0.0, 0), (0.5, 4), (1.0, 8)])
def test_student_and_teacher_share_what_no_mask_touches(share: float, views: int) -> None:
    """8 global views: the student's frozen blocks see only the masked ones, and the local views."""
    config = made(FROZEN)
    learner, seen = learner_of(config), []
    given = half_masked(config)
    if share != 0.5:
        given = dataclasses.replace(given, masks=torch.full_like(given.masks, share == 1))
    side = config.global_views.size // config.model.patch_size
    learner.pair.student.backbone.blocks[0].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[0]) if inputs[0].shape[1] == 1 + side**2 else None
    )
    learner.step([given], rates_at(config, 0, 10))
    assert sum(seen) == views


def test_frozen_blocks_know_no_stochastic_depth() -> None:
    config = made(FROZEN, "model.drop_path=0.9")
    backbone = learner_of(config).pair.student.backbone.train()
    rates = [block.drop_path.rate for block in backbone.blocks]
    assert rates == [0.0, 0.0, pytest.approx(0.6), pytest.approx(0.9)]


@pytest.mark.slow
def test_a_run_keeps_the_teachers_frozen_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Student and teacher of the run to start from differ; the teacher's weights are those that are measured."""
    monkeypatch.chdir(tmp_path)
    run("out=first", "optim.lr=1e-3", "optim.warmup_epochs=0")
    words = ("init=first", "model.train_blocks=last:1", "batch_size=4", "data.sampler=null", "optim.lr=1e-3")
    run(*words, "out=frozen", "epochs=2", recipe="debug-distill")
    before, after = (
        load_checkpoint(find_checkpoint(tmp_path / "first")),
        load_checkpoint(find_checkpoint(tmp_path / "frozen")),
    )
    kept = [
        name for name in before["teacher"] if name.startswith(("backbone.blocks.0", "backbone.patch", "backbone.c"))
    ]
    assert len(kept) > 10
    assert any(not torch.equal(before["teacher"][name], before["student"][name]) for name in kept)
    for name in kept:
        assert torch.equal(after["teacher"][name], before["teacher"][name]), name
        assert torch.equal(after["student"][name], before["teacher"][name]), name
    name = "backbone.blocks.1.mlp.fc1.weight"
    assert not torch.equal(after["teacher"][name], before["teacher"][name])
    # a file of its weights says nothing of what was trained
    assert smkd("export", "frozen", "--to", "safetensors", "-o", "weights").returncode == 0
    for place in ("frozen", "weights"):
        assert api.load(tmp_path / place).config.train_blocks == "all"
        assert open_encoder(tmp_path / place).config.model == api.load(tmp_path / "frozen").config
    assert smkd("features", "frozen", "-o", "f.h5").returncode == 0
    resumed = "resume_with=epochs=3"
    run(*words, "out=frozen", "epochs=2", resumed, recipe="debug-distill")
    again = load_checkpoint(find_checkpoint(tmp_path / "frozen"))
    assert torch.equal(again["student"][kept[-1]], before["teacher"][kept[-1]])
    # taking over moments of blocks that are frozen now, and of none that were
    run(*words, "out=taken", "epochs=1", "init_optimizer=true", recipe="debug-distill")
    back = [word for word in words if "train_blocks" not in word and "init" not in word]
    run(*back, "init=frozen", "out=back", "epochs=1", "init_optimizer=true", recipe="debug-distill")


def test_what_cannot_be_frozen_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "would leave random weights as they are" in refused(
        "pretrain", "debug-pretrain", "model.train_blocks=last:1"
    )
    for word in ("last:0", "last:-1", "last", "2", "first:1"):
        assert "train_blocks" in refused("pretrain", "debug-pretrain", f"model.train_blocks={word}")
    run("out=first")
    said = refused("distill", "debug-distill", "init=first", "model.train_blocks=last:3", "out=second")
    assert "model.train_blocks=last:3: the backbone has 2 blocks" in said
    assert not (tmp_path / "second" / "checkpoints").exists()
