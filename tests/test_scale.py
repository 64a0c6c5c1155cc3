"""The batch script of docs/scale.md, with stand-ins for SLURM's programs: a signal, the queue again, a second start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smkd.engine.restore import open_checkpoint

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
ON_THE_PAGE = "mini-imagenet-pretrain data=/data/mini-imagenet out=runs/mini devices=8 num_nodes=2"
HERE = (
    "debug-pretrain out=run devices=2 num_nodes=1 accelerator=cpu precision=fp32 epochs=$EPOCHS log_every=1 "
    "validation.every=0 data.limit_per_class=2 batch_size=8"
)
PROGRAMS = {
    # tasks with SLURM's variables, which get a signal of the step; the largest exit code
    "srun": """
        echo $$ > srun.pid
        shift
        for number in 0 1; do
            SLURM_PROCID=$number SLURM_LOCALID=$number SLURM_NTASKS=2 "$@" &
            tasks+=($!)
        done
        trap 'kill -USR1 "${tasks[@]}"' USR1
        code=0
        for task in "${tasks[@]}"; do
            wait "$task"
            one=$?
            while kill -0 "$task" 2> /dev/null; do wait "$task"; one=$?; done
            if [ "$one" -gt "$code" ]; then code=$one; fi
        done
        exit "$code"
    """,
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$*" >> scontrol.txt; fi',
    "smkd": f'exec {sys.executable} -m smkd "$@"',
}


@pytest.fixture
def submitted(tmp_path: Path) -> list[str]:
    """The script of the page as a command, in a folder with SLURM's programs."""
    script = PAGE.read_text().split("```bash\n")[1].split("```")[0]
    assert ON_THE_PAGE in script
    (tmp_path / "train.sbatch").write_text(script.replace(ON_THE_PAGE, HERE))
    (tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return ["bash", str(tmp_path / "train.sbatch")]


def start(command: list[str], folder: Path, epochs: int) -> subprocess.Popen[bytes]:
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "here", "EPOCHS": str(epochs)}
    return subprocess.Popen(command, cwd=folder, env={**os.environ, **job, "PATH": path, "OMP_NUM_THREADS": "1"})


def test_the_script_goes_into_the_queue_again(submitted: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with start(submitted, tmp_path, 10_000) as job:
        try:
            for _ in range(600):
                assert job.poll() is None
                if (run / "metrics.jsonl").exists() and '"train"' in (run / "metrics.jsonl").read_text():
                    break
                time.sleep(0.1)
            os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)
            assert job.wait(60) == 138
        finally:
            job.kill()
    assert (tmp_path / "scontrol.txt").read_text() == f"requeue {os.getpid()}\n"
    state, _ = open_checkpoint(run)
    assert 0 < state["step"] < 10_000
    with start(submitted, tmp_path, state["epoch"] + 2) as job:
        assert job.wait(60) == 0
    after, _ = open_checkpoint(run)
    assert after["epoch"] == state["epoch"] + 2
    assert (tmp_path / "scontrol.txt").read_text().count("requeue") == 1
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert steps == sorted(set(steps)), "a step was done twice"
