"""`smkd data`: list, info, and what prepare refuses before it does anything."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from archives_made import (
    PARTS,
    cifar_archive,
    few,
    ilsvrc_folder,
    ilsvrc_photos,
    mini_lists,
    mini_pickles,
    omniglot_zips,
)
from smkd.cli.data import data_app
from smkd.errors import DataError
from smkd.prepare import registry
from smkd.prepare import run as command
from smkd.prepare.manifest import manifest_hash, read_manifest
from smkd.prepare.registry import BENCHMARKS, ClassEntry, Download
from smkd.prepare.run import PrepareRequest, prepare


def run(*words: str) -> str:
    result = CliRunner().invoke(data_app, words, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_list_names_every_data_set() -> None:
    lines = run("list").splitlines()
    assert [line.split()[0] for line in lines] == list(BENCHMARKS)
    assert "351/97/160 classes, 779,165 images" in lines[1]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_info_says_where_from_and_on_which_terms(name: str) -> None:
    text, facts = run("info", name), BENCHMARKS[name]
    assert facts.licence in text
    assert all(download.url in text and download.page in text for download in facts.downloads)
    assert f"{facts.counts['val'].images:,} images" in text


REFUSED = {
    "unknown": (["cifarfs"], "unknown data set 'cifarfs'; did you mean 'cifar-fs'"),
    "archive for a source": (["mini-imagenet", "--archive", "x"], "--archive does not apply to mini-imagenet, which"),
    "size of cifar": (["cifar-fs", "--size", "84"], "--size does not apply to cifar-fs, which takes --archive$"),
    "link of mini": (["mini-imagenet", "--source", "x", "--link"], "--link does not apply to mini-imagenet"),
    "no source": (["tiered-imagenet"], "tiered-imagenet needs --source: ILSVRC-12 train folder or"),
    "one of two": (["omniglot", "--archive", "x"], "omniglot needs 2 --archive, 1 given"),
    "absent archive": (["fc100", "--archive", "absent.tar.gz"], r"archive 'absent\.tar\.gz' does not exist"),
    "absent source": (["mini-imagenet", "--source", "absent"], "'absent' does not exist"),
    "words for a size": (["mini-imagenet", "--source", "x", "--size", "big"], "--size big: give a number of pixels"),
    "tiny size": (["mini-imagenet", "--source", "x", "--size", "2"], "--size 2: give 8 to 4096 pixels, or 'original'"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=list(REFUSED))
def test_prepare_refuses(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        run("prepare", *words, "--out", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused_before_any_download(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(DataError, match=r"already holds 'photo\.jpg'"):
        prepare(PrepareRequest("cifar-fs", tmp_path), lambda *_: None, pytest.fail)


Small = Callable[..., list[ClassEntry]]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Small:
    """Makes a data set small: fewer images a class, and so many classes of each split."""

    def make(name: str, images: int, classes: int | None = None) -> list[ClassEntry]:
        entries = few(name, images, classes)
        monkeypatch.setattr(registry, "class_list", lambda _: tuple(entries))
        monkeypatch.setattr(command, "ilsvrc_counts", lambda: {entry.folder: images + 2 for entry in entries})
        monkeypatch.setattr(command, "known_pairs", dict)
        monkeypatch.setattr(command, "read_lists", partial(command.read_lists, digests={}))
        monkeypatch.setattr(command, "plan_cifar", partial(command.plan_cifar, part_sizes=PARTS))
        return entries

    return make


def prepared(out: Path, *words: str) -> str:
    """Run it twice: the second time nothing is left to do."""
    result = CliRunner().invoke(data_app, ["prepare", *words, "-o", str(out)], catch_exceptions=False)
    again = CliRunner().invoke(data_app, ["prepare", *words, "-o", str(out)], catch_exceptions=False)
    assert result.stdout == again.stdout == f"prepared {words[0]} in {out} (dataset.json sha256 {manifest_hash(out)})\n"
    return result.stderr


def test_mini_imagenet_is_480_pixels_unless_asked(tmp_path: Path, small: Small) -> None:
    entries = small("mini-imagenet", 2, classes=1)
    source = ilsvrc_folder(tmp_path / "train", ilsvrc_photos(entries, 4))
    lists = mini_lists(tmp_path / "lists", entries, (1, 3))
    words = ("mini-imagenet", "--source", str(source), "--lists", str(lists), "--processes", "1")
    for out, extra, size in (
        ("a", (), (480, 480)),
        ("b", ("--size", "original"), (30, 20)),
        ("c", ("--size", "99"), (99, 99)),
    ):
        assert prepared(tmp_path / out, *words, *extra) == ""
        with Image.open(tmp_path / out / "train" / entries[0].folder / f"{entries[0].folder}00000001.jpg") as image:
            assert image.size == size
    assert read_manifest(tmp_path / "c").identity.options == {"from": "ILSVRC-12", "size": 99}
    with pytest.raises(
        DataError, match=r"holds mini-imagenet \(version 1, from ILSVRC-12, size 480\), not mini-imagenet"
    ):
        prepared(tmp_path / "a", *words, "--size", "99")


def test_a_small_copy_is_prepared_with_a_warning(tmp_path: Path, small: Small) -> None:
    mini_pickles(tmp_path / "copy", small("mini-imagenet", 2, classes=1), 84, python2=True)
    told = prepared(tmp_path / "out", "mini-imagenet", "--source", str(tmp_path / "copy"), "--processes", "1")
    assert told.startswith(f"warning: '{tmp_path / 'copy'}' holds images of 84 pixels, too small for crops of 224")
    assert read_manifest(tmp_path / "out").identity.options == {"from": "a copy (pickles)", "size": "original"}


def test_tiered_imagenet_with_links(tmp_path: Path, small: Small) -> None:
    entries = small("tiered-imagenet", 3, classes=1)
    source = ilsvrc_folder(tmp_path / "train", ilsvrc_photos(entries, 3))
    prepared(tmp_path / "out", "tiered-imagenet", "--source", str(source), "--link", "--processes", "1")
    file = next((source / entries[0].folder).iterdir())
    assert file.samefile(tmp_path / "out" / "train" / entries[0].folder / file.name)


def test_omniglot_from_two_archives(tmp_path: Path, small: Small) -> None:
    zips = omniglot_zips(tmp_path, small("omniglot", 2, classes=3))
    archives = [word for path in zips for word in ("--archive", str(path))]
    prepared(tmp_path / "out", "omniglot", *archives, "--processes", "1")
    assert len(read_manifest(tmp_path / "out").files) == 18


def test_downloads_lie_beside_the_folder(tmp_path: Path, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cifar_archive(tmp_path / "made.tar.gz")

    def fetch(download: Download, folder: Path, _: object) -> Path:
        return Path(shutil.copy(made, folder / download.name))

    monkeypatch.setattr(command, "fetch_file", fetch)
    for name in ("cifar-fs", "fc100"):
        small(name, 6)
        prepared(tmp_path / name, name, "--processes", "1")
    assert sorted(entry.name for entry in tmp_path.glob("*cifar*")) == ["cifar-100-python.tar.gz", "cifar-fs"]


def test_the_module_is_light_to_import() -> None:
    code = "import sys, smkd.cli.data, smkd.prepare.writing; print('torch' in sys.modules, 'numpy' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["False", "False"]
