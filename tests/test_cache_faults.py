"""Decoded images while they are made: killed, made twice at once, damaged, refused by the disk."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cached_photos import assert_same, make, settings, train_images
from made_images import sized_splits
from smkd.config.schema import DataConfig
from smkd.data import cache, cache_build
from smkd.data.cache import cached
from smkd.errors import DataError
from test_prepare_restart import wait_until_gone

pytestmark = pytest.mark.slow

FORK = multiprocessing.get_context("fork")
KILLS = 20


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """70 JPEGs of different sizes in the train split, so that two processes get some each."""
    return sized_splits(tmp_path / "photos")


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> list[str]:
    """What the folder of the caches holds, without the random parts."""
    return sorted("images" if entry.suffix == ".images" else entry.name for entry in folder.iterdir())


# ---- faults while the file is made


def build_in(config: DataConfig) -> None:
    os.setsid()  # its workers can be told by their group
    cached(train_images(config), config, "train")


def start(work: Callable[..., None], *given: Any) -> Any:
    process = FORK.Process(target=work, args=given)
    process.start()
    return process


def test_killed_at_random_moments_the_rerun_ends_the_same(tmp_path: Path) -> None:
    root = sized_splits(tmp_path / "photos", images=12, side=400)
    undisturbed, folder = settings(root, cache_dir=tmp_path / "whole"), tmp_path / "killed"
    started = time.monotonic()
    path = make(undisturbed).path
    taken = time.monotonic() - started
    assert path is not None
    config = settings(root, cache_dir=folder)
    rng = random.Random(0)
    kills = halves = 0
    while kills < KILLS:
        process = start(build_in, config)
        time.sleep(rng.uniform(0, 1.2 * taken))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            wait_until_gone(process.pid)
            halves += any(folder.glob("*.partial"))
        else:
            assert process.exitcode == 0
        done = list(folder.glob("*.images"))
        assert all(file_hash(file) == file_hash(path) for file in done), "there is never half a cache"
        if done:
            shutil.rmtree(folder)
    assert halves > KILLS / 4
    again = make(config).path
    assert again is not None
    assert file_hash(again) == file_hash(path)
    assert names(folder) == ["images", "lock"]


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_build_at_once_end_with_one_file(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    """With the lock one of them builds; without, the last rename puts the same bytes there."""
    config, built, build = settings(photos), tmp_path / "built", cache._build
    together = FORK.Barrier(3)

    def counted(*given: Any) -> None:
        with built.open("a") as file:
            file.write("x")
        build(*given)

    def work() -> None:
        images = train_images(config)
        together.wait()
        assert_same(cached(images, config, "train"), images)

    monkeypatch.setattr(cache, "_build", counted)
    if not locks:
        monkeypatch.setattr(cache_build, "_locked", lambda file: False)
    processes = [start(work) for _ in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (built.read_text() == "x") == locks
    assert names(photos / cache.FOLDER) == ["images", "lock"]


def cut(data: bytes) -> bytes:
    return data[:-1]


def cut_in_index(data: bytes) -> bytes:
    return data[:100]


def flip(place: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGES = {
    "cut": cut, "cut in the index": cut_in_index, "empty": lambda data: b"", "another file": lambda data: b"x" * 5000,
    "magic": flip(0), "key": flip(10), "count": flip(40), "index": flip(60),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_again(photos: Path, damage: str) -> None:
    path = make(settings(photos)).path
    assert path is not None
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    assert_same(make(settings(photos)), train_images(settings(photos, "none")))
    assert path.read_bytes() == whole


def test_damaged_pixels_are_not_trusted(photos: Path) -> None:
    images = make(settings(photos))
    assert images.path is not None
    whole = images.path.read_bytes()
    images.path.write_bytes(flip(len(whole) - 1)(whole))
    images = make(settings(photos))
    with pytest.warns(UserWarning, match=r"is damaged at image '.*013\.jpg'.*the next run makes the cache anew"):
        assert_same(images, train_images(settings(photos, "none")))
    path = make(settings(photos)).path
    assert path is not None
    assert path.read_bytes() == whole


# ---- a machine that refuses


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"data\.cache: cannot write '.*\.images': No space left on device; make room, choose another"),
        (errno.EDQUOT, r"quota exceeded; make room, choose another folder with data\.cache_dir=<folder>"),
        (errno.EACCES, r"data\.cache: cannot write '.*\.images': Permission denied; "),
        (errno.EROFS, r"Read-only file system"),
    ],
)
def test_a_disk_that_refuses_is_one_line(
    photos: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache_build._Decode, "_put", refuse)  # in a process of its own, where there are some
    with pytest.raises(DataError, match=message):
        make(settings(photos))
    assert names(photos / cache.FOLDER) == ["lock"]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind", ["memory", "mmap"])
def test_a_killed_worker_is_one_line(photos: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(cache, "default_jobs", lambda: 2)
    monkeypatch.setattr(cache_build._Decode, "_put", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match=r"data\.cache: a process that decodes images was killed \(out of memory\?\)"):
        make(settings(photos, kind))


def test_too_little_room_is_said_before_anything_is_decoded(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_build, "_fill", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"data\.cache: '.*' needs 0\.\d MB, 0\.0 MB are free; make room"):
        make(settings(photos))
    monkeypatch.setattr(cache_build, "free_memory", lambda: 1000)
    with pytest.raises(
        DataError, match=r"data\.cache=memory needs 0\.\d MB, 0\.0 MB are free; use data\.cache=mmap, or a smaller"
    ):
        make(settings(photos, "memory"))


def test_where_the_file_lies(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != photos and access(path, mode))
    assert make(settings(photos)).path.parent == tmp_path / "user" / "smkd"  # type: ignore[union-attr]
    monkeypatch.undo()
    assert make(settings(photos, cache_dir=tmp_path / "own")).path.parent == tmp_path / "own"  # type: ignore[union-attr]
    assert make(settings(photos)).path.parent == photos / ".smkd-cache"  # type: ignore[union-attr]
    # what is there is used, also where nothing can be written
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(cache, "_build", lambda *_: pytest.fail("made again"))
    assert make(settings(photos)).path.parent == photos / ".smkd-cache"  # type: ignore[union-attr]


def test_a_file_in_the_place_of_the_folder_is_named(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for wrong in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match=r"data\.cache: cannot write '.*file.*': a file is there .*data\.cache_dir"):
            make(settings(photos, cache_dir=wrong))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(DataError, match=r"cannot write '.*locked.*': Permission denied; .*data\.cache_dir"):
        make(settings(photos, cache_dir=tmp_path / "locked"))
