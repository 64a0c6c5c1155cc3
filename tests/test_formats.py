"""Which files count as images, everywhere alike: by suffix, hidden ones left out, links followed, the rest named."""

from __future__ import annotations

import os
import re
import tarfile
import types
import unicodedata
import warnings
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from image_forms import add, encoded
from smkd.app.support import zip_classes
from smkd.classify.pictures import listed_images, support_images
from smkd.cli import main
from smkd.data import formats
from smkd.data.datasets import dataset_spec
from smkd.data.images import FolderImages
from smkd.data.sources import open_dataset
from smkd.data.verify import verify
from smkd.errors import DataError, SmkdWarning
from smkd.prepare.mini_copies import _by_folder

SEVERAL = (
    "a.jfif",
    "b.JPE",
    "c.gif",
    "d.avif",
    "e.pgm",
    "f.pbm",
    "g.tga",
    "h.jp2",
    "i.jpg",
    "j.tiff",
    "k.bmp",
    "l.webp",
)
HIDDEN = (
    "._a.jpg", ".ipynb_checkpoints/a.jpg", ".thumbnails/a.jpg", "@eaDir/a.jpg", "__MACOSX/._a.jpg", "Thumbs.db",
    "#recycle/a.jpg", "$RECYCLE.BIN/a.jpg", "System Volume Information/a.jpg", "lost+found/a.jpg", "Icon\r",
)  # fmt: skip
FOREIGN = ("x.heic", "y.HEIF", "z.cr2", "w.jxl")


@pytest.fixture(autouse=True)
def _without_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PLUGINS", ())


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(0, 0))
    return root


def three_classes(root: Path, *names: str) -> Path:
    """Class folders ant, bee and cat, each with these files."""
    return put(root, *(f"{name}/{file}" for name in ("ant", "bee", "cat") for file in names))


def zipped(folder: Path, mark: str = "/") -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                info = zipfile.ZipInfo("a")
                info.filename = str(file.relative_to(folder)).replace("/", mark)  # as some Windows programs write it
                archive.writestr(info, file.read_bytes())
    return path


def tarred(folder: Path) -> Path:
    (folder.parent / "shards").mkdir()
    with tarfile.open(folder.parent / "shards" / "a.tar", "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                add(archive, f"./{file.relative_to(folder)}", file.read_bytes())
    return folder.parent / "shards"


def found_everywhere(root: Path, place: Path) -> dict[str, list[str]]:
    """Names of the images of `root/ant` by each road."""
    place.mkdir()
    source, shards = open_dataset(root, split_by="images"), open_dataset(tarred(root), split_by="images")
    whole = {
        "data set": source.whole(),
        "shards": shards.whole(),
        "folder": FolderImages(root),
        "fit": support_images(root),
    }
    names = {
        road: [images.name(n) for n in range(len(images)) if images.class_names[images.labels[n]] == "ant"]
        for road, images in whole.items()
    }
    names["predict"] = [str(path) for path in listed_images([root / "ant"])]
    names["zip"] = zip_classes(zipped(root), place).files["ant"]
    names["copies"] = [str(path) for path in _by_folder(root)["ant"]]
    return {road: sorted(os.path.basename(name) for name in of_road) for road, of_road in names.items()}


@pytest.mark.filterwarnings("error")
def test_every_road_takes_the_same_suffixes_and_no_hidden_file(tmp_path: Path) -> None:
    root = three_classes(tmp_path / "d", *SEVERAL, *HIDDEN)
    put(root, *HIDDEN)
    found = found_everywhere(root, tmp_path / "place")
    assert {tuple(names) for names in found.values()} == {tuple(sorted(SEVERAL))}, found
    assert formats.class_folders(root) == ["ant", "bee", "cat"]


def test_every_road_names_what_pillow_cannot_read(tmp_path: Path) -> None:
    root = three_classes(tmp_path / "d", "a.jpg", "b.png", "c.png", "d.png", *FOREIGN)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = found_everywhere(root, tmp_path / "place")
    assert {tuple(names) for names in found.values()} == {("a.jpg", "b.png", "c.png", "d.png")}
    said = [str(each.message) for each in caught if each.category is SmkdWarning]
    assert all("which Pillow cannot read here" in line and "\n" not in line for line in said)
    of_three = [line for line in said if "left out: 3 .heic, 3 .heif, 3 .cr2, 3 .jxl" in line or "3 .cr2" in line]
    assert len(of_three) >= 5  # data set, shards, folder, fit, zip
    assert any("1 .heic" in line or "1 .cr2" in line for line in said)  # predict
    place = tmp_path / "again"
    place.mkdir()
    with pytest.warns(SmkdWarning, match="which Pillow cannot read here"):
        assert "3 .heic" in zip_classes(zipped(root), place).left_out[0]
    with pytest.warns(SmkdWarning):
        report = verify(open_dataset(root, split_by="images"), "folder", dataset_spec("folder"))
    assert sum("3 .heic" in line for line in report.warnings) == 1


def test_a_class_of_only_such_files_is_an_error(tmp_path: Path) -> None:
    root = put(three_classes(tmp_path / "d", "a.png"), "dog/a.HEIC", "dog/b.heic")
    message = r"holds only 2 \.heic \(the first: '.*a\.HEIC'\), which Pillow cannot read here; convert"
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "tree").mkdir()
    tree = tmp_path / "tree"
    for split in ("train", "val", "test"):
        (tree / split).symlink_to(root)
    roads = {
        "class folders": lambda: open_dataset(root, split_by="images").whole(),
        "tree": lambda: open_dataset(tree).open("train"), "fit": lambda: support_images(root),
        "shards": lambda: open_dataset(tarred(root)), "zip": lambda: zip_classes(zipped(root), place),
        "predict": lambda: listed_images([root / "dog"]), "loose": lambda: open_dataset(root / "dog"),
    }  # fmt: skip
    for open_it in roads.values():
        with pytest.raises(DataError, match=message):
            open_it()
    (root / "labels.csv").write_text("path,label\nant/a.png,ant\ndog/a.HEIC,dog\ndog/b.heic,dog\n")
    with pytest.raises(DataError, match=r"labels\.csv: class 'dog' " + message):
        open_dataset(root / "labels.csv")


def test_a_plugin_makes_its_files_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = types.ModuleType("pillow_of_this_test")
    plugin.register_heif_opener = lambda: Image.register_extension("PNG", ".heic")  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, plugin.__name__, plugin)
    monkeypatch.setattr(formats, "PLUGINS", ("not_installed", plugin.__name__))
    try:
        for cached in (formats._read_here, formats.pillow_formats):
            cached.cache_clear()
        images = support_images(three_classes(tmp_path / "d", "a.heic"))
        assert len(images) == 3
        assert images.load(0).shape[0] == 3
    finally:
        Image.EXTENSION.pop(".heic", None)
        for cached in (formats._read_here, formats.pillow_formats):
            cached.cache_clear()


def test_what_lies_beside_the_classes_is_named(tmp_path: Path) -> None:
    root = put(three_classes(tmp_path / "d", "a.png"), "loose.jpg", "notes/readme.txt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(open_dataset(root, split_by="classes").open("train")) == 1
    lines = {str(each.message) for each in caught}
    assert lines == {
        f"'{root}': folders without images are no classes: notes",
        f"'{root}': left out, as they lie beside the class folders: 1 .jpg",
    }


def test_linked_folders_are_followed_and_circles_left_out(tmp_path: Path) -> None:
    root = three_classes(tmp_path / "d", "a.png")
    put(tmp_path / "elsewhere", "deep/er/b.png", "c.png")
    (root / "ant" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "bee" / "up").symlink_to(root)
    (root / "cat" / "self").symlink_to(root / "cat")
    (root / "cat" / "aaa").symlink_to(tmp_path / "elsewhere" / "deep")
    (root / "cat" / "zzz").symlink_to(tmp_path / "elsewhere")
    (root / "dog").symlink_to(root)
    found = {name: formats.find_images(root / name) for name in ("ant", "bee", "cat", "dog")}
    assert found["ant"].images == ["a.png", "more/c.png", "more/deep/er/b.png"]
    assert (found["bee"].images, found["bee"].links) == (["a.png"], ["up"])
    assert found["cat"].images == ["a.png", "aaa/er/b.png", "zzz/c.png"]
    assert found["cat"].links == ["self", "zzz/deep"]
    assert (found["dog"].images, found["dog"].links) == ([], ["."])
    (root / "dog").unlink()
    with pytest.warns(SmkdWarning, match=r"linked folders that are left out, .*: bee/up, cat/self, cat/zzz/deep"):
        assert len(FolderImages(root)) == 7


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = three_classes(tmp_path / "d", "a.png", "deep/b.png")
    scandir = os.scandir

    def guarded(place: str | Path) -> os._ScandirIterator[str]:
        if str(place).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(DataError, match=r"cannot read folder '.*ant/deep': Permission denied"):
        support_images(root)


def test_a_zip_with_backslashes_has_its_classes(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    archive = zipped(three_classes(tmp_path / "d", "a.png", "b.png"), "\\")
    found = zip_classes(archive, place)
    assert {name: len(files) for name, files in found.files.items()} == {"ant": 2, "bee": 2, "cat": 2}
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("ant/a.png", b"another")
    with pytest.raises(DataError, match=r"d\.zip' holds 'ant/a\.png' twice"):
        zip_classes(archive, place)


def test_one_name_in_two_writings_is_one_name(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))
    for number, name in enumerate((composed, apart)):
        root = put(three_classes(tmp_path / str(number), "a.png"), f"{name}/a.png")
        source = open_dataset(root)
        assert composed in [each for names in source.classes.values() for each in names]
        split = next(split for split, names in source.classes.items() if composed in names)
        assert source.open(split).class_names == source.classes[split]
        file = tmp_path / "splits.csv"
        file.write_text(f"class,split\n{apart},test\nant,train\nbee,train\ncat,val\n", encoding="utf-8")
        assert open_dataset(root, split_file=file).classes["test"] == [composed]
    assert open_dataset(tmp_path / "0").classes == open_dataset(tmp_path / "1").classes
    tree = put(tmp_path / "tree", f"train/{composed}/a.png", f"val/{apart}/a.png", "test/ant/a.png")
    assert open_dataset(tree).shared_classes() == {composed: ["train", "val"]}
    with pytest.raises(DataError, match="2 folders called 'été', written with different Unicode characters"):
        support_images(put(tmp_path / "0", f"{apart}/a.png"))


def test_the_command_line_prints_what_is_left_out_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = three_classes(tmp_path / "d", "a.png", "b.heic")
    monkeypatch.setattr("sys.argv", ["smkd", "data", "stats", str(root)])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code in (0, None)
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(lines) == 1
    assert re.fullmatch(rf"smkd: '{root}': left out: 1 \.heic \(the first: '\w+/b\.heic'\), which .*", lines[0])


def test_suffixes_of_pictures() -> None:
    assert all(formats.is_picture(name) for name in (*SEVERAL, *FOREIGN, "A.NEF", "b.svg"))
    assert not any(
        formats.is_picture(name) for name in ("a.txt", "jpg", "a.pdf", "a.eps", "a.h5", "a.mp4", "labels.csv")
    )
