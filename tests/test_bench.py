"""`smkd bench`: what it counts is right; speeds are only looked at for being there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import refused, smkd
from smkd.config import loading
from smkd.engine.bench import STEP_PARTS, matmul_tflops, measure_steps, synthetic_views
from smkd.machine import SPINS, SPINS_BUSY
from smkd.models.vit import SIZES
from smkd.processes import BUSY, busy_processes


def test_parts_fill_the_step_and_products_are_counted() -> None:
    config = loading.resolve("debug-distill", ["batch_size=16", "local_views.count=0", "accumulate=2"])
    found = measure_steps(config, steps=3)
    assert set(found.parts_ms) == set(STEP_PARTS)
    assert all(found.parts_ms[name] > 0 for name in STEP_PARTS)
    assert found.images_per_second == pytest.approx(1e3 * 16 / found.step_ms)
    assert found.tflops == pytest.approx(found.gflop_per_image * found.images_per_second / 1e3)
    # two global views: once through the teacher, forward and twice as much backward through the student
    model, head = config.model, config.head
    dim, depth, _ = SIZES[model.size]
    tokens = (config.global_views.size // model.patch_size) ** 2 + 1
    linear = depth * 12 * dim**2 + dim * head.hidden_dim + head.hidden_dim**2 + head.hidden_dim * head.bottleneck_dim
    linear += head.bottleneck_dim * head.num_prototypes + 3 * model.patch_size**2 * dim
    least = 2 * 4 * 2 * tokens * linear / 1e9
    assert least < found.gflop_per_image < 1.5 * least


def test_synthetic_views_have_pairs_and_masks() -> None:
    views = (
        "global_views={count: 2, size: 32, scale: [0.25, 1]}",
        "local_views={count: 10, size: 16, scale: [0.05, 0.25]}",
    )
    config = loading.resolve("mini-imagenet-distill", ["batch_size=8", *views])
    made = synthetic_views(config, torch.device("cpu"))
    assert made.global_views.shape == (2, 8, 3, 32, 32)
    assert made.local_views.shape == (10, 8, 3, 16, 16)
    assert made.masks.shape == (2, 8, 2, 2)
    assert made.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_ceiling_is_in_tera() -> None:
    assert 1e-3 < matmul_tflops(torch.device("cpu"), None) < 1e3


@pytest.mark.slow
def test_table_file_and_ratios(tmp_path: Path) -> None:
    words = ("bench", "debug-pretrain", "batch_size=8", "--steps", "1")
    done = smkd(*words, "--json", "first.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    values = json.loads((tmp_path / "first.json").read_text())
    assert (values["recipe"], values["batch_size"], values["data"]) == ("debug-pretrain", 8, "patterns")
    done = smkd(*words, "--against", "first.json", cwd=tmp_path)
    assert "ratio" in done.stdout, done.stderr
    (tmp_path / "other.json").write_text("{}")
    for name, expected in (
        ("other.json", "no result of `smkd bench --json`"),
        ("none.json", "cannot read 'none.json'"),
    ):
        assert expected in refused(*words, "--against", name, cwd=tmp_path)


def test_busy_processes_are_there_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    started, real = [], subprocess.Popen

    def noted(*words: Any, **options: Any) -> Any:
        started.append(real(*words, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    with busy_processes(2):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() is not None for process in started)
    alone = real([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    alone.stdin.close()  # as when its parent was killed
    assert alone.wait(20) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "variables", "expected"),
    [
        ("import smkd", {}, {SPINS, SPINS_BUSY}),
        ("import smkd", {"GOMP_SPINCOUNT": "7"}, {"7"}),
        ("import smkd", {"OMP_WAIT_POLICY": "ACTIVE"}, {"None"}),
        ("import torch, smkd", {}, {"None"}),  # it has been read
    ],
)
def test_waiting_threads_spin_little_unless_the_user_says_otherwise(
    code: str, variables: dict[str, str], expected: set[str]
) -> None:
    own = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = f"import os; {code}; print(os.environ.get('GOMP_SPINCOUNT'))"
    shown = subprocess.run([sys.executable, "-c", code], env={**own, **variables}, capture_output=True, text=True)
    assert shown.stdout.strip() in expected
