"""One of several training processes is killed: the others end, one line says so, and a restart goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from process_groups import join_group, run_processes
from run_files import records, same
from smkd import api, distributed
from smkd.engine.launch import launch
from smkd.engine.step import Learner
from smkd.errors import SmkdError

pytestmark = pytest.mark.slow

WORDS = (
    "pretrain", "debug-pretrain", "devices=2", "accelerator=cpu", "precision=fp32", "batch_size=8",
    "data.limit_per_class=1", "validation.every=0", "log_every=1",
)  # fmt: skip
TRAIN = [sys.executable, "-m", "smkd", *WORDS]
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
    "-m", "smkd", *WORDS,
]  # fmt: skip
LIMIT = 10
"""Seconds that the others may take to end."""


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The training processes that a process has started, the first one first."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()]


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    metrics = Path("run/metrics.jsonl")
    while not (metrics.exists() and f'"train", "step": {step}, ' in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/task").exists():
        pytest.skip("looks for processes in /proc")
    monkeypatch.chdir(tmp_path)


def test_a_killed_process_is_named_and_ends_the_others() -> None:
    line = [*TRAIN, "out=run", "epochs=2000"]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_step(process, 1)
    workers = workers_of(process)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 2
    assert re.fullmatch(r"smkd: process 1 of 2 was killed \(SIGKILL; out of memory\?\)\n", said), said
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_torchrun_starts_again_where_a_process_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("out=run", "epochs=6", "save_minutes=0.001")
    subprocess.run([*TRAIN, *words], check=True, capture_output=True)
    expected = torch.load("run/checkpoints/last.pt", weights_only=True), records()

    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    process = subprocess.Popen([*TORCHRUN, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(process, 12)
    workers = workers_of(process)
    os.kill(workers[1], signal.SIGKILL)
    killed = time.monotonic()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.05)
    assert time.monotonic() - killed < LIMIT
    shown, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "resumed at epoch" in shown
    ours = [line for line in said.splitlines() if line.startswith("smkd: ")]
    # torchrun, which names the process, may stop the other one before it has noticed
    assert ours in ([], ["smkd: another process of this run ended without a word (killed? out of memory?)"])
    assert "exitcode: -9" in said
    assert "Traceback" not in said
    assert same([torch.load("run/checkpoints/last.pt", weights_only=True), records()], list(expected))


def never_answers(rank: int, ports: list[int], folder: str) -> None:
    """Two processes, of which the second one hangs in its third step."""
    real, done = Learner.step, 0

    def step(*given: Any) -> Any:
        nonlocal done
        done += 1
        if done == 3 and rank == 1:
            time.sleep(60)
        return real(*given)

    join_group(ports[0], rank, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "LIMIT", timedelta(seconds=3))
        patch.setattr(Learner, "step", step)
        with pytest.raises(SmkdError, match=r"^another process of this run did not answer within 0\.05 minutes$"):
            launch(api.resolve(WORDS[1], [f"out={folder}/run", "epochs=1", *WORDS[2:]]))
    (Path(folder) / "told").touch()


def test_a_process_that_hangs_ends_the_others_after_the_limit(tmp_path: Path) -> None:
    assert run_processes(never_answers, 2, 1, str(tmp_path), patience=20) == [0, -signal.SIGKILL]
    assert (tmp_path / "told").exists()
