"""miniImageNet and tieredImageNet from a small ILSVRC-12, as a tar of tars and as a folder."""

from __future__ import annotations

import io
import os
import random
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from archives_made import build, few, ilsvrc_folder, ilsvrc_photos, ilsvrc_tar, mini_lists, picture, write_tar
from smkd.errors import DataError
from smkd.prepare.build import Plan
from smkd.prepare.imagenet import (
    IlsvrcPhoto,
    find_photo,
    known_pairs,
    open_ilsvrc,
    photos_in_order,
    plan_mini,
    plan_tiered,
    read_lists,
)
from smkd.prepare.registry import ClassEntry, ilsvrc_counts
from smkd.prepare.writing import FileRange

ORDINALS = (2, 3, 6)
COUNT = 7
MINI = few("mini-imagenet", len(ORDINALS), classes=2)
TIERED = few("tiered-imagenet", COUNT, classes=2)


def mini(
    source: Path, folder: Path, size: int | None, pairs: Mapping[str, str] | None = None, count: int = COUNT
) -> Plan:
    lists = read_lists(folder, MINI, digests={})
    return plan_mini(open_ilsvrc(source), MINI, lists, {e.folder: count for e in MINI}, size, pairs or {})


@pytest.fixture
def photos() -> dict[str, dict[str, bytes]]:
    return ilsvrc_photos(MINI, COUNT)


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    return mini_lists(tmp_path / "lists", MINI, ORDINALS)


def test_mini_takes_images_by_the_order_of_their_numbers(
    tmp_path: Path, photos: dict[str, dict[str, bytes]], lists: Path
) -> None:
    out = tmp_path / "out"
    build(mini(ilsvrc_tar(tmp_path / "train.tar", photos), lists, None), out)
    for entry in MINI:
        by_number = sorted(photos[entry.folder], key=lambda name: int(name[10:-5]))
        assert by_number != sorted(photos[entry.folder])
        found = {path.name: path.read_bytes() for path in (out / entry.split / entry.folder).iterdir()}
        assert found == {f"{entry.folder}{n:08}.jpg": photos[entry.folder][by_number[n - 1]] for n in ORDINALS}


@pytest.mark.parametrize("size", [None, 32])
def test_tar_and_folder_give_the_same(
    tmp_path: Path, photos: dict[str, dict[str, bytes]], lists: Path, size: int | None
) -> None:
    tar, folder = ilsvrc_tar(tmp_path / "train.tar", photos), ilsvrc_folder(tmp_path / "ILSVRC" / "train", photos)
    (folder / MINI[0].folder / "notes.txt").write_text("not an image")
    from_tar = build(mini(tar, lists, size), tmp_path / "a")
    assert from_tar == build(mini(folder, lists, size), tmp_path / "b")
    assert from_tar == build(mini(folder.parent, lists, size), tmp_path / "c")


def test_resized_images_are_square_rgb(tmp_path: Path, photos: dict[str, dict[str, bytes]], lists: Path) -> None:
    for images in photos.values():  # the true set holds CMYK and grey JPEGs and a PNG by the name of JPEG
        for number, (name, mode, kind) in enumerate(
            zip(list(images), ("CMYK", "L", "RGB", "CMYK", "L", "RGB", "L"), ("JPEG", "JPEG", "PNG") * 3, strict=False)
        ):
            images[name] = picture(number, (50, 20), kind, "L" if kind == "PNG" else mode)
    build(mini(ilsvrc_tar(tmp_path / "train.tar", photos), lists, 24), tmp_path / "out")
    for path in (tmp_path / "out").rglob("*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (24, 24))


def photos_around(pairs: Sequence[tuple[int, int]], count: int, wnid: str) -> list[IlsvrcPhoto]:
    """A class listing with these (ordinal, number) pairs; the other numbers are drawn between them."""
    rng = random.Random(wnid)
    numbers: list[int] = []
    for ordinal, number in sorted(pairs):
        lowest = numbers[-1] + 1 if numbers else 0
        numbers += [*sorted(rng.sample(range(lowest, number), ordinal - 1 - len(numbers))), number]
    numbers += range(numbers[-1] + 1, numbers[-1] + 1 + count - len(numbers))
    return [IlsvrcPhoto(number, f"{wnid}_{number}.JPEG", FileRange("x")) for number in numbers]


def test_the_300_known_pairs() -> None:
    by_class: dict[str, dict[str, str]] = {}
    for published, real in known_pairs().items():
        by_class.setdefault(published[:9], {})[published] = real
    assert (len(known_pairs()), len(by_class)) == (300, 100)
    for wnid, pairs in by_class.items():
        known = [(int(published[9:17]), int(real[10:-5])) for published, real in pairs.items()]
        listing = photos_around(known, ilsvrc_counts()[wnid], wnid)
        as_listed = sorted(((photo.name, photo.place) for photo in listing), key=lambda file: file[0])
        photos = photos_in_order(wnid, "train", as_listed)
        assert photos == listing
        assert [photo.name for photo in photos] != [name for name, _ in as_listed]
        assert {published: find_photo(photos, published).name for published in pairs} == pairs


def test_another_training_set_fails_the_known_pairs(
    tmp_path: Path, photos: dict[str, dict[str, bytes]], lists: Path
) -> None:
    name = f"{MINI[0].folder}00000002.jpg"
    pairs = {name: f"{MINI[0].folder}_28.JPEG"}
    with pytest.raises(DataError, match=f"'{name}' must be '{pairs[name]}', but is '{MINI[0].folder}_10.JPEG' there"):
        mini(ilsvrc_folder(tmp_path / "train", photos), lists, None, pairs)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_missing_or_extra_file_is_noticed(
    tmp_path: Path, photos: dict[str, dict[str, bytes]], lists: Path, change: int
) -> None:
    wnid = MINI[1].folder
    if change == 1:
        photos[wnid][f"{wnid}_99999.JPEG"] = b"x"
    else:
        photos[wnid].popitem()
    for source in (ilsvrc_folder(tmp_path / "train", photos), ilsvrc_tar(tmp_path / "train.tar", photos)):
        message = rf"class '{wnid}' of .* holds {COUNT + change} \.JPEG files, ILSVRC-12 has {COUNT};"
        with pytest.raises(DataError, match=message):
            mini(source, lists, None)


def test_strange_names_are_noticed(tmp_path: Path, photos: dict[str, dict[str, bytes]], lists: Path) -> None:
    wnid = MINI[0].folder
    folder = ilsvrc_folder(tmp_path / "train", photos)
    (folder / wnid / f"{wnid}_3 (1).JPEG").touch()
    with pytest.raises(DataError, match=rf"holds '{wnid}_3 \(1\).JPEG', which is no ILSVRC-12 name"):
        mini(folder, lists, None)


def test_missing_classes_are_named(tmp_path: Path, photos: dict[str, dict[str, bytes]], lists: Path) -> None:
    del photos[MINI[2].folder], photos[MINI[4].folder]
    with pytest.raises(DataError, match=f"lacks 2 of the 6 classes: {MINI[2].folder}, {MINI[4].folder}$"):
        mini(ilsvrc_tar(tmp_path / "train.tar", photos), lists, None)


def test_absent_images_are_counted_and_the_first_named(tmp_path: Path, photos: dict[str, dict[str, bytes]]) -> None:
    lists = mini_lists(tmp_path / "lists", MINI, (2, 8, 9))
    first = ", ".join(f"{MINI[i].folder}{n:08}.jpg" for i, n in ((0, 8), (0, 9), (1, 8), (1, 9), (2, 8)))
    with pytest.raises(DataError, match=rf"name 12 images that .* does not have: {first}, \.\.\.$"):
        mini(ilsvrc_tar(tmp_path / "train.tar", photos), lists, None)


def edit(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new, 1)


WRONG_LISTS = {
    "header": (edit("filename,label\n", ""), "the first line is not 'filename,label'"),
    "name": (edit("00000003.jpg", "_3.JPEG"), "line 3: expected a row such as"),
    "label": (edit(f",{MINI[0].folder}", f",{MINI[1].folder}"), "line 2: expected a row such as"),
    "zero": (edit("00000002", "00000000"), "line 2: expected a row such as"),
    "twice": (edit("00000003", "00000002"), "has 3 rows, 3 different ones are needed"),
    "other split": (lambda text: text.replace(MINI[0].folder, MINI[2].folder), r"class n\d+ and 1 more differ from"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG_LISTS.values(), ids=list(WRONG_LISTS))
def test_wrong_lists_are_explained(lists: Path, change: Callable[[str], str], message: str) -> None:
    path = lists / "train.csv"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        read_lists(lists, MINI, digests={})


def test_lists_must_be_the_published_ones(lists: Path) -> None:
    with pytest.raises(DataError, match=r"train\.csv' is not the published list: its SHA-256 is not 498519cd"):
        read_lists(lists, MINI)
    (lists / "val.csv").unlink()
    with pytest.raises(DataError, match=r"val\.csv' does not exist; train\.csv, val\.csv and test\.csv are needed"):
        read_lists(lists, MINI, digests={})


def tiered_source(tmp_path: Path) -> Path:
    return ilsvrc_folder(tmp_path / "train", ilsvrc_photos(TIERED, COUNT))


def test_tiered_copies_all_images_of_its_classes(tmp_path: Path) -> None:
    photos = ilsvrc_photos([*TIERED, *MINI], COUNT)
    out = tmp_path / "out"
    digest = build(plan_tiered(open_ilsvrc(ilsvrc_tar(tmp_path / "t.tar", photos)), TIERED, None, False), out)
    for entry in TIERED:
        found = {path.name: path.read_bytes() for path in (out / entry.split / entry.folder).iterdir()}
        assert found == photos[entry.folder]
    folder = open_ilsvrc(ilsvrc_folder(tmp_path / "train", photos))
    assert build(plan_tiered(folder, TIERED, None, False), tmp_path / "b") == digest
    assert build(plan_tiered(folder, TIERED, None, True), tmp_path / "c", processes=2) == digest


def test_links_share_the_source_s_bytes(tmp_path: Path) -> None:
    source, out = tiered_source(tmp_path), tmp_path / "out"
    build(plan_tiered(open_ilsvrc(source), TIERED, None, link=True), out)
    entry = TIERED[0]
    for path in (source / entry.folder).iterdir():
        assert os.path.samefile(path, out / entry.split / entry.folder / path.name)


def test_links_are_symbolic_across_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    source, out = tiered_source(tmp_path), tmp_path / "out"
    copied = build(plan_tiered(open_ilsvrc(source), TIERED, None, link=False), tmp_path / "copy")
    monkeypatch.setattr(os, "link", refuse)
    assert build(plan_tiered(open_ilsvrc(source), TIERED, None, link=True), out) == copied
    images = list(out.rglob("*.JPEG"))
    assert images
    assert all(path.is_symlink() and path.resolve().is_file() for path in images)


def test_links_need_files_that_stay(tmp_path: Path) -> None:
    tar = open_ilsvrc(ilsvrc_tar(tmp_path / "t.tar", ilsvrc_photos(TIERED, COUNT)))
    with pytest.raises(DataError, match="is an archive; links need the folder of images"):
        plan_tiered(tar, TIERED, None, link=True)
    with pytest.raises(DataError, match="leave out --size"):
        plan_tiered(open_ilsvrc(tiered_source(tmp_path)), TIERED, 480, link=True)


def test_sources_of_another_kind_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no class folders such as n01532829/"):
        open_ilsvrc(tmp_path / "empty")
    with pytest.raises(DataError, match=r"'.*none' does not exist"):
        open_ilsvrc(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no <wnid>\.tar; ILSVRC2012_img_train\.tar is needed"):
        open_ilsvrc(write_tar(tmp_path / "other.tar", [("a/b.jpg", b"x")]))
    (tmp_path / "text").write_text("no tar")
    with pytest.raises(DataError, match="is damaged, cut short or of another kind"):
        open_ilsvrc(tmp_path / "text")


def hostile_inner(entry: ClassEntry) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(f"../{entry.folder}_3.JPEG"))
    return buffer.getvalue()


def test_hostile_and_damaged_tars_are_refused(tmp_path: Path, photos: dict[str, dict[str, bytes]], lists: Path) -> None:
    with pytest.raises(DataError, match="leads out of the folder; refused"):
        open_ilsvrc(write_tar(tmp_path / "a.tar", [("/etc/n01532829.tar", b"x")]))
    inner = [(f"{entry.folder}.tar", hostile_inner(entry)) for entry in MINI]
    with pytest.raises(DataError, match=r"member '\.\./n\d+_3\.JPEG' leads out of the folder; refused"):
        mini(write_tar(tmp_path / "b.tar", inner), lists, None)
    whole = ilsvrc_tar(tmp_path / "c.tar", photos)
    whole.write_bytes(whole.read_bytes()[:-30_000])
    with pytest.raises(DataError, match="is damaged, cut short or of another kind"):
        mini(whole, lists, None)


def test_an_unreadable_image_is_named(tmp_path: Path, photos: dict[str, dict[str, bytes]], lists: Path) -> None:
    wnid = MINI[0].folder
    photos[wnid][f"{wnid}_10.JPEG"] = photos[wnid][f"{wnid}_10.JPEG"][:200]
    plan = mini(ilsvrc_tar(tmp_path / "train.tar", photos), lists, 32)
    target = f"train/{wnid}/{wnid}00000002.jpg"
    with pytest.raises(DataError, match=rf"cannot read the image of '{target}' in '.*train\.tar'"):
        build(plan, tmp_path / "out", processes=2)
    assert not list((tmp_path / "out").rglob("*00000002.jpg"))


def test_images_are_read_from_the_tar_where_they_lie(tmp_path: Path, photos: dict[str, dict[str, bytes]]) -> None:
    source = open_ilsvrc(ilsvrc_tar(tmp_path / "train.tar", photos))
    for wnid, images in photos.items():
        assert {photo.name: photo.place.read() for photo in source.photos(wnid)} == images
    np.testing.assert_array_equal(sorted(source.wnids()), sorted(photos))
