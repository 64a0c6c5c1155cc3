"""A disk that fills up, a folder that may not be written and one that goes away: one line, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from run_files import OUT, UNMEASURED, at_step, files, records, run, settings
from smkd.engine import checkpoint
from smkd.errors import SmkdError

pytestmark = pytest.mark.slow

WORDS = (UNMEASURED, "epochs=2", "log_every=1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Files and records of a run that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        run(*WORDS)
        return files(), records()


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@contextlib.contextmanager
def room(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: a write fails in its midst, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def one_line(error: pytest.ExceptionInfo[SmkdError]) -> str:
    said = str(error.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize("seed", range(8))
def test_a_disk_that_is_full_after_any_number_of_bytes(
    seed: int, finished: tuple[dict[str, bytes], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    largest = max(map(len, finished[0].values()))
    with contextlib.ExitStack() as stack:
        at_step(monkeypatch, rng.randrange(1, 6), lambda: stack.enter_context(room(rng.randrange(largest))))
        with pytest.raises(SmkdError) as error:
            run(*WORDS)
        assert "File too large" in one_line(error)
    for name in files():
        checkpoint.load_checkpoint(OUT / "checkpoints" / name)
    place = Path.cwd()  # undone too
    monkeypatch.undo()
    monkeypatch.chdir(place)
    run(*WORDS)
    assert (files(), records()) == finished


def test_a_run_whose_folder_goes_away(
    finished: tuple[dict[str, bytes], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 5, lambda: shutil.rmtree(OUT))
    with pytest.raises(SmkdError) as error:
        run(*WORDS)
    assert (
        one_line(error) == f"'{OUT}' is gone: it was removed or moved while the run wrote to it; nothing more is saved"
    )
    assert list(Path().iterdir()) == []
    run(*WORDS)
    assert (files(), records()) == finished


def test_checkpoints_that_go_away_are_written_again(
    finished: tuple[dict[str, bytes], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 5, lambda: shutil.rmtree(OUT / "checkpoints"))
    run(*WORDS)
    assert files().keys() == {"step-00000006.pt", "last.pt"}
    assert files()["last.pt"] == finished[0]["last.pt"]


def without_privilege() -> list[str]:
    """The beginning of a command line whose process heeds permissions, also where root starts it."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root heeds no permissions, and there is no setpriv here")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions are others here")
@pytest.mark.parametrize("closed", ["run", "run/checkpoints"])
def test_a_folder_that_may_no_longer_be_written(closed: str, tmp_path: Path) -> None:
    words = ["pretrain", "debug-pretrain", *settings(UNMEASURED), "epochs=2000", "save_minutes=1e-3"]
    line = [*without_privilege(), sys.executable, "-m", "smkd", *words]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(Path().glob("run/checkpoints/last-1.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    folders = [path for path in (Path(closed), *Path(closed).rglob("*")) if path.is_dir()]
    for path in folders:
        path.chmod(0o555)
    _, said = process.communicate(timeout=60)
    kept = {name: checkpoint.load_checkpoint(OUT / "checkpoints" / name)["step"] for name in files()}
    for path in folders:
        path.chmod(0o755)
    assert process.returncode == 2
    assert re.fullmatch(r"smkd: cannot write 'run/checkpoints/[^']*': Permission denied.*\n", said), said
    assert "last.pt" in kept
    assert not list(OUT.rglob("*.partial"))
