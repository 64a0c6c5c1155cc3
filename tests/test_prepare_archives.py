"""Caltech-101 and Omniglot from small archives, and the command that prepares them."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from archives_made import build, caltech_members, caltech_zip, few, omniglot_zips, picture, write_tar, write_zip
from smkd.cli.data import data_app
from smkd.config.schema import DataConfig
from smkd.data.datasets import open_split
from smkd.errors import DataError
from smkd.prepare import caltech, omniglot
from smkd.prepare.archives import Bounds
from smkd.prepare.caltech import plan_caltech, repeats
from smkd.prepare.manifest import manifest_hash, read_manifest
from smkd.prepare.omniglot import plan_omniglot
from smkd.prepare.registry import class_list

SHARED = Path(__file__).parents[2] / "shared"
CALTECH = few("caltech101", 3, classes=2)
OMNIGLOT = few("omniglot", 2, classes=30)


def test_caltech_from_zip_and_tar(tmp_path: Path) -> None:
    folders = {entry.folder: 5 for entry in CALTECH}
    members = [
        (f"101_ObjectCategories/{folder}/image_{i:04}.jpg", picture(i)) for folder in folders for i in range(5, 0, -1)
    ]
    members += caltech_members({"BACKGROUND_Google": 2, "Faces_easy": 2}, b"x")
    repeated = {CALTECH[0].folder: {"image_0002.jpg"}}
    in_zip = plan_caltech(caltech_zip(tmp_path / "c.zip", members), CALTECH, repeated, most=3)
    digest = build(in_zip, tmp_path / "a")
    tar = write_tar(tmp_path / "101_ObjectCategories.tar.gz", members)
    assert build(plan_caltech(tar, CALTECH, repeated, most=3), tmp_path / "b", processes=2) == digest
    for entry, numbers in zip(CALTECH, [(1, 3, 4), *[(1, 2, 3)] * 5], strict=True):
        found = {path.name: path.read_bytes() for path in (tmp_path / "a" / entry.split / entry.folder).iterdir()}
        assert found == {f"image_{i:04}.jpg": picture(i) for i in numbers}


def test_caltech_chooses_the_documented_images() -> None:
    folder = SHARED / "data" / "caltech101-fs"
    if not folder.is_dir():
        pytest.skip("no shared data here")
    for entry in class_list("caltech101"):
        kept = sorted(path.name for path in (folder / entry.split / entry.folder).iterdir())
        assert len(kept) == entry.images <= caltech.MOST
        assert not set(kept) & repeats().get(entry.folder, set())
        # numbers run from 1 without gaps, so whatever is missing below the last one was a repeat
        last = int(kept[-1][6:10])
        assert last - len(kept) == sum(int(name[6:10]) < last for name in repeats().get(entry.folder, set()))


def enough_images() -> dict[str, int]:
    """A number of images of each class of which, repeats left out, as many remain as of the true one."""
    numbers = {}
    for entry in class_list("caltech101"):
        repeated = repeats().get(entry.folder, set())
        numbers[entry.folder] = max([entry.images + len(repeated), *(int(name[6:10]) for name in repeated)])
    return numbers


@pytest.mark.slow
def test_the_command_prepares_what_training_reads(tmp_path: Path) -> None:
    archive = caltech_zip(tmp_path / "caltech-101.zip", caltech_members(enough_images(), picture()))
    out = tmp_path / "data" / "caltech101"
    command = ["prepare", "caltech101", "--out", str(out), "--archive", str(archive), "--processes", "2"]
    result = CliRunner().invoke(data_app, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output == f"prepared caltech101 in {out} (dataset.json sha256 {manifest_hash(out)})\n"
    for split, (classes, images) in {"train": (64, 4011), "val": (16, 957), "test": (20, 1316)}.items():
        opened = open_split(DataConfig(dataset="caltech101", root=out), split)
        assert (len(opened.class_names), len(opened)) == (classes, images)
        assert opened.load(0).shape == (3, 14, 20)
    archive.unlink()  # what is finished needs no archive
    again = CliRunner().invoke(data_app, command, catch_exceptions=False)
    assert again.output == result.output


def test_caltech_refuses_other_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = caltech_members({entry.folder: 3 for entry in CALTECH[1:]}, b"x")
    with pytest.raises(DataError, match=f"lacks 1 of the 6 classes of Caltech-101: {CALTECH[0].folder}$"):
        plan_caltech(caltech_zip(tmp_path / "a.zip", members), CALTECH, {})
    members += caltech_members({CALTECH[0].folder: 2}, b"x")
    with pytest.raises(DataError, match=f"2 images of class '{CALTECH[0].folder}' remain, expected 3"):
        plan_caltech(caltech_zip(tmp_path / "a.zip", members), CALTECH, {})
    with pytest.raises(DataError, match=r"holds no 101_ObjectCategories\.tar\.gz; caltech-101\.zip"):
        plan_caltech(write_zip(tmp_path / "a.zip", [("x", b"")]), CALTECH, {})
    hostile = tarfile.TarInfo("101_ObjectCategories/anchor/image_0001.jpg")
    hostile.type, hostile.linkname = tarfile.SYMTYPE, "../../../etc/passwd"
    with pytest.raises(DataError, match=r"a\.zip: caltech-101/101_.*' -> '.*passwd' leads out of the folder"):
        plan_caltech(caltech_zip(tmp_path / "a.zip", [(hostile, b"")]), CALTECH, {})
    monkeypatch.setattr(caltech, "CALTECH_BOUNDS", Bounds(member=1 << 20, total=1 << 20))
    bomb = [(f"101_ObjectCategories/anchor/image_{i:04}.jpg", bytes(1 << 19)) for i in range(4)]
    with pytest.raises(DataError, match="holds more than 1 MiB; refused"):
        plan_caltech(caltech_zip(tmp_path / "a.zip", bomb), CALTECH, {})


def test_omniglot(tmp_path: Path) -> None:
    zips = omniglot_zips(tmp_path, OMNIGLOT)
    digest = build(plan_omniglot(zips, OMNIGLOT), tmp_path / "a")
    assert build(plan_omniglot(zips[::-1], OMNIGLOT), tmp_path / "b", processes=2) == digest
    files = read_manifest(tmp_path / "a").files
    folders = Counter(name.rsplit("/", 1)[0] for name in files)
    assert folders == {f"{entry.split}/{entry.folder}": 2 for entry in OMNIGLOT}
    first = OMNIGLOT[0]
    path = tmp_path / "a" / first.split / first.folder / "0000_02.png"
    assert path.read_bytes() == picture(1, (15, 15), "PNG", "1")


def zip_link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


HOSTILE = {
    "climbs": ("images_background/../../x", "leads out of the folder; refused"),
    "absolute": ("/x", "leads out of the folder; refused"),
    "backslashes": ("..\\x", "leads out of the folder; refused"),
    "link": (zip_link("images_background/x"), "is a link; refused"),
}


@pytest.mark.parametrize(("member", "message"), HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_zips_are_refused(tmp_path: Path, member: str | zipfile.ZipInfo, message: str) -> None:
    archive = write_zip(tmp_path / "a.zip", [(member, b"../../x")])
    with pytest.raises(DataError, match=message):
        plan_omniglot([archive], OMNIGLOT)
    assert os.listdir(tmp_path) == ["a.zip"]


def test_zip_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "images_background/Greek/character01/0394_{}.png"
    archive = write_zip(tmp_path / "a.zip", [(name.format(1), bytes(2 << 20))])
    with pytest.raises(DataError, match="would take 2 MiB, the bound is 1 MiB; refused"):
        plan_omniglot([archive], OMNIGLOT)
    monkeypatch.setattr(omniglot, "OMNIGLOT_BOUNDS", Bounds(member=1 << 20, total=1 << 20))
    archive = write_zip(tmp_path / "a.zip", [(name.format(i), bytes(1 << 19)) for i in range(3)])
    with pytest.raises(DataError, match="holds more than 1 MiB; refused"):
        plan_omniglot([archive], OMNIGLOT)


def test_omniglot_refuses_other_archives(tmp_path: Path) -> None:
    zips = omniglot_zips(tmp_path, OMNIGLOT)
    with pytest.raises(DataError, match="no archive holds images_evaluation/; give both"):
        plan_omniglot(zips[:1], OMNIGLOT)
    with pytest.raises(DataError, match="is not of Omniglot"):
        plan_omniglot([write_zip(tmp_path / "x.zip", [("a.png", b"x")])], OMNIGLOT)
    (tmp_path / "y.zip").write_bytes(zips[0].read_bytes()[:-100])
    with pytest.raises(DataError, match="is damaged, cut short or of another kind"):
        plan_omniglot([tmp_path / "y.zip"], OMNIGLOT)
    with pytest.raises(DataError, match="hold 2 images of class 'Alphabet_of_the_Magi-character01', expected 3"):
        plan_omniglot(zips, few("omniglot", 3, classes=30))
    with pytest.raises(DataError, match="which is no character of Omniglot"):
        plan_omniglot(zips, OMNIGLOT[1:])


def test_a_member_that_lies_about_its_bytes_is_refused(tmp_path: Path) -> None:
    zips = omniglot_zips(tmp_path, OMNIGLOT)
    data = bytearray(zips[0].read_bytes())
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        info = file.infolist()[0]
    at = info.header_offset + 30 + len(info.filename) + 8
    data[at : at + 8] = bytes(8)
    zips[0].write_bytes(data)
    with pytest.raises(DataError, match="is damaged, cut short or of another kind"):
        build(plan_omniglot(zips, OMNIGLOT), tmp_path / "out")
