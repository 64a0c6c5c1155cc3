"""miniImageNet from the copies that circulate: folders and pickles."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from archives_made import build, few, mini_pickles, picture
from smkd.errors import DataError
from smkd.prepare.mini_copies import find_copy, plan_folders, plan_pickles

MINI = few("mini-imagenet", 3, classes=2)


@pytest.mark.parametrize("side", [84, 240])  # small arrays come with the pickle, large ones stay in the file
@pytest.mark.parametrize("python2", [True, False])
def test_pickles(tmp_path: Path, side: int, python2: bool) -> None:
    images = mini_pickles(tmp_path / "copy", MINI, side, python2=python2)
    assert find_copy(tmp_path / "copy") == "pickles"
    plan = plan_pickles(tmp_path / "copy", MINI, None)
    build(plan, tmp_path / "out", processes=2 if side == 240 else 1)
    for number, entry in enumerate(MINI[:2]):
        for i in range(3):
            with Image.open(tmp_path / "out" / "train" / entry.folder / f"{i:05}.png") as image:
                np.testing.assert_array_equal(np.array(image), images[3 * number + i])
    small = (f"'{tmp_path / 'copy'}' holds images of 84 pixels, too small for crops of 224",)
    assert tuple(line.split(":")[0] for line in plan.warnings) == (small if side == 84 else ())


def class_folders(root: Path) -> None:
    for number, entry in enumerate(MINI):
        folder = root / entry.split / entry.folder
        folder.mkdir(parents=True)
        for i in range(3):
            (folder / f"{i}.jpg").write_bytes(picture(10 * number + i, (84, 84)))


def flat_folder(root: Path) -> None:
    (root / "images").mkdir(parents=True)
    for number, entry in enumerate(MINI):
        for i in range(3):
            path = root / "images" / f"{entry.folder}{i + 5:08}.jpg"
            path.write_bytes(picture(10 * number + i, (84, 84)))


def mixed_folders(root: Path) -> None:
    """Every class in both of two folders: two images in train, one in val."""
    for number, entry in enumerate(MINI):
        for i in range(3):
            path = root / ("val" if i == 1 else "train") / entry.folder / f"{entry.folder}{i + 5:08}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(10 * number + i, (84, 84)))


@pytest.mark.parametrize("make", [class_folders, flat_folder, mixed_folders])
def test_folders(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "copy")
    assert find_copy(tmp_path / "copy") == "folders"
    plan = plan_folders(tmp_path / "copy", MINI, None)
    assert len(plan.warnings) == 1
    build(plan, tmp_path / "out")
    for number, entry in enumerate(MINI):
        found = [path.read_bytes() for path in sorted((tmp_path / "out" / entry.split / entry.folder).iterdir())]
        assert found == [picture(10 * number + i, (84, 84)) for i in range(3)]


def test_resized_copies_keep_their_format(tmp_path: Path) -> None:
    class_folders(tmp_path / "copy")
    folder = tmp_path / "copy" / "train" / MINI[0].folder
    (folder / "2.jpg").rename(folder / "2.png")
    build(plan_folders(tmp_path / "copy", MINI, 32), tmp_path / "out")
    for name, kind in (("1.jpg", "JPEG"), ("2.png", "PNG")):
        with Image.open(tmp_path / "out" / "train" / MINI[0].folder / name) as image:
            assert (image.format, image.size) == (kind, (32, 32))


def test_an_ilsvrc_folder_is_no_copy(tmp_path: Path) -> None:
    (tmp_path / "train" / "n01532829").mkdir(parents=True)
    (tmp_path / "val").mkdir()
    assert find_copy(tmp_path) is None
    assert find_copy(tmp_path / "train") is None


def test_wrong_copies_are_named(tmp_path: Path) -> None:
    class_folders(tmp_path)
    entry = MINI[0]
    (tmp_path / "train" / entry.folder / "0.jpg").unlink()
    with pytest.raises(DataError, match=f"class {entry.folder} has 2 images, expected 3"):
        plan_folders(tmp_path, MINI, None)
    (tmp_path / "train" / entry.folder).rename(tmp_path / "train" / "n00000000")
    with pytest.raises(DataError, match=f"lacks 1 of the 2 train classes: {entry.folder}$"):
        plan_folders(tmp_path, MINI, None)
    (tmp_path / "train" / "n00000000").rename(tmp_path / "train" / entry.folder)
    (tmp_path / "train" / entry.folder / "0.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot read image"):
        plan_folders(tmp_path, MINI, None)
    (tmp_path / "val" / "n00000000").mkdir()
    (tmp_path / "train" / entry.folder / "0.jpg").write_bytes(picture())
    with pytest.raises(DataError, match="class 'n00000000' is no val class of Ravi and Larochelle's split"):
        plan_folders(tmp_path, MINI, None)


def wrong_pickle(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda values: {**values, **changes}


WRONG = {
    "no images": (wrong_pickle(image_data=None), "image_data is no uint8 array"),
    "floats": (wrong_pickle(image_data=np.zeros((6, 8, 8, 3), np.float32)), "an array is of type 'f4'"),
    "no classes": (wrong_pickle(class_dict=[]), "class_dict does not give each class a list"),
    "few rows": (wrong_pickle(class_dict={e.folder: [0, 1] for e in MINI[:2]}), "has 2 images, expected 3"),
    "rows beyond": (wrong_pickle(class_dict={e.folder: [0, 1, 99] for e in MINI[:2]}), "names rows beyond image_data"),
    "other classes": (wrong_pickle(class_dict={"n00000000": [0, 1, 2]}), "lacks 2 of the 2 train classes"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=list(WRONG))
def test_wrong_pickles_are_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    mini_pickles(tmp_path, MINI, 8, python2=False)
    path = tmp_path / "mini-imagenet-cache-train.pkl"
    path.write_bytes(pickle.dumps(change(pickle.loads(path.read_bytes())), protocol=4))
    with pytest.raises(DataError, match=message):
        plan_pickles(tmp_path, MINI, None)


def test_all_three_pickles_are_needed(tmp_path: Path) -> None:
    mini_pickles(tmp_path, MINI, 8, python2=False)
    (tmp_path / "mini-imagenet-cache-val.pkl").unlink()
    with pytest.raises(DataError, match=r"cache-val\.pkl' does not exist; the three files of the copy belong together"):
        plan_pickles(tmp_path, MINI, None)


def test_one_name_in_two_mixed_folders(tmp_path: Path) -> None:
    mixed_folders(tmp_path)
    name = f"{MINI[0].folder}{5:08}.jpg"
    (tmp_path / "val" / MINI[0].folder / name).write_bytes(picture(1, (84, 84)))
    with pytest.raises(DataError, match=f"{name}' and .*{name}' have one name"):
        plan_folders(tmp_path, MINI, None)
