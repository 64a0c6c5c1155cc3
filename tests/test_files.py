"""Files and the machine: what is written is whole or not there, and what the disk refuses is one line."""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

import pytest

from smkd import files
from smkd.errors import CheckpointError, ConfigError, DataError
from smkd.files import expanded, explained, nearest, sha256, written_aside


def save(path: Path, text: str) -> None:
    with explained(path, DataError), written_aside(path) as aside:
        aside.write_text(text)


def test_what_is_written_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    save(path, "one")
    path.chmod(0o640)
    save(path, "two")
    assert path.read_text() == "two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [each.name for each in path.parent.iterdir()] == ["a.txt"]


def test_file_and_folder_are_synced_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted(number: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        fsync(number)

    def renamed(source: Path, target: Path) -> None:
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", renamed)
    save(tmp_path / "a", "x")
    assert order == ["file", "rename", "folder"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    save(path, "one")

    def broken() -> None:
        with explained(path, DataError), written_aside(path) as aside:
            aside.write_text("half")
            raise error

    with pytest.raises(error):
        broken()
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "one"


def test_two_at_once_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with written_aside(path) as first, written_aside(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"


def test_what_a_killed_process_left_is_removed_after_a_while(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with written_aside(path) as aside:
        old, fresh = aside.with_name(aside.name.replace("-", "-0")), aside.with_name(aside.name.replace("-", "-1"))
        other = aside.with_name("." + "0" * 8 + "-5.partial")
    for left in (old, fresh, other):
        left.touch()
    for left in (old, other):
        os.utime(left, (time.time() - 2 * files.LEFT,) * 2)
    save(path, "x")
    assert sorted(tmp_path.iterdir()) == sorted([path, fresh, other])


def test_links_devices_and_pipes(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    save(link, "through")
    assert link.is_symlink()
    assert target.read_text() == "through"
    save(Path("/dev/null"), "nothing")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    save(pipe, "words")
    assert os.read(reader, 10) == b"words"
    os.close(reader)


def test_a_folder_takes_new_files_in_and_keeps_others(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text in ("one", "two"):
        with written_aside(out, folder=True) as aside:
            (aside / "a").write_text(text)
        (out / "mine").write_text("kept")
    assert {each.name: each.read_text() for each in out.iterdir()} == {"a": "two", "mine": "kept"}


def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    save(tmp_path / ("n" * 255), "x")
    with pytest.raises(DataError, match="File name too long"):
        save(tmp_path / ("n" * 256), "x")


def test_what_the_disk_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"^cannot write '.*file.*': a file is there where a folder is needed"):
        save(tmp_path / "file" / "a", "x")
    with pytest.raises(DataError, match=r"^cannot write '.*folder': Is a directory$"):
        save(tmp_path / "folder", "x")


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "No space left on device"),
        (errno.EROFS, "Read-only file system"),
        (errno.EACCES, "Permission denied"),
        (errno.ENOENT, "its folder is not there"),
        (errno.EDQUOT, "[Qq]uota"),
    ],
)
def test_reasons(tmp_path: Path, number: int, reason: str) -> None:
    path = tmp_path / "a"
    path.touch()
    line = rf"^--json: cannot write '{path}': .*{reason}.*; make room; the file that was there is kept$"
    with (
        pytest.raises(CheckpointError, match=line),
        explained(path, CheckpointError, option="--json", advice="make room"),
    ):
        raise OSError(number, os.strerror(number), str(tmp_path / "x.partial"))


def test_a_disk_error_that_a_library_hid_is_found(tmp_path: Path) -> None:
    def hidden() -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            raise RuntimeError("unexpected pos 467008 vs 466900")

    with pytest.raises(DataError, match="No space left on device"), explained(tmp_path / "a", DataError):
        hidden()


def test_a_folder_that_vanishes_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "out" / "a"

    def vanishing() -> None:
        with explained(path, DataError), written_aside(path) as aside:
            aside.unlink()
            path.parent.rmdir()

    with pytest.raises(DataError, match=r"^cannot write '.*out/a': its folder is not there$"):
        vanishing()


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert expanded("~/runs") == Path("/home/ada/runs")
    assert expanded("a~/b") == Path("a~/b")
    with pytest.raises(ConfigError, match=r"^'~nobody-here/x': there is no user 'nobody-here' here; write the path in"):
        expanded("~nobody-here/x")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # a user id without an entry
    with pytest.raises(ConfigError, match="the home folder is not known"):
        expanded("~/x")


def test_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_nearest() -> None:
    assert nearest("KNNN", ["knn", "ridge"]) == "; did you mean 'knn'?"
    assert nearest("zzz", ["knn", "ridge"]) == ""
