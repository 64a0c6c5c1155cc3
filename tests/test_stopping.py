"""A run that is told to stop, or that is out of time, saves the step it is at and goes on from there bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from run_files import OUT, STEPS, at_step, files, records, run, settings
from smkd.engine import checkpoint, stopping
from smkd.errors import Stopped
from smkd.fewshot.validation import FewShotValidation

pytestmark = pytest.mark.slow

DISTILL = ("init=random", "objective.supervised.weight=1", "data.sampler={classes: 16, per_class: 4}")
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "phase1": ("debug-pretrain", ("data.limit_per_class=3",)),
    "phase2-workers": ("debug-distill", (*DISTILL, "num_workers=2")),
}


@pytest.fixture(autouse=True)
def _ctrl_c_is_heeded() -> Iterator[None]:
    """Also where the tests were started in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, bytes], list[dict[str, Any]]]]:
    """Files and records of runs that nothing disturbed."""
    found = {}
    for name, (recipe, words) in KINDS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp(name))
            run("log_every=2", "epochs=2", *words, recipe=recipe)
            found[name] = files(), records()
    return found


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("name", KINDS)
def test_each_step_is_one_to_stop_at(
    name: str, finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, words = KINDS[name]
    monkeypatch.chdir(tmp_path)
    whole, lines = finished[name]
    total, done = max(line["step"] for line in lines), 0
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    while done < total:
        number = numbers[done % 3]
        stride = 1 if done < 4 else 2  # the first epoch's end is among them, and the run's
        with monkeypatch.context() as patch:
            at_step(patch, stride, lambda number=number: send(number))
            with pytest.raises(Stopped, match=rf"^stopped by {number.name}: step \d+ of {total} is saved") as stop:
                run("log_every=2", "epochs=2", *words, recipe=recipe)
        done = min(done + stride, total)
        assert stop.value.exit_code == 128 + number
        assert checkpoint.load_checkpoint(OUT / "checkpoints" / "last.pt")["step"] == done
        assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    run("log_every=2", "epochs=2", *words, recipe=recipe)
    assert records() == lines
    assert without_earlier(files()) == without_earlier(whole)


def without_earlier(checkpoints: dict[str, bytes]) -> dict[str, bytes]:
    """The state before the last one may be one within an epoch."""
    return {name: content for name, content in checkpoints.items() if name != "last-1.pt"}


def test_time(finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved = []
    real = checkpoint.save_checkpoint

    def save(state: dict[str, Any], path: Path) -> None:
        if path.name == "last.pt":
            saved.append((state["step"], state["step_in_epoch"]))
        real(state, path)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    # each step, and each epoch once it is closed
    everything = [(1, 1), (2, 2), (3, 3), (3, 0), (4, 1), (5, 2), (6, 3), (6, 0)]
    for _ in everything[:-1]:
        with pytest.raises(Stopped, match=r"^max_hours is over: step") as stop:
            run("log_every=2", "epochs=2", "max_hours=1e-9")
        assert stop.value.exit_code == 75
    run("log_every=2", "epochs=2", "max_hours=1e-9")
    assert saved == everything
    assert records() == finished["phase1"][1]
    saved.clear()
    run("log_every=2", "epochs=2", "overwrite=true", "save_minutes=1e-9")
    assert saved == everything
    assert records() == finished["phase1"][1]


@pytest.mark.parametrize("part", ["extract", "score"])
def test_a_signal_cuts_a_validation_short(
    part: str, finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reached_end = False

    def cut(*_: object) -> dict[str, float]:
        nonlocal reached_end
        send()
        time.sleep(0.01)
        reached_end = True
        return {"accuracy": 0.0}

    with monkeypatch.context() as patch:
        patch.setattr(FewShotValidation, part, cut)
        with pytest.raises(Stopped, match=f"step {STEPS} of {2 * STEPS} is saved"):
            run("log_every=2", "epochs=2")
    assert not reached_end
    run("log_every=2", "epochs=2")
    assert records() == finished["phase1"][1]
    assert without_earlier(files()) == without_earlier(finished["phase1"][0])


def test_a_checkpoint_without_steps_within_an_epoch_is_one_of_its_end(
    finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        at_step(patch, STEPS + 1, send)
        with pytest.raises(Stopped):
            run("log_every=2", "epochs=2")
    folder = OUT / "checkpoints"
    state = checkpoint.load_checkpoint(folder / "last-1.pt")
    for key in ("step_in_epoch", "meters", "best_step"):
        del state[key]
    checkpoint.save_checkpoint(state, folder / "last.pt")
    run("log_every=2", "epochs=2")
    assert records() == finished["phase1"][1]


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "smkd", "pretrain", "debug-pretrain", *settings("log_every=1", *words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    while not (OUT / "metrics.jsonl").exists() or len(records()) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("words", [("num_workers=2",), ("devices=2", "accelerator=cpu")], ids=["workers", "processes"])
def test_a_signal_to_every_process_of_a_job(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a scheduler or a terminal sends it: to the workers of all kinds too, which must not fall over it."""
    monkeypatch.chdir(tmp_path)
    process = start("epochs=2000", "validation.every=0", *words)
    wait_for_step(process, 2)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    state = checkpoint.load_checkpoint(OUT / "checkpoints" / "last.pt")
    line = f"smkd: stopped by SIGTERM: step {state['step']} of {2000 * STEPS} is saved, and the same command"
    assert [text for text in said.splitlines() if "smkd" in text][-1].startswith(line), said
    assert process.returncode == 143
    assert len(state["meters"]) in (0, 1 + ("devices=2" in words))
    assert not list(OUT.rglob(".*"))


@pytest.mark.parametrize("lines", [1, 3])
def test_a_kill_costs_no_more_than_time(
    lines: int, finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first epoch, of which nothing is saved yet, and once it is closed or while it is; more in soak.py."""
    monkeypatch.chdir(tmp_path)
    process = start("epochs=2", "log_every=2")
    wait_for_step(process, lines)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    run("log_every=2", "epochs=2")
    assert records() == finished["phase1"][1]
    assert files() == finished["phase1"][0]
    assert not list(OUT.rglob(".*"))


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stopping, "TOGETHER", 0.0)

    def twice() -> None:
        send(signal.SIGINT)
        time.sleep(0.01)
        send(signal.SIGINT)

    at_step(monkeypatch, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        run("epochs=2")
    assert not (OUT / "checkpoints").exists()
