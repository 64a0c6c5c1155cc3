"""`smkd runs`: what the folders of runs say, also of those that go on, were stopped, or are damaged."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import refused, smkd
from smkd import api
from smkd.engine.runs import run_summary

pytestmark = pytest.mark.slow

WORDS = (
    "data.limit_per_class=4", "batch_size=64", "epochs=2", "validation.every=1", "validation.episodes=9",
    "validation.query=2", "validation.shots=[1]", "head.num_prototypes=16",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run."""
    folder = tmp_path_factory.mktemp("runs")
    api.pretrain(api.resolve("debug-pretrain", [f"out={folder / 'first'}", *WORDS]))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy, with another run beside it that was stopped in its second epoch and has other settings."""
    copy = shutil.copytree(made, tmp_path / "runs")
    shutil.copytree(copy / "first", copy / "group" / "second")
    lines = (copy / "first" / "metrics.jsonl").read_text().splitlines(keepends=True)
    second = copy / "group" / "second"
    (second / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line).get("epoch") != 2) + "{")
    text = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(text.replace("seed: 0", "seed: 3", 1).replace("log_every: 5", "log_every: 7"))
    return copy


def test_the_list(folder: Path) -> None:
    records = [json.loads(line) for line in (folder / "first" / "metrics.jsonl").read_text().splitlines()]
    scores = {record["epoch"]: record["accuracy"] for record in records if record["kind"] == "validation"}
    seconds = [record["seconds"] for record in records if record["kind"] == "epoch"]
    done = smkd("runs", folder, "--json", folder / "list.json")
    head, first, second = done.stdout.splitlines()
    assert head.split() == ["run", "recipe", "data", "epochs", "best", "validation", "hours", "device", "state"]
    best = max(scores, key=scores.__getitem__)
    assert first.split() == [
        str(folder / "first"), "debug-pretrain", "patterns", "2/2", f"{scores[best]:.2f}", "(epoch", f"{best})",
        f"{sum(seconds) / 3600:.2f}", "cpu", "complete",
    ]  # fmt: skip
    assert second.split()[0] == str(folder / "group" / "second")
    assert second.split()[3:7] == ["1/2", f"{scores[1]:.2f}", "(epoch", "1)"]
    assert second.endswith("stopped")
    found = json.loads((folder / "list.json").read_text())
    assert [(each["epoch"], each["state"]) for each in found] == [(2, "complete"), (1, "stopped")]
    assert found[0]["best"] == scores[best]
    assert smkd("runs", cwd=folder.parent).stdout.splitlines()[1].split()[0] == "runs/first"


def test_a_run_that_goes_on_is_known_by_its_lock(folder: Path) -> None:
    lock = folder / "first" / ".lock"
    lock.write_text(f"{socket.gethostname()} {os.getpid()}\n")
    assert run_summary(folder / "first").state == f"running (process {os.getpid()} on {socket.gethostname()})"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    lock.write_text(f"{socket.gethostname()} {ended.pid}\n")  # killed: the file stays
    assert run_summary(folder / "first").state == "complete"
    lock.write_text("elsewhere 12\n")
    assert run_summary(folder / "first").state == "running (process 12 on elsewhere)"
    lock.write_text("?")
    assert run_summary(folder / "first").state == "complete"


def test_patience_completes_a_run(folder: Path) -> None:
    second = folder / "group" / "second"
    text = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(text.replace("patience: 0", "patience: 1"))
    with (second / "metrics.jsonl").open("w") as file:
        for epoch, accuracy in ((0, 30.0), (1, 20.0)):
            file.write(json.dumps({"kind": "validation", "step": epoch, "epoch": epoch, "accuracy": accuracy}) + "\n")
    assert run_summary(second).state == "complete"
    assert (run_summary(second).best, run_summary(second).best_epoch) == (30.0, 0)


def test_what_is_damaged_is_said(folder: Path) -> None:
    (folder / "first" / "config.yaml").write_text("epochs: many")
    assert run_summary(folder / "first").state.startswith(f"unreadable: '{folder / 'first' / 'config.yaml'}': ")
    (folder / "group" / "second" / "env.json").write_text("?")
    (folder / "group" / "second" / "metrics.jsonl").write_text('{"kind": "epoch", "epoch": "x"}\n[1]\n')
    told = run_summary(folder / "group" / "second")
    assert (told.state, told.epoch, told.best, told.device) == ("stopped", 0, None, "")


def test_the_differences_of_two_runs(folder: Path) -> None:
    first, second = folder / "first", folder / "group" / "second"
    assert smkd("runs", "diff", first, second).stdout.splitlines()[3:] == ["seed: 0 -> 3", "log_every: 5 -> 7"]
    assert smkd("runs", "diff", first, first).stdout.splitlines()[3:] == ["no setting differs"]
    assert refused("runs", "diff", first).startswith("smkd: runs diff compares two runs, not 1;")
    assert refused("runs", "diff", folder, first) == f"smkd: '{folder}' is no run: it holds no config.yaml"
    missing = folder / "no"
    for words in (("watch", missing), ("report", missing, "-o", "x.html")):
        assert refused(*words, cwd=folder) == f"smkd: '{missing}' does not exist"


def test_where_there_is_no_run(tmp_path: Path) -> None:
    assert refused("runs", tmp_path / "none") == f"smkd: '{tmp_path / 'none'}' is no folder"
    assert refused("runs", tmp_path).startswith(f"smkd: '{tmp_path}' holds no run")
