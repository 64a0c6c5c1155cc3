"""What is no data set, or more than one, is refused in one line that names what was found."""

from __future__ import annotations

import gzip
import importlib.util
import shutil
import sys
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_forms import (
    CLASSES,
    PER_CLASS,
    SPLITS,
    add,
    encoded,
    make_classes,
    make_parquet_images,
    make_shards,
    make_table,
    make_tree,
)
from made_images import encode, noise
from smkd.config.schema import DataConfig
from smkd.data.datasets import open_split
from smkd.data.decoding import decode
from smkd.data.sources import open_dataset
from smkd.errors import DataError


@pytest.fixture(autouse=True)
def _own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("datasets") is not None:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def nothing(root: Path) -> Path:
    return root / "nowhere"


def empty(root: Path) -> Path:
    root.mkdir()
    return root


def loose(root: Path) -> Path:
    root.mkdir()
    for number in range(3):
        (root / f"{number}.png").write_bytes(encoded(0, number))
    return root


def flat_splits(root: Path) -> Path:
    for split in SPLITS:
        loose_folder = root / split
        loose_folder.mkdir(parents=True)
        (loose_folder / "0.png").write_bytes(encoded(0, 0))
    return root


def packed_up(root: Path) -> Path:
    root.mkdir()
    (root / "photos.zip").write_bytes(b"")
    return root


def tree_beside_classes(root: Path) -> Path:
    make_tree(root)
    shutil.rmtree(root / "val")
    shutil.copytree(root / "test" / next((root / "test").iterdir()).name, root / "cats")
    return root


def table_beside_classes(root: Path) -> Path:
    make_classes(root)
    (root / "labels.csv").write_text(f"path,label\n{CLASSES[0]}/0.png,cat\n")
    return root


def two_tables(root: Path) -> Path:
    make_table(root)
    shutil.copy(root / "labels.csv", root / "other.csv")
    return root


def two_classes(root: Path) -> Path:
    make_classes(root)
    for name in CLASSES[2:]:
        shutil.rmtree(root / name)
    return root


def table_text(text: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        make_table(root)
        (root / "labels.csv").write_text(text)
        return root / "labels.csv"

    return make


def absent_images(root: Path) -> Path:
    path = make_table(root)
    for number in range(7):
        (root / "pictures" / f"{number}-0.png").unlink()
    return path


def shard(*members: tuple[str, bytes]) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        root.mkdir()
        with tarfile.open(root / "a.tar", "w") as archive:
            for name, data in members:
                add(archive, name, data)
        return root

    return make


def cut_shard(root: Path) -> Path:
    make_shards(root)
    path = root / "part-1-000.tar"
    path.write_bytes(path.read_bytes()[:5_000])
    return root


def zipped_shard(root: Path) -> Path:
    make_shards(root)
    path = root / "part-1-000.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))
    return root


def half_named_shards(root: Path) -> Path:
    make_shards(root, by_split=True)
    (root / "val-000.tar").rename(root / "more-000.tar")
    return root


WRONG: list[tuple[Callable[[Path], Path], str]] = [
    (nothing, r"data folder '.*nowhere' does not exist"),
    (lambda root: Path("owner/photos"), r"'owner/photos' does not exist; .* data=hf:owner/photos"),
    (empty, r"holds no images in a known form \(it is empty\); known are .*hf:<name>"),
    (loose, r"its images lie in it directly, without a class folder, which is enough for phase 1 alone"),
    (flat_splits, r"train' holds images without class folders; expected <split>/<class>/<image>|test' holds images"),
    (packed_up, r"'photos\.zip' must be unpacked first"),
    (lambda root: packed_up(root) / "photos.zip", r"photos\.zip' is a file of no known form; unpack it first"),
    (tree_beside_classes, r"more than one way: folders train, test with class folders; folder cats with images"),
    (table_beside_classes, r"more than one way: a table of images \(labels\.csv\); folders kind-00, .* and 7 more"),
    (two_tables, r"holds 2 tables of images \(labels\.csv, other\.csv\); give one"),
    (two_classes, r"found 2 classes \(kind-00, kind-01\); splitting by class needs at least 3"),
    (table_text("image,label\n"), r"table '.*labels\.csv' has no rows"),
    (
        table_text("image,label\na.png,x\n"),
        r"has no column path, filename or file_name; its columns are image, label",
    ),
    (table_text("path,label,class\na.png,x,y\n"), r"has both label and class; .*data\.label_column=NAME"),
    (table_text("path,label\npictures/0-0.png,\n"), r"line 2: the column 'label' is empty"),
    (table_text("path,label\na.png,x,y\n"), r"line 2: 3 cells, expected 2"),
    (
        table_text("path,label,split\npictures/0-0.png,x,dev\n"),
        r"line 2: split 'dev' should be one of train, val, test",
    ),
    (
        table_text("path,label\npictures/0-0.png,x\npictures/0-0.png,y\n"),
        r"line 3: .*listed twice \(first in '.*line 2\)",
    ),
    (
        table_text("path,label\npictures/0-0.png,x\n./pictures/0-0.png,y\n"),
        r"line 3: '\./pictures/0-0\.png' is listed twice \(first in '.*line 2\)",
    ),
    (
        table_text("path,label\npictures/0-0.png,x\npictures/../pictures//0-0.png,x\n"),
        r"line 3: .*listed twice",
    ),
    (table_text("path,label,Label\na.png,x,y\n"), r"has two columns called 'label'; rename or remove one"),
    (table_text("path,path,label\na.png,a.png,y\n"), r"has two columns called 'path'"),
    (table_text("path,file_name,label\na.png,a.png,y\n"), r"has both path and file_name"),
    (table_text("path;label\npictures/0-0.png;x\n"), r"separates its columns with semicolons; save it with commas"),
    (table_text("path\tlabel\npictures/0-0.png\tx\n"), r"separates its columns with tabs; save it with commas"),
    (lambda root: table_text("path;label\na.png;x\n")(root).parent, r"separates its columns with semicolons"),
    (table_text("path,label\npictures\\0-0.png,x\n"), r"names 1 of 1 images .*; write / between the folders, not \\"),
    (table_text("path,label\nC:\\photos\\0-0.png,x\n"), r"paths of a Windows drive must be made relative to '"),
    (table_text("path,label\nD:/photos/0-0.png,x\n"), r"paths of a Windows drive must be made relative to '"),
    (
        lambda root: table_text("path\tlabel\n")(root).rename(root / "labels.tsv"),
        r"save it as a CSV, with commas; known",
    ),
    (table_text('path,label\n"a.png,x\n'), r"not a CSV file in UTF-8"),
    (
        absent_images,
        r"names 7 of 48 images that are not in '.*': pictures/\d-0\.png, (.*, ){4}.* and 2 more|and 2 more",
    ),
    (shard(("a.txt", b"x")), r"holds no images"),
    (shard(("a.png", b"x")), r"image 'a\.png' has no class; expected a \.cls, \.json or \.txt file"),
    (shard(("a.png", b"x"), ("a.cls", b"c"), ("b.png", b"x")), r"image 'b\.png' has no class; expected 'b\.cls'"),
    (shard(("a.left.png", b"x"), ("a.right.png", b"x"), ("a.cls", b"c")), r"two images have the key 'a'"),
    (shard(("a.png", b"x"), ("a.cls", b"\xff\xfe")), r"'a\.cls' is not UTF-8"),
    (shard(("a.png", b"x"), ("a.json", b"{}")), r"'a\.png' has no class; expected 'a\.json'"),
    (shard(("a.png", b"x"), ("a.cls", b"c" * (1 << 20) + b"c")), r"label file 'a\.cls' has 1048577 bytes"),
    (cut_shard, r"part-1-000\.tar' is not a whole, uncompressed tar file"),
    (zipped_shard, r"part-1-000\.tar' is not a whole, uncompressed tar file"),
    (half_named_shards, r"more-000\.tar' is named after no split, but other shards are"),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[text[:40] for _, text in WRONG])
def test_what_is_no_data_set_is_refused_in_one_line(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_split(DataConfig(root=make(tmp_path / "d")), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,split\n", r"has no column 'class'; its columns are name, split"),
        ("class,split\nkind-00,valid\n", r"line 2: split 'valid' should be one of"),
        ("class,split\nkind-00,val\nkind-00,test\n", r"line 3: class 'kind-00' is in val and in test"),
        ("class,split\nkind-00,val\n", r"has no split for 11 of 12 classes: kind-01, .* and 6 more"),
    ],
)
def test_wrong_split_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "splits.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        open_dataset(make_classes(tmp_path / "d"), split_file=path)


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "d")
    shutil.rmtree(root / "val")
    with pytest.raises(DataError, match=r"has no val split \(expected '.*/val/<class>/<image>'\); it has train, test"):
        open_split(DataConfig(root=root), "val")


def test_unreadable_images_are_named_whatever_they_lie_in(tmp_path: Path) -> None:
    whole = encoded(0, 0)
    for number, (data, reason) in enumerate(
        [(b"", "the file is empty"), (b"no image", "not an image of a known format"), (whole[:-40], "truncated")]
    ):
        members = [m for name in ("a", "b", "c") for m in ((f"{name}.png", data), (f"{name}.cls", name.encode()))]
        images = open_dataset(shard(*members)(tmp_path / str(number))).open("train")
        with pytest.raises(DataError, match=rf"cannot read image '.*a\.tar:.\.png': .*{reason}"):
            images.load(0)


@pytest.mark.filterwarnings("ignore")
def test_broken_files_of_any_format_are_only_ever_unreadable() -> None:
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM"):
        whole = encode(noise((25, 20)), kind)
        for _ in range(200):
            data = bytearray(whole)
            for place in rng.integers(0, min(len(data), 300), 4):
                data[place] = rng.integers(0, 256)
            with suppress(OSError, ValueError):
                decode(bytes(data))


def test_what_pillow_raises_on_broken_files_is_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("'str' object cannot be interpreted as an integer")

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(ValueError, match="cannot be interpreted"):
        decode(b"TIFF")


@pytest.mark.parametrize("form", ["parquet", "hub"])
def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    root: Path = Path("hf:owner/photos")
    if form == "parquet":
        root = tmp_path / "labels.parquet"
        root.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"needs the extra: pip install 'smkd\[hf\]'"):
        open_dataset(root)


def test_parquet_that_is_none_or_has_several_labels_is_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "no.parquet").write_bytes(b"no Parquet at all")
    with pytest.raises(DataError, match=r"no\.parquet' is not a Parquet file"):
        open_dataset(tmp_path / "no.parquet")
    root = tmp_path / "two"
    root.mkdir()
    label = datasets.ClassLabel(names=CLASSES)
    features = datasets.Features({"img": datasets.Image(), "fine": label, "coarse": label})
    rows = {"img": [{"bytes": encoded(n, 0), "path": None} for n in range(12)], "fine": range(12), "coarse": [0, 1] * 6}
    datasets.Dataset.from_dict({k: list(v) for k, v in rows.items()}, features=features).to_parquet(root / "a.parquet")
    with pytest.raises(DataError, match=r"more than one label column \(fine, coarse\); .*data\.label_column=NAME"):
        open_dataset(root)
    with pytest.raises(DataError, match=r"data\.label_column=kind: .* has no such column; it has img, fine, coarse"):
        open_dataset(root, label_column="kind")
    assert len(open_dataset(root, label_column="fine").open("test")) == 2
    with pytest.raises(DataError, match=r"holds the images themselves; give its folder"):
        open_dataset(root / "a.parquet")
    with pytest.raises(DataError, match=r"cannot load 'hf:"):
        open_dataset(f"hf:{tmp_path / 'nowhere'}")


def test_parts_without_labels_are_left_out_and_configurations_chosen(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    root = make_parquet_images(tmp_path / "d", ("train", "val"))
    for path, labels in (("test-0.parquet", [-1, -1]), ("half.parquet", [0, -1])):
        rows = {"image": [{"bytes": encoded(0, n), "path": None} for n in (7, 8)], "label": labels}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / path)
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: whole\n  data_files:\n  - {split: train, path: data/train-*}\n"
        "  - {split: validation, path: data/validation-*}\n  - {split: test, path: test-0.parquet}\n"
        "- config_name: half\n  data_files: half.parquet\n---\n"
    )
    source = open_dataset(f"hf:{root}:whole")
    assert "columns 'image' and 'label', train and validation put together" in source.description
    assert sum(len(source.open(split)) for split in SPLITS) == len(CLASSES) * PER_CLASS
    assert source.open("train").name(0).startswith(f"hf:{root}:whole/")
    with pytest.raises(DataError, match=r"part 'train': 1 of 2 rows have no label in 'label'"):
        open_dataset(f"hf:{root}:half")
    with pytest.raises(DataError, match=r"cannot load 'hf:.*Config name is missing"):
        open_dataset(f"hf:{root}")
