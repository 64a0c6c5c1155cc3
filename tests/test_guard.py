"""What is not finite never reaches weights, centres or files; the run goes on, or stops and takes advice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from run_files import OUT, STEPS, records, run, same
from smkd.config import loading
from smkd.data.loader import Views
from smkd.engine import checkpoint
from smkd.engine.step import Learner
from smkd.errors import ConfigError, SmkdError

pytestmark = pytest.mark.slow

PARTS = ("student", "teacher", "objective", "optimizer")
Hurt = Callable[[Learner, list[Views]], list[Views]]


def batch(learner: Learner, views: list[Views]) -> list[Views]:
    first = views[0]
    pixels = first.global_views.clone()
    pixels[0, 0, 0, 0, 0] = torch.nan
    return [replace(first, global_views=pixels), *views[1:]]


def gradient(learner: Learner, views: list[Views]) -> list[Views]:
    parameter = next(learner.pair.student.parameters())
    handle = parameter.register_hook(lambda grad: (handle.remove(), torch.full_like(grad, torch.inf))[1])
    return views


def hurt_steps(monkeypatch: pytest.MonkeyPatch, steps: set[int], hurt: Hurt) -> list[dict[str, Any]]:
    """Hurt some steps of the next run, counted from 1; the state after each step."""
    real, states = Learner.step, []

    def step(learner: Learner, passes: Any, rates: Any, batches: Any) -> Any:
        views = list(passes)
        views = hurt(learner, views) if len(states) + 1 in steps else views
        result = real(learner, views, rates, batches)
        states.append({part: clone(value) for part, value in learner.state().items()})
        return result

    monkeypatch.setattr(Learner, "step", step)
    return states


def clone(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: clone(part) for key, part in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("words", [("precision=bf16",), ("precision=fp32", "accumulate=2")], ids=" ".join)
@pytest.mark.parametrize("hurt", [batch, gradient])
@pytest.mark.parametrize("at", [1, 2, STEPS])
def test_the_step_is_skipped_counted_and_told(
    hurt: Hurt, at: int, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first, a middle and the last step of the second epoch."""
    monkeypatch.chdir(tmp_path)
    done = STEPS + at
    with monkeypatch.context() as patch:
        states = hurt_steps(patch, {done}, hurt)
        run("epochs=2", "log_every=2", "validation.every=0", "optim.freeze_last_layer_epochs=0", *words)
    for part in ("student", "objective", "optimizer"):
        before, after = states[done - 2][part], states[done - 1][part]
        if part == "optimizer":
            before, after = before["state"], after["state"]
        assert same(before, after), part
    assert all(checkpoint.first_not_finite(state) is None for state in states)
    assert not same(states[done - 2]["teacher"], states[done - 1]["teacher"])  # it goes on towards the student
    (told,) = [line for line in records() if line["kind"] == "skipped"]
    assert told["step"] == done
    assert told["terms"][:2] == (["gradient"] if hurt is gradient else ["loss", "cls"])
    assert len(set(told["images"])) == 64
    assert sum(line.get("skipped", 0) for line in records()) == 1
    assert [line.get("skipped_steps") for line in records() if line["kind"] == "epoch"] == [None, 1]
    json.loads((OUT / "metrics.jsonl").read_text().splitlines()[-1], parse_constant=pytest.fail)
    assert all(line["loss"] < 100 for line in records() if "loss" in line)


@pytest.mark.parametrize("change", ["precision=fp32", "optim.lr=1e-5", "head.fixed_norm=true", "data.on_error=skip"])
def test_the_run_stops_and_takes_the_advised_change(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("epochs=3", "validation.every=0", "log_every=1", "guard.max_skips=2", "optim.freeze_last_layer_epochs=0")
    with monkeypatch.context() as patch:
        hurt_steps(patch, {5, 6, 7, 8, 9}, batch)
        with pytest.raises(SmkdError, match=r"^2 steps in a row .* up to step 6, which is saved.*resume_with"):
            run(*words)
    state = checkpoint.load_checkpoint(OUT / "checkpoints" / "last.pt")
    assert state["step"] == 6
    assert checkpoint.first_not_finite({part: state[part] for part in PARTS}) is None
    free = change.startswith(("precision", "data"))
    if not free:
        with pytest.raises(ConfigError, match="another configuration"):
            run(*words, change)
    run(*words, change if free else f"resume_with={change}")
    key, _, value = change.partition("=")
    (told,) = map(json.loads, (OUT / "history.jsonl").read_text().splitlines())
    assert told["step"] == 6
    assert len(told["changes"]) == 1
    assert told["changes"][0].startswith(f"{key}: " if free else f"resume_with: {change}")
    # it is kept: the first command goes on with the change
    kept = loading.load_config(OUT / "config.yaml")
    assert kept.resume_with == (() if free else (change,))
    state = checkpoint.load_checkpoint(OUT / "checkpoints" / "last.pt")
    section: Any = state["config"]
    for part in key.split("."):
        section = section[part]
    assert str(section).lower() == value or float(section) == float(value)
    if not free:
        run(*words, "epochs=4")
        again = checkpoint.load_checkpoint(OUT / "checkpoints" / "last.pt")
        assert again["epoch"] == 4
        assert loading.resumed_with(kept, kept.resume_with).optim == loading.check(again["config"]).optim


@pytest.mark.parametrize(("at", "precision"), [(1, "fp32"), (2, "bf16"), (STEPS, "fp32"), (STEPS, "bf16")])
def test_a_broken_optimiser_state_is_never_saved(
    at: int, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first, a middle and the last step of the second epoch."""
    monkeypatch.chdir(tmp_path)
    words = ("epochs=2", "validation.every=0", f"precision={precision}")

    def state(learner: Learner, views: list[Views]) -> list[Views]:
        next(iter(learner.optimizer.state.values()))["exp_avg"].fill_(torch.nan)
        return views

    with monkeypatch.context() as patch:
        hurt_steps(patch, {STEPS + at}, state)
        with pytest.raises(SmkdError, match=r"no longer finite at step 6 and is not saved; the same command"):
            run(*words)
    kept = checkpoint.load_checkpoint(OUT / "checkpoints" / "last.pt")
    assert kept["step"] == STEPS
    assert checkpoint.first_not_finite({part: kept[part] for part in PARTS}) is None
    run(*words, "resume_with=optim.lr=1e-5")
    assert checkpoint.load_checkpoint(OUT / "checkpoints" / "last.pt")["step"] == 2 * STEPS


def test_what_cannot_change_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"resume_with=optim\.lr=1: there is no run in 'run' to go on with"):
        run("resume_with=optim.lr=1")
    assert not OUT.exists()
    run("epochs=1", "validation.every=0")
    with pytest.raises(ConfigError, match="a run cannot change its batch_size"):
        run("epochs=1", "validation.every=0", "resume_with=batch_size=32")
    with pytest.raises(ConfigError, match=r"unknown key 'optim\.rl'"):
        run("epochs=1", "validation.every=0", "resume_with=optim.rl=32")
    assert loading.load_config(OUT / "config.yaml").resume_with == ()
