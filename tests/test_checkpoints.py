"""Files of a run that are damaged, missing or half written: what is noticed, and from where the run goes on."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from run_files import OUT, STEPS, files, records, run, same
from smkd import api
from smkd.engine import checkpoint
from smkd.errors import CheckpointError, ConfigError, DataError
from smkd.viz.curves import read_metrics

pytestmark = pytest.mark.slow


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


HURT = [damage, empty, Path.unlink]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of three epochs lies that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run()
    return folder


@pytest.fixture
def whole(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Checkpoints of the finished run, of which a copy is below the working folder."""
    shutil.copytree(finished / OUT, tmp_path / OUT)
    monkeypatch.chdir(tmp_path)
    return files()


@pytest.fixture
def cut(whole: dict[str, bytes]) -> dict[str, bytes]:
    """The same, but the copy is as it was after two of the three epochs."""
    folder = OUT / "checkpoints"
    (folder / f"step-{3 * STEPS:08d}.pt").unlink()
    (folder / "last-1.pt").replace(folder / "last.pt")
    shutil.copyfile(folder / f"step-{STEPS:08d}.pt", folder / "last-1.pt")
    assert checkpoint.load_checkpoint(folder / "last.pt")["epoch"] == 2
    return whole


def test_every_damage_is_noticed_or_harmless(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {
        "student": {"a": torch.randn(3000), "zero": torch.zeros(5000), "b": torch.randn(30, 30)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "step": 3, "classes": ["a", "b"],
    }  # fmt: skip
    path = tmp_path / "a.pt"
    checkpoint.save_checkpoint(state, path)
    right, content = checkpoint.load_checkpoint(path), path.read_bytes()
    rng = random.Random(0)

    def flipped() -> bytes:
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(changed)

    def zeroed() -> bytes:
        start = rng.randrange(len(content) - 4096)
        return content[:start] + bytes(4096) + content[start + 4096 :]

    # one of the attributes of an archive's part makes PyTorch skip it and leave a tensor's memory as it was
    folder = bytearray(content)
    folder[content.index(b"PK\x01\x02") + 38] ^= 0x10
    messages = []
    damaged = [flipped() for _ in range(100)] + [zeroed() for _ in range(20)]
    cuts = [content[: rng.randrange(len(content))] for _ in range(20)]
    for changed in (*damaged, *cuts, bytes(folder)):
        path.write_bytes(changed)
        try:
            read = checkpoint.load_checkpoint(path)
        except CheckpointError as error:
            messages.append(str(error))
        else:
            assert same(read, right)
    assert all(str(path) in message and "\n" not in message for message in messages)
    assert len(messages) > 100  # the rest fell between the parts


@pytest.mark.parametrize("hurt", HURT)
@pytest.mark.parametrize("names", [["last.pt"], ["last.pt", "last-1.pt"]], ids=["last", "last-two"])
def test_the_run_goes_on_from_the_state_before(
    cut: dict[str, bytes], names: list[str], hurt: Callable[[Path], None], finished: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in names:
        hurt(OUT / "checkpoints" / name)
    run()
    assert "there is no whole last.pt; going on from" in capsys.readouterr().out
    assert {name: content for name, content in files().items() if not name.endswith(".damaged")} == cut
    mine = records()
    os.chdir(finished)
    assert mine == records()


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Other content under checksums that fit."""
    state = torch.load(path)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["student"]["backbone.norm.weight"].fill_(torch.nan),
        lambda state: state.pop("optimizer"),
        lambda state: next(iter(state["optimizer"]["state"].values()))["exp_avg"].fill_(torch.nan),
        lambda state: next(iter(state["optimizer"]["state"].values())).pop("exp_avg_sq"),
        lambda state: state["optimizer"]["param_groups"].pop(),
        lambda state: state["optimizer"].clear(),
        lambda state: state.update(guards=[{"row": "x", "pending": []}]),
        lambda state: state.update(step_in_epoch=1),
        lambda state: state.update(data={"classes": 3}),
    ],
    ids=[
        "not-finite",
        "missing",
        "moment-nan",
        "moment-missing",
        "groups",
        "optimizer-empty",
        "guards",
        "meters",
        "data",
    ],
)
def test_content_that_cannot_be_right_is_damage_too(
    cut: dict[str, bytes], change: Callable[[dict[str, Any]], object], capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(OUT / "checkpoints" / "last.pt", change)
    run()
    assert "it is 'last.pt.damaged' now" in capsys.readouterr().out
    assert {name: content for name, content in files().items() if not name.endswith(".damaged")} == cut


def test_damaged_records_are_named_and_dropped(cut: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    path, before = OUT / "metrics.jsonl", records()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "tra')  # being written
    assert [record["epoch"] for record in read_metrics(OUT, "epoch")] == [1, 2, 3]
    lines = whole.splitlines(keepends=True)
    for damaged in (b"\xff\x00\n", b"3\n", b'{"kind": "train"\n'):
        path.write_bytes(lines[0] + damaged + b"".join(lines[1:]))
        with pytest.raises(DataError, match=r"metrics\.jsonl', line 2: no JSON object"):
            read_metrics(OUT, "epoch")
    run()
    assert "run/metrics.jsonl: 1 damaged lines were dropped" in capsys.readouterr().out
    assert records() == before
    with pytest.raises(DataError, match="cannot read"):
        read_metrics(Path("nowhere"), "epoch")


def test_no_new_start_over_checkpoints_that_cannot_be_read(whole: dict[str, bytes]) -> None:
    for name in whole:
        damage(OUT / "checkpoints" / name)
    before = files()
    with pytest.raises(CheckpointError, match=r"'run': none of its 6 checkpoints can be read"):
        run()
    assert files() == before
    (OUT / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"holds other things \('checkpoints'\) and no run"):
        run()
    assert files() == before


def test_checkpoints_are_files_of_their_own(whole: dict[str, bytes]) -> None:
    assert sorted(whole) == ["best.pt", "last-1.pt", "last.pt", *(f"step-{k * STEPS:08d}.pt" for k in (1, 2, 3))]
    assert all(path.stat().st_nlink == 1 for path in (OUT / "checkpoints").iterdir())


@pytest.mark.parametrize("hurt", HURT)
def test_a_lost_best_state_is_written_again(cut: dict[str, bytes], hurt: Callable[[Path], None]) -> None:
    hurt(OUT / "checkpoints" / "best.pt")
    run()
    assert files() == cut


def test_what_a_killed_process_left_is_swept(cut: dict[str, bytes]) -> None:
    for name in (".last.pt.partial", ".last.pt.elsewhere.123.partial"):
        (OUT / "checkpoints" / name).write_bytes(b"half")
    (OUT / ".config.yaml.elsewhere.123.partial").write_bytes(b"half")
    run()
    assert files() == cut
    assert not list(OUT.glob(".*"))


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_states_stay_as_asked_for(cut: dict[str, bytes], keep: int) -> None:
    run(f"keep={keep}")
    left = sorted(path.name for path in (OUT / "checkpoints").glob("last*.pt"))
    assert left == (["last-1.pt", "last-2.pt", "last.pt"] if keep > 1 else ["last.pt"])
    epochs = {name: checkpoint.load_checkpoint(OUT / "checkpoints" / name)["epoch"] for name in left}
    assert epochs == ({"last.pt": 3, "last-1.pt": 2, "last-2.pt": 1} if keep > 1 else {"last.pt": 3})


def test_every_few_epochs_a_state_stays_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("epochs=5", "save_every=2", "keep=1", "validation.every=0")
    assert sorted(files()) == ["last.pt", f"step-{2 * STEPS:08d}.pt", f"step-{4 * STEPS:08d}.pt"]


@pytest.mark.parametrize("times", [1, 2])
def test_an_error_that_goes_away_is_no_damage(
    cut: dict[str, bytes], times: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch raises the end of a loading process in whatever the main thread is doing."""
    real, count = torch.load, 0

    def disturbed(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count <= times:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")
        return real(*args, **options)

    monkeypatch.setattr(torch, "load", disturbed)
    run()
    assert ("it is 'last.pt.damaged' now" in capsys.readouterr().out) == (times == 2)
    assert {name: content for name, content in files().items() if not name.endswith(".damaged")} == cut


def test_what_may_not_be_read_is_not_called_damaged(cut: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = files(), Path.open

    def refused(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "last.pt":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refused)
        with pytest.raises(CheckpointError, match=r"^cannot read 'run/checkpoints/last\.pt': Permission denied$"):
            run()
    assert files() == before


@pytest.mark.parametrize("at", range(1, 13, 3))
def test_a_kill_while_files_change_places_loses_nothing(
    cut: dict[str, bytes], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third epoch's end, stopped before some of the changes of names that it makes."""
    changes = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **options: Any) -> Any:
            nonlocal changes
            changes += 1
            if changes == at:
                raise KeyboardInterrupt
            return real(*args, **options)

        return change

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "link"), (os, "unlink"), (torch, "save")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            run()
        except KeyboardInterrupt:
            assert (OUT / "checkpoints" / "last.pt").is_file()
        else:
            assert changes < at
    run()
    assert files() == cut


def test_overwrite_replaces_once_and_then_goes_on(whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    run("seed=1", "overwrite=true", "epochs=1")
    first = checkpoint.load_checkpoint(OUT / "checkpoints" / "last.pt")
    assert sorted(files()) == ["best.pt", "last.pt", f"step-{STEPS:08d}.pt"]
    before = (OUT / "checkpoints" / "last.pt").stat().st_mtime_ns
    run("seed=1", "overwrite=true", "epochs=1")
    assert (OUT / "checkpoints" / "last.pt").stat().st_mtime_ns == before
    assert first["config"]["seed"] == 1


HOLDER = """
import sys, time
from pathlib import Path
from smkd.engine.run_folder import held
with held(Path("run"), print):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_starts_on_one_folder(whole: dict[str, bytes]) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for _ in range(20):
            with pytest.raises(ConfigError, match=rf"'run' is being written by process {holder.pid} on \S+; wait"):
                run("epochs=4")
        assert api.load(OUT)  # reading is free
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    # the lock went with the process, killed as it was
    run()
    assert files() == whole
    assert not (OUT / ".lock").exists()


def test_a_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save_checkpoint({"epoch": 1}, path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    monkeypatch.setattr("torch.save", lambda *_: pytest.fail("must not start"))
    with pytest.raises(CheckpointError, match=r"No space left.* 4,000,000 bytes are needed and.* are free.*kept"):
        checkpoint.save_checkpoint({"a": torch.zeros(10**6)}, path)
    assert checkpoint.load_checkpoint(path)["epoch"] == 1
