"""The same small labelled images written in every form that a data set may have."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from made_images import SPLITS, encode, noise, write_classes
from smkd.data.splits import split_by_seed

CLASSES = [f"kind-{number:02}" for number in range(12)]
PER_CLASS = 4


def pixels(label: int, number: int) -> np.ndarray:
    """The image of a class with this number: every form must give back exactly these pixels."""
    return noise((8, 9 + label % 3), (label, number))


def encoded(label: int, number: int) -> bytes:
    return encode(pixels(label, number))


def items() -> list[tuple[int, int, str]]:
    """Class, number and split by class of every image, in an order of no use."""
    split_of = split_by_seed(CLASSES, 0)
    every = [(label, number, split_of[name]) for number in range(PER_CLASS) for label, name in enumerate(CLASSES)]
    return [every[i] for i in np.random.default_rng(3).permutation(len(every))]


def make_classes(root: Path) -> Path:
    return write_classes(root, dict.fromkeys(CLASSES, PER_CLASS), encoded, "{}.png")


def make_tree(root: Path) -> Path:
    for label, number, split in items():
        folder = root / split / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encoded(label, number))
    return root


def make_table(root: Path, *, split: bool = False, name: str = "labels.csv") -> Path:
    (root / "pictures").mkdir(parents=True)
    with (root / name).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Path", "label", *(["split"] if split else [])])
        for label, number, of in items():
            path = f"pictures/{label}-{number}.png"
            (root / path).write_bytes(encoded(label, number))
            writer.writerow([path, CLASSES[label], *([of] if split else [])])
    return root / name


def make_lists(root: Path) -> Path:
    """train.csv, val.csv and test.csv beside images/, as miniImageNet's lists are used."""
    (root / "images").mkdir(parents=True)
    rows: dict[str, list[str]] = {split: ["filename,label"] for split in SPLITS}
    for label, number, split in items():
        (root / "images" / f"n{label:02}{number:03}.png").write_bytes(encoded(label, number))
        rows[split].append(f"n{label:02}{number:03}.png,{CLASSES[label]}")
    for split, lines in rows.items():
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return root


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


LABEL_FILES: dict[str, Callable[[int], bytes]] = {
    "cls": lambda label: CLASSES[label].encode(),
    "txt": lambda label: f"{CLASSES[label]}\n".encode(),
    "json": lambda label: json.dumps({"label": CLASSES[label], "width": 8}).encode(),
}


def make_shards(root: Path, kind: str | None = "cls", *, by_split: bool = False) -> Path:
    root.mkdir(parents=True)
    names = SPLITS if by_split else ("part-0", "part-1", "part-2")
    archives = {name: tarfile.open(root / f"{name}-000.tar", "w") for name in names}  # noqa: SIM115
    for position, (label, number, split) in enumerate(items()):
        archive = archives[split if by_split else names[position % 3]]
        key = f"{position:04}" if kind else f"{CLASSES[label]}/{number}"
        if kind:
            add(archive, f"{key}.{kind}", LABEL_FILES[kind](label))
        add(archive, f"{key}.png", encoded(label, number))
    for archive in archives.values():
        archive.close()
    return root


def make_single_shard(root: Path) -> Path:
    root.mkdir()
    with tarfile.open(root / "photos.tar", "w") as archive:
        for label, number, _ in items():
            add(archive, f"{CLASSES[label]}/{number}.v1.png", encoded(label, number))
    return root / "photos.tar"


def shards_in_folders(root: Path) -> Path:
    make_shards(root, by_split=True)
    for split in SPLITS:
        (root / split).mkdir()
        (root / f"{split}-000.tar").rename(root / split / "000.tar")
    return root


def make_parquet_table(root: Path) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    with make_table(root).open() as file:
        rows = list(csv.DictReader(file))
    (root / "labels.csv").unlink()
    parquet.write_table(arrow.table({name: [row[name] for row in rows] for name in rows[0]}), root / "labels.parquet")
    return root / "labels.parquet"


def make_parquet_images(root: Path, splits: tuple[str, ...] = ("train",), *, shared: bool = True) -> Path:
    """Parquet files as the Hub keeps them: data/<part>-00000-of-00001.parquet, images inside."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    (root / "data").mkdir(parents=True)
    part_of = {"train": "train", "val": "validation", "test": "test"}
    for position, split in enumerate(splits):
        chosen = [
            (label, number) for i, (label, number, of) in enumerate(items())
            if (i % len(splits) == position if shared else of == split)
        ]  # fmt: skip
        rows = {
            "image": [{"bytes": encoded(*place), "path": None} for place in chosen],
            "label": [label for label, _ in chosen],
        }
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(root / "data" / f"{part_of[split]}-00000-of-00001.parquet"))
    return root


FORMS: dict[str, Callable[[Path], Path]] = {
    "tree": make_tree,
    "class folders": make_classes,
    "table": make_table,
    "table with splits": lambda root: make_table(root, split=True),
    "folder with a table": lambda root: make_table(root).parent,
    "a table per split": make_lists,
    "shards, .cls": make_shards,
    "shards, .txt": lambda root: make_shards(root, "txt"),
    "shards, .json": lambda root: make_shards(root, "json"),
    "shards of class folders": lambda root: make_shards(root, None),
    "shards per split": lambda root: make_shards(root, by_split=True),
    "shards in folders": shards_in_folders,
    "a single shard": make_single_shard,
    "Parquet table": make_parquet_table,
    "Parquet images": make_parquet_images,
    "Parquet images, ordinary parts": lambda root: make_parquet_images(root, SPLITS),
    "Parquet images, parts by class": lambda root: make_parquet_images(root, SPLITS, shared=False),
    "hub name": lambda root: Path(f"hf:{make_parquet_images(root)}"),
}
