"""KilledError, refused and repeated: what a prepare leaves, and that the next one ends the same."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from archives_made import IDENTITY, cifar_archive, cifar_parts, few
from smkd.errors import DataError
from smkd.prepare.build import Plan, Target, build_folder, chunks, read_journal
from smkd.prepare.cifar import plan_cifar
from smkd.prepare.manifest import Identity, manifest_hash, read_manifest
from smkd.prepare.writing import Item

KILLS = 20
PARTS = {"train": 8, "test": 2}
SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
from smkd.prepare.build import Target, build_folder
from smkd.prepare.cifar import plan_cifar
from smkd.prepare.registry import class_list
from smkd.prepare.manifest import Identity
archive, out, processes = sys.argv[1:]
entries = [replace(entry, images=10) for entry in class_list("cifar-fs")]
plan = plan_cifar(Path(archive), entries, {"train": 8, "test": 2})
target = Target(Path(out), Identity("cifar-fs", "1", "a rule", {}))
build_folder(target, plan, {}, int(processes), lambda done, total: None)
"""


def start(archive: Path, out: Path, processes: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SCRIPT, str(archive), str(out), str(processes)]
    return subprocess.Popen(command, start_new_session=True)


def members_of(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[2]) == group:
            found.append(int(entry.parent.name))
    return found


def wait_until_gone(group: int) -> None:
    deadline = time.monotonic() + 20
    while members_of(group):
        assert time.monotonic() < deadline, "workers outlive a killed prepare"
        time.sleep(0.01)


def wait_for_images(process: subprocess.Popen[bytes], out: Path) -> None:
    """Until one more image is there, or the process has ended."""
    journal = out / ".prepare" / "journal"
    before = journal.stat().st_size if journal.exists() else 0
    while process.poll() is None and not (journal.exists() and journal.stat().st_size > before):
        time.sleep(0.001)


@pytest.mark.slow
def test_killed_at_random_moments_the_rerun_ends_the_same(tmp_path: Path) -> None:
    archive, out = cifar_archive(tmp_path / "c.tar.gz", cifar_parts(PARTS)), tmp_path / "out"
    assert start(archive, tmp_path / "undisturbed", 1).wait() == 0
    undisturbed = manifest_hash(tmp_path / "undisturbed")
    rng = random.Random(0)
    kills = half_done = 0
    while kills < KILLS:
        process = start(archive, out, processes=1 + kills % 2)
        if kills % 5:
            wait_for_images(process, out)
        time.sleep(rng.uniform(0, 0.03 if kills % 5 else 0.4))
        process.kill()
        if process.wait() == -signal.SIGKILL:
            kills += 1
            wait_until_gone(process.pid)
            half_done += 0 < len(list(out.rglob("*.png"))) < 1000
            continue
        assert process.returncode == 0
        assert manifest_hash(out) == undisturbed
        shutil.rmtree(out)
    assert half_done > KILLS / 2
    for path in out.rglob("*.png"):
        with Image.open(path) as image:
            image.load()
    assert start(archive, out, processes=2).wait() == 0
    assert manifest_hash(out) == undisturbed
    assert sorted(entry.name for entry in out.iterdir()) == ["dataset.json", "test", "train", "val"]


def plan(tmp_path: Path) -> Plan:
    return plan_cifar(cifar_archive(tmp_path / "c.tar.gz", cifar_parts(PARTS)), few("cifar-fs", 10), PARTS)


def write(plan: Plan, out: Path, processes: int = 1, identity: Identity = IDENTITY, source: str = "a") -> None:
    build_folder(Target(out, identity), plan, {"archive": source}, processes, lambda done, total: None)


class KilledError(Exception):
    """Stands for a kill inside this process."""


def interrupted(plan: Plan, after: int) -> Plan:
    def items() -> Iterator[Item]:
        for number, item in enumerate(plan.items):
            if number == after:
                raise KilledError
            yield item

    return Plan(items(), plan.total)


def test_images_that_are_done_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KilledError):
        write(interrupted(plan(tmp_path), 700), out)
    done = {path: path.stat().st_ino for path in out.rglob("*.png")}
    assert 0 < len(done) <= 700
    journal = out / ".prepare" / "journal"
    assert len(read_journal(journal)) == len(done)
    with journal.open("a") as file:
        file.write("12\tcut")  # a line cut by the kill
    (out / ".prepare" / ".1.partial").write_bytes(b"half an image")
    write(plan(tmp_path), out)
    assert {path: path.stat().st_ino for path in done} == done
    write(plan(tmp_path), tmp_path / "other")
    assert manifest_hash(out) == manifest_hash(tmp_path / "other")


def test_another_source_or_setting_is_not_mixed_in(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KilledError):
        write(interrupted(plan(tmp_path), 700), out)
    with pytest.raises(DataError, match="was begun from another source; give that one, or delete the folder"):
        write(plan(tmp_path), out, source="b")
    with pytest.raises(DataError, match="was begun with other settings; repeat that command, or delete the folder"):
        write(plan(tmp_path), out, identity=Identity("fc100", "1", "a rule", {}))
    write(plan(tmp_path), out)
    with pytest.raises(DataError, match=r"holds cifar-fs \(version 1\), not fc100 \(version 1, size 480\); choose"):
        write(plan(tmp_path), out, identity=Identity("fc100", "1", "a rule", {"size": 480}))


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"already holds 'thesis\.txt'; give an empty or new folder with --out"):
        write(plan(tmp_path), out)
    with pytest.raises(DataError, match="is a file; give a folder"):
        write(plan(tmp_path), out / "thesis.txt")
    with pytest.raises(DataError, match=r"thesis\.txt.*': a file is there where a folder is needed"):
        write(plan(tmp_path), out / "thesis.txt" / "below")
    assert [entry.name for entry in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"cannot write '.*out/train': No space left on device; \d+ of 1000 images are done; make room"),
        (errno.EACCES, r"cannot write '.*out/train': Permission denied; \d+ of 1000 images are done"),
        (errno.EROFS, r"cannot write '.*out/train': Read-only file system; \d+ of 1000 images are done"),
    ],
)
def test_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str) -> None:
    out, count, replace = tmp_path / "out", 0, os.replace

    def refuse(source: str | Path, target: str | Path) -> None:
        nonlocal count
        count += str(target).endswith(".png")
        if count > 500:
            raise OSError(number, os.strerror(number), str(out / "train"))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(DataError, match=message):
        write(plan(tmp_path), out)
    monkeypatch.undo()
    assert not (out / "dataset.json").exists()
    write(plan(tmp_path), out)
    assert len(read_manifest(out).files) == 1000


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(KilledError):
        write(interrupted(plan(tmp_path), 700), out)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match=r"cannot write '.*out': No space left on device; make room"):
        write(plan(tmp_path), out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(DataError, match=r"cannot write '.*locked/out': Permission denied"):
        write(plan(tmp_path), tmp_path / "locked" / "out")


def test_a_source_that_shrinks_meanwhile_is_noticed(tmp_path: Path) -> None:
    whole = plan(tmp_path)
    shorter = Plan(list(whole.items)[:-1], whole.total)
    with pytest.raises(DataError, match="the source changed while it was read: 999 images came, 1000 expected"):
        write(shorter, tmp_path / "out")


def test_tasks_are_bounded_in_bytes_and_number() -> None:
    small = list(chunks(Item(str(i), b"x") for i in range(200)))
    assert [len(chunk) for chunk in small] == [64, 64, 64, 8]
    large = list(chunks(Item(str(i), bytes(3 << 20)) for i in range(5)))
    assert [len(chunk) for chunk in large] == [2, 2, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "field 'format' is missing"),
        ('{"format": 2}', "format 2, this version of smkd reads format 1"),
        ('{"format": 1, "name": "x"}', "field 'version' is missing"),
        ("[]", "missing or not of the right kind"),
    ],
)
def test_a_damaged_manifest_is_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=rf"dataset\.json.*{message}"):
        read_manifest(tmp_path)


def test_no_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.json' does not exist; make it with `smkd data prepare"):
        manifest_hash(tmp_path)
