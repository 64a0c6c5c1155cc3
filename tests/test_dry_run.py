"""`--dry-run`: what would stop a run is said, its length and cost are told, and nothing is written."""

from __future__ import annotations

import gc
import re
import weakref
from pathlib import Path
from typing import Any

import pytest

from command_line import refused, smkd
from made_images import photographs
from smkd import api
from smkd.engine.bench import measure_steps
from smkd.engine.dry_run import _one_pass, dry_run
from smkd.engine.step import Learner
from smkd.fewshot.validation import FewShotValidation

pytestmark = pytest.mark.slow

WORDS = ("accelerator=cpu", "precision=fp32", "data.limit_per_class=4", "batch_size=64")


def test_a_run_that_would_start(tmp_path: Path) -> None:
    said = smkd("pretrain", "debug-pretrain", *WORDS, "epochs=5", "--dry-run", cwd=tmp_path).stdout.splitlines()
    assert said[0] == "256 images of 64 classes; 4 steps of 64 images an epoch, 5 epochs; from random weights"
    gflop = measure_steps(api.resolve("debug-pretrain", [*WORDS, "batch_size=8"]), 1).gflop_per_image
    assert said[1] == f"{gflop:.3g} GFLOP an image, {20 * 64 * gflop / 1e6:.3g} PFLOP in all"
    speed = re.fullmatch(r"([\d.,]+) images/s by 3 steps of 8 images, patterns; [\d.]+ GB \(cpu, fp32\)", said[2])
    assert speed is not None
    assert re.fullmatch(r"20 steps take about [\d.]+ minutes, without validation; nothing was written", said[3])
    assert list(tmp_path.iterdir()) == []


def test_hours_are_those_of_the_speed(tmp_path: Path) -> None:
    words = ("pretrain", "debug-pretrain", *WORDS, "epochs=2000000", "devices=4", "--dry-run")
    said = smkd(*words, cwd=tmp_path).stdout.splitlines()
    speed = re.match(r"([\d.,]+) images/s on each of 4 devices", said[2])
    hours = re.match(r"8,000,000 steps take about ([\d.,]+) hours", said[3])
    assert speed is not None
    assert hours is not None
    per_second = float(speed[1].replace(",", ""))
    expected = 8e6 * 64 / (4 * per_second) / 3600
    assert float(hours[1].replace(",", "")) == pytest.approx(expected, rel=0.06 / per_second + 1e-3)


def test_a_run_that_goes_on_counts_what_is_left(tmp_path: Path) -> None:
    words = (*WORDS, "epochs=3", "validation.every=0", "head.num_prototypes=16")
    api.pretrain(api.resolve("debug-pretrain", [f"out={tmp_path / 'run'}", *words, "epochs=2"]))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    said = smkd("pretrain", "debug-pretrain", f"out={tmp_path / 'run'}", *words, "--dry-run").stdout.splitlines()
    assert said[0].endswith(f"from {tmp_path / 'run' / 'checkpoints' / 'last.pt'}, step 8")
    assert said[3].startswith("4 steps take about ")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_what_would_stop_it_is_one_line(tmp_path: Path) -> None:
    photographs(tmp_path / "photos" / "train", (4, 4))
    for words, message in (
        ([f"data={tmp_path / 'none'}"], f"smkd: data folder '{tmp_path / 'none'}' does not exist"),
        ([f"data={tmp_path / 'photos'}", "batch_size=64"], "smkd: batch_size=64 is larger than the training set"),
        (["optim.warmup_epochs=9"], "smkd: optim.warmup_epochs=9"),
        ([f"init={tmp_path / 'none'}"], f"smkd: '{tmp_path / 'none'}' does not exist"),
        ([f"out={tmp_path / 'photos'}"], f"smkd: out={tmp_path / 'photos'} holds other things"),
    ):
        assert refused("pretrain", "debug-pretrain", *words, "--dry-run", cwd=tmp_path).startswith(message)


def test_the_networks_that_were_checked_are_gone_when_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the memory would be that of two runs."""
    made, create = [], Learner.create

    def noted(*given: Any) -> Learner:
        assert [each() for each in made] in ([], [None])
        learner = create(*given)
        made.append(weakref.ref(learner))
        return learner

    monkeypatch.setattr(Learner, "create", noted)
    gc.disable()
    try:
        assert len(dry_run(api.resolve("debug-pretrain", WORDS), FewShotValidation())) == 4
    finally:
        gc.enable()
    assert len(made) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["batch_size=512", "devices=8"], (8, None)),
        (["batch_size=4"], (4, None)),
        (["batch_size=64", "data.sampler={classes: 16, per_class: 4}"], (8, (2, 4))),
        (["batch_size=60", "data.sampler={classes: 20, per_class: 3}"], (6, (2, 3))),
        (["batch_size=64", "data.sampler={classes: 4, per_class: 16}"], (8, (1, 8))),
    ],
)
def test_a_timed_step_is_small_on_a_cpu(words: list[str], expected: tuple[int, tuple[int, int] | None]) -> None:
    config = api.resolve("debug-distill", ["init=random", "data.sampler=null", *words])
    found = _one_pass(config, "cpu")
    sampler = found.get("data", {}).get("sampler")
    assert (found["batch_size"], sampler and (sampler["classes"], sampler["per_class"])) == expected
    assert _one_pass(config, "cuda")["batch_size"] == config.batch_size // config.passes
