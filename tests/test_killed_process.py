"""One of several training processes is killed: the others end, and one line says which it was."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TRAIN = (
    "-m", "smkd", "pretrain", "debug-pretrain", "out=run", "devices=2", "accelerator=cpu", "precision=fp32",
    "epochs=2000",
    "batch_size=8", "data.limit_per_class=1", "validation.every=0", "log_every=1",
)  # fmt: skip


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The training processes that a process has started, the first one first."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("rank", [1])
def test_a_killed_process_is_named_and_ends_the_others(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    process = subprocess.Popen([sys.executable, *TRAIN], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and '"train"' in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    workers = workers_of(process)
    assert len(workers) == 2
    os.kill(workers[rank], signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2
    assert re.fullmatch(rf"smkd: process {rank} of 2 was killed \(SIGKILL; out of memory\?\)\n", said), said
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
