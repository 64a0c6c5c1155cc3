"""Processes that do not see the same folder, or not the same state in it, end with one line."""

from __future__ import annotations

import re
import socket
from functools import partial
from pathlib import Path

import pytest

from process_groups import join_group, run_processes
from smkd import api
from smkd.engine import agreement, checkpoint, run_folder
from smkd.engine.train import train
from smkd.errors import ConfigError

pytestmark = pytest.mark.slow

WORDS = ("accelerator=cpu", "batch_size=8", "data.limit_per_class=1", "validation.every=0")
CASES = ("fresh", "other folder", "other state")


def run(out: Path, devices: int, epochs: int) -> None:
    train(api.resolve("debug-pretrain", [f"out={out}", f"devices={devices}", f"epochs={epochs}", *WORDS]))


def work(rank: int, ports: list[int], folder: str) -> None:
    """One of two processes, which says how each case ended for it."""
    agreement.PATIENCE = 0.2
    said = []
    for port, case in zip(ports, CASES, strict=True):
        out = Path(folder) / case
        if case != "other state":
            out = out / str(rank)
        elif rank == 1:  # as a machine that still sees an older file
            older = run_folder.newest(Path(folder) / "older")
            pytest.MonkeyPatch().setattr(run_folder, "newest", partial(lambda found, _: found, older))
        join_group(port, rank, 2)
        try:
            run(out, 2, 3)
            said.append("it ran")
        except ConfigError as error:
            said.append(str(error))
    (Path(folder) / f"{rank}.txt").write_text("\n".join(said))


def test_processes_that_see_other_things_end_with_one_line(tmp_path: Path) -> None:
    for out, epochs in ((tmp_path / "other folder" / "0", 1), (tmp_path / "older", 1), (tmp_path / "other state", 2)):
        run(out, 1, epochs)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pt")}
    assert run_processes(work, 2, len(CASES), str(tmp_path)) == [0, 0]
    said = [(tmp_path / f"{rank}.txt").read_text().splitlines() for rank in range(2)]
    host = re.escape(socket.gethostname())
    missing = rf"^the run folder is not shared between machines: process 1 on {host} sees no '.*', which process 0 on"
    for lines in said:
        assert re.match(missing, lines[0])
        assert re.match(missing, lines[1])
        assert re.match(
            rf"^the processes see different states of the run: process 1 on {host} sees '.*older/checkpoints/last\.pt' "
            rf"of step 8 \(content \w{{8}}\), process 0 on {host} '.*other state/checkpoints/last\.pt' of step 16",
            lines[2],
        )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pt")} == before
    assert not (tmp_path / "fresh").exists(), "nothing is left of a run that never began"


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    run(tmp_path / "run", 1, 1)
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    state = checkpoint.load_checkpoint(path)
    digests = []
    for best in (1.0, 1.0, 2.0):
        checkpoint.save_checkpoint({**state, "best": best}, path)
        found = run_folder.newest(tmp_path / "run")
        digests.append(agreement._start(found).digest)
    assert digests[0] == digests[1] != digests[2]
