"""The step on a device: it never waits for it, compiles or goes on without, and can trade time for memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from smkd import api
from smkd.config.run_config import RunConfig
from smkd.data.datasets import configured_spec, open_split
from smkd.data.loader import MultiCropDataset, Views, collate, make_views, on_device
from smkd.engine.bench import synthetic_views
from smkd.engine.optim import compile_backbones, rates_at
from smkd.engine.step import Learner

CPU, NOWHERE = torch.device("cpu"), torch.device("meta")
CASES = [
    ("debug-pretrain",), ("debug-pretrain", "objective.patch.weight=1"), ("debug-distill",),
    ("debug-distill", "objective.supervised.weight=1", "accumulate=2", "data.sampler=null"),
    ("debug-distill", "objective.mim.weight=1", "objective.cls.same_image=true", "objective.patch.weighting=mean"),
    ("debug-distill", "objective.patch.matching=reference", "head.num_patch_prototypes=32"),
]  # fmt: skip


def batch_of(config: RunConfig) -> Any:
    images = open_split(config.data, "train")
    dataset = MultiCropDataset(images, config)
    return collate([dataset[0, index] for index in range(4)])


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_nothing_is_read_from_the_device(
    case: tuple[str, ...], nothing_waits: contextlib.AbstractContextManager[object]
) -> None:  # fmt: skip
    """On the meta device tensors have no values, so whatever would wait for one is an error."""
    config = api.resolve(case[0], list(case[1:]))
    learner = Learner.create(config, 8, NOWHERE, None)
    batch, views = batch_of(config), [synthetic_views(config, NOWHERE)] * config.accumulate
    with nothing_waits:
        made = make_views(next(on_device([batch], NOWHERE)), configured_spec(config.data), NOWHERE)
        for step in range(2):
            result = learner.step(views, rates_at(config, step, 2))
    assert made.global_views.device == made.local_views.device == NOWHERE
    assert set(result.losses) >= {"loss", "cls"}
    with pytest.raises(RuntimeError, match="meta"):
        float(result.losses["loss"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda here")
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_cuda_says_that_nothing_waits(case: tuple[str, ...]) -> None:
    config, device = api.resolve(case[0], list(case[1:])), torch.device("cuda", 0)
    learner = Learner.create(config, 8, device, torch.bfloat16)
    batch, views = batch_of(config), [synthetic_views(config, device)] * config.accumulate
    try:
        for step in range(4):
            if step == 2:  # what is made once has been made
                torch.cuda.set_sync_debug_mode("error")
            make_views(next(on_device([batch], device)), configured_spec(config.data), device)
            learner.step(views, rates_at(config, step, 4))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def steps(
    config: RunConfig, device: torch.device, autocast: torch.dtype | None = None, count: int = 3
) -> tuple[list[float], list[torch.Tensor]]:  # fmt: skip
    """Losses of some steps, and the student's gradients of the last."""
    learner = Learner.create(config, 8, device, autocast)
    compile_backbones(learner.pair, config.compile, device, pytest.fail)
    views: Views = synthetic_views(config, device)
    losses = []
    for step in range(count):
        torch.manual_seed(step)  # stochastic depth
        losses.append(float(learner.step([views], rates_at(config, step, 3)).losses["loss"]))
    return losses, [p.grad.clone() for p in learner.pair.student.parameters() if p.grad is not None]


def assert_agree(found: Any, expected: Any, loss: float, gradient: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=loss)
    assert len(found[1]) == len(expected[1])
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert float((ours - theirs).norm()) <= gradient * float(theirs.norm()) + 1e-9


@pytest.mark.parametrize("recipe", ["debug-pretrain", "debug-distill"])
def test_recomputed_activations_change_nothing(recipe: str, device: torch.device) -> None:
    kept, recomputed = (
        steps(api.resolve(recipe, ["compile=false", f"recompute={flag}"]), device) for flag in ("false", "true")
    )
    assert_agree(recomputed, kept, 1e-6, 1e-5)


def test_recomputing_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that autograd keeps for the backward pass of one step."""
    kept = []
    for flag in ("false", "true"):
        config = api.resolve("debug-distill", [f"recompute={flag}", "model.depth=8"])
        learner, views, seen = Learner.create(config, 8, CPU, None), synthetic_views(config, CPU), dict[int, int]()

        def keep(x: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            learner._forward(views, rates_at(config, 0, 3), [])
        kept.append(sum(seen.values()))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("recipe", ["debug-pretrain", "debug-distill"])
def test_bfloat16_is_near_float32(recipe: str, device: torch.device) -> None:
    config = api.resolve(recipe, ["model.drop_path=0", "compile=false"])
    found, expected = steps(config, device, torch.bfloat16, count=1), steps(config, device, count=1)
    assert_agree(found, expected, 1e-2, 1e-1)
    ours, theirs = (torch.cat([g.flatten() for g in gradients]).norm() for _, gradients in (found, expected))
    assert float(ours / theirs) == pytest.approx(1, abs=1e-2)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., Any]]:
    """Stands in for the compiler and runs the traced programs as they are: quick, and nothing to install."""
    made: list[Callable[..., Any]] = []
    real = torch.compile

    def compile_(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        made.append(function)
        return real(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile_)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["debug-pretrain", "debug-distill"])
@pytest.mark.parametrize("recompute", ["false", "true"])
def test_traced_programs_agree(recipe: str, recompute: str, traced: list[Callable[..., Any]]) -> None:
    """Three steps are three programs (masked, local, teacher) of unchanged losses and gradients."""
    words = [f"recompute={recompute}"]
    plain = steps(api.resolve(recipe, [*words, "compile=false"]), CPU)
    assert not traced
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters
    counted.clear()
    assert_agree(steps(api.resolve(recipe, [*words, "compile=true"]), CPU), plain, 1e-5, 1e-4)
    assert len(traced) == 2
    assert counted["stats"]["unique_graphs"] == 3
    assert not counted["graph_break"]


@pytest.mark.parametrize(("wanted", "kind", "count"), [("auto", "cpu", 0), ("auto", "cuda", 2), (False, "cuda", 0)])
def test_compiles_where_it_should(
    wanted: Any, kind: str, count: int, traced: list[Callable[..., Any]]
) -> None:  # fmt: skip
    config = api.resolve("debug-distill", [])
    compile_backbones(Learner.create(config, 8, CPU, None).pair, wanted, torch.device(kind), pytest.fail)
    assert len(traced) == count


def test_goes_on_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*_: Any, **__: Any) -> Any:
            raise BackendCompilerFailed(broken, RuntimeError("no compiler\nand much more"), None)

        return call

    monkeypatch.setattr(torch, "compile", broken)
    config = api.resolve("debug-distill", ["compile=true"])
    learner, said = Learner.create(config, 8, CPU, None), list[str]()
    compile_backbones(learner.pair, config.compile, CPU, said.append)
    result = learner.step([synthetic_views(config, CPU)], rates_at(config, 0, 3))
    assert torch.isfinite(result.losses["loss"])
    assert len(said) == 2  # student and teacher
    assert all("does not work here" in line and "no compiler" in line and "\n" not in line for line in said)


def test_batches_arrive_in_order(device: torch.device) -> None:
    config = api.resolve("debug-distill", [])
    given = [batch_of(config) for _ in range(3)]
    arrived = list(on_device(iter(given), device))
    assert len(arrived) == 3
    for before, after in zip(given, arrived, strict=True):
        assert after.global_crops.device.type == device.type
        assert torch.equal(before.global_crops, after.global_crops.cpu())
        assert torch.equal(before.labels, after.labels)
