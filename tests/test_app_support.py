"""Classes with their photographs: changes, files that cannot be taken, folders and zips."""

from __future__ import annotations

import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from made_images import photographs
from smkd.app import support as module
from smkd.app.support import START, Photo, Support, folder_classes, taken, zip_classes
from smkd.classify import Encoder, open_encoder
from smkd.errors import DataError


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return open_encoder("pixels")


def photo(name: str) -> Photo:
    return Photo(f"/place/{name}", np.zeros(3, np.float32))


def names(support: Support) -> list[str]:
    return [group.name for group in support.groups]


def test_classes_come_and_go() -> None:
    assert names(START) == ["class 1", "class 2"]
    support = START.renamed(1, "  owl \n eyes ").without_class(2).with_class()
    # a number is not used again while a later one is there, so a card keeps its class
    assert [(group.number, group.name) for group in support.groups] == [(1, "owl eyes"), (2, "class 2")]
    support = START.without_class(1).with_class()
    assert names(support) == ["class 2", "class 3"]
    assert names(support.with_photos(3, [photo("a")]).without_empty()) == ["class 3"]
    assert names(START) == ["class 1", "class 2"]


def test_photographs_of_a_class() -> None:
    support = START.with_photos(2, [photo("a"), photo("b")])
    assert [each.name for each in support.photos(2)] == ["a", "b"]
    assert support.photos(1) == support.photos(9) == ()
    more = support.with_class("class 2", [photo("b"), photo("c")])
    assert [each.name for each in more.photos(2)] == ["a", "b", "c"]
    assert support == START.with_photos(2, [photo("a"), photo("b")])
    with pytest.raises(DataError, match="more than 1000 photographs"):
        support.with_photos(1, [photo(str(number)) for number in range(999)])


def test_names_that_are_no_use() -> None:
    for name, line in (("  ", "needs a name"), ("class 2", "a class 'class 2' already")):
        with pytest.raises(DataError, match=line):
            START.renamed(1, name)
    assert START.renamed(1, "class 1") == START


def huge_png(path: Path, side: int) -> Path:
    """A PNG whose header alone is true."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))
    return path


def test_files_that_cannot_be_taken_are_one_line_each(encoder: Encoder, tmp_path: Path) -> None:
    good = sorted(photographs(tmp_path / "good", (2,)).rglob("*.png"))
    cut = tmp_path / "cut.png"
    cut.write_bytes(good[0].read_bytes()[:-200])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    large = [huge_png(tmp_path / "huge.png", 9_000), huge_png(tmp_path / "vast.png", 60_000)]
    others = [tmp_path / name for name in ("text.jpg", "empty.jpg", "none.jpg")]
    given = [good[0], cut, *large, good[1], *others, good[0]]
    photos, refused = taken(encoder, [str(path) for path in given])
    assert [each.path for each in photos] == [str(good[0]), str(good[1])]
    np.testing.assert_array_equal([each.feature for each in photos], encoder(good))
    assert len(refused) == 6
    assert not any("\n" in line or str(tmp_path) in line for line in refused)
    by_name = {name: line for name in ("cut.png", "text.jpg", "huge.png", "vast.png", "empty.jpg", "none.jpg")
               for line in refused if f"'{name}'" in line}  # fmt: skip
    assert "9000 x 9000 pixels; at most 64 million" in by_name["huge.png"]
    assert "too large" in by_name["vast.png"]
    assert "not an image" in by_name["text.jpg"]
    assert "the file is empty" in by_name["empty.jpg"]
    assert "No such file" in by_name["none.jpg"]
    assert "cannot read image" in by_name["cut.png"]


def test_what_has_been_read_is_not_read_again(encoder: Encoder, tmp_path: Path) -> None:
    paths = [str(path) for path in sorted(photographs(tmp_path / "good", (3,)).rglob("*.png"))]
    photos, _ = taken(encoder, paths[:2])
    for path in paths[:2]:
        Path(path).unlink()
    again, refused = taken(encoder, [paths[2], *paths[:2]], photos)
    assert [each.path for each in again] == [paths[2], *paths[:2]]
    assert refused == []


def zipped(folder: Path, file: Path, inside: str = "") -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, f"{inside}{path.relative_to(folder)}")
    return file


@pytest.mark.parametrize("inside", ["", "photos/", "my/photos/"])
def test_a_zip_of_class_folders(tmp_path: Path, inside: str) -> None:
    folder = photographs(tmp_path / "photos", (2, 3))
    expected = {path.name: [file.name for file in sorted(path.iterdir())] for path in sorted(folder.iterdir())}
    archive = zipped(folder, tmp_path / "a.zip", inside)
    with zipfile.ZipFile(archive, "a") as opened:
        for name in (f"__MACOSX/{inside}owl/._01.png", f"{inside}.hidden/a.png", f"{inside}notes.txt"):
            opened.writestr(name, b"else")
    place = tmp_path / "place"
    place.mkdir()
    found = zip_classes(archive, place).files
    assert {name: [Path(path).name for path in paths] for name, paths in found.items()} == expected
    unpacked = [path for path in place.rglob("*") if path.is_file()]
    assert len(unpacked) == 5
    for name, paths in found.items():
        assert [Path(path).read_bytes() for path in paths] == [
            (folder / name / Path(path).name).read_bytes() for path in paths
        ]


def test_zips_that_are_wrong_or_hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = photographs(tmp_path / "good", (2, 1))
    image = next(good.rglob("*.png")).read_bytes()

    def with_members(name: str, *members: str) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member in members:
                archive.writestr(member, image)
        return tmp_path / name

    (tmp_path / "text.zip").write_text("no zip")
    whole = zipped(good, tmp_path / "whole.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    wrong = {
        tmp_path / "text.zip": "'text.zip' is damaged, cut short or of another kind",
        tmp_path / "cut.zip": "'cut.zip' is damaged",
        with_members("out.zip", "../owl/a.png"): "leads out of the folder",
        with_members("flat.zip", "a.png", "b.png"): "holds no images",
        with_members("none.zip", "owl/a.txt"): "'none.zip' holds no images",
        with_members("tree.zip", "train/owl/a.png", "test/cat/b.png"): "tree of train, test; give one of them",
    }
    place = tmp_path / "place"
    place.mkdir()
    for archive, line in wrong.items():
        with pytest.raises(DataError, match=line) as caught:
            zip_classes(archive, place)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)
    assert not any(path.name == "a.png" for path in tmp_path.glob("owl/*"))
    monkeypatch.setattr(module, "MOST_PHOTOS", 2)
    with pytest.raises(DataError, match="holds 3 images; at most 2 are taken"):
        zip_classes(zipped(good, tmp_path / "many.zip"), place)


def test_folders(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos", (2, 1))
    found = folder_classes(folder).files
    assert [len(paths) for paths in found.values()] == [2, 1]
    assert all(Path(path).is_file() for paths in found.values() for path in paths)
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"class folder .*empty' holds no images"):
        folder_classes(folder)
    with pytest.raises(DataError, match="does not exist"):
        folder_classes(tmp_path / "none")
    with pytest.raises(DataError, match="is a file"):
        folder_classes(next(folder.rglob("*.png")))
    shutil.move(folder, tmp_path / "tree" / "train")
    with pytest.raises(DataError, match="is a tree of train"):
        folder_classes(tmp_path / "tree")
