"""Small archives in the true formats, made from nothing."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from made_images import encode, noise
from smkd.prepare.build import Plan, Target, build_folder
from smkd.prepare.manifest import Identity, manifest_hash
from smkd.prepare.registry import ClassEntry, class_list

PARTS = {"train": 4, "test": 2}
IDENTITY = Identity("cifar-fs", "1", "a rule", {})


def build(plan: Plan, out: Path, processes: int = 1) -> str:
    """Carries the plan out; the hash of the folder's manifest."""
    build_folder(Target(out, IDENTITY), plan, {}, processes, lambda done, total: None)
    return manifest_hash(out)


def few(name: str, images: int, classes: int | None = None) -> list[ClassEntry]:
    """The classes of a data set with fewer images each; `classes` of every split, or all."""
    kept: dict[str, int] = {}
    entries = []
    for entry in class_list(name):
        kept[entry.split] = kept.get(entry.split, 0) + 1
        if classes is None or kept[entry.split] <= classes:
            entries.append(replace(entry, images=images))
    return entries


def python2_pickle(value: object) -> bytes:
    """A pickle as Python 2 wrote it with protocol 2: text as byte strings, NumPy's names of that time."""
    return b"\x80\x02" + _dumped(value) + b"."


def _dumped(value: object) -> bytes:
    match value:
        case dict():
            return b"}(" + b"".join(_dumped(k) + _dumped(v) for k, v in value.items()) + b"u"
        case list():
            return b"](" + b"".join(map(_dumped, value)) + b"e"
        case tuple():
            return b"(" + b"".join(map(_dumped, value)) + b"t"
        case bool() | None:
            return {True: b"\x88", False: b"\x89", None: b"N"}[value]
        case int():
            return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
        case bytes():
            return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value
        case np.ndarray():
            code = value.dtype.str[1:].encode()
            order = b"|" if value.dtype.itemsize == 1 else b"<"
            dtype = b"cnumpy\ndtype\n" + _dumped((code, 0, 1)) + b"R"
            dtype += _dumped((3, order, None, None, None, -1, -1, 0)) + b"b"
            empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
            empty += _dumped((0,)) + _dumped(b"b") + b"\x87R"
            state = b"(" + _dumped(1) + _dumped(value.shape) + dtype + _dumped(False) + _dumped(value.tobytes()) + b"t"
            return empty + state + b"b"
    raise TypeError(type(value))


def cifar_parts(part_sizes: Mapping[str, int] = PARTS) -> dict[str, dict[bytes, Any]]:
    """What CIFAR-100's three files hold, with fewer images of each class."""
    entries = class_list("fc100")
    groups = sorted({entry.group for entry in entries})
    by_label = {entry.label: entry for entry in entries}
    rng = np.random.default_rng(0)
    files: dict[str, dict[bytes, Any]] = {
        "meta": {
            b"fine_label_names": [by_label[label].folder.encode() for label in range(100)],
            b"coarse_label_names": [group.encode() for group in groups],
        }
    }
    for part, size in part_sizes.items():
        labels = rng.permutation(np.repeat(np.arange(100), size)).tolist()
        files[part] = {
            b"filenames": [f"{by_label[label].folder}_s_{i:06}.png".encode() for i, label in enumerate(labels)],
            b"batch_label": f"{part}ing batch 1 of 1".encode(),
            b"fine_labels": labels,
            b"coarse_labels": [groups.index(by_label[label].group) for label in labels],
            b"data": rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8),
        }
    return files


def cifar_archive(path: Path, files: Mapping[str, Mapping[bytes, Any] | bytes] | None = None) -> Path:
    """cifar-100-python.tar.gz; `files` replaces the content of `cifar_parts` (bytes: a pickle as it is)."""
    content = dict(files or cifar_parts())
    pickles = {name: v if isinstance(v, bytes) else python2_pickle(dict(v)) for name, v in content.items()}
    members = [(f"cifar-100-python/{name}", data) for name, data in pickles.items()]
    return write_tar(path, [("cifar-100-python/file.txt~", b""), *members])


def write_tar(path: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    """A tar, compressed if its name says so."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg() and not info.size:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if data else None)
    data = buffer.getvalue()
    path.write_bytes(gzip.compress(data, 1) if path.suffix in (".gz", ".tgz") else data)
    return path


def write_zip(path: Path, members: Iterable[tuple[str | zipfile.ZipInfo, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def picture(seed: int = 0, size: tuple[int, int] = (20, 14), kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """An encoded noisy image."""
    return encode(Image.fromarray(noise(size, seed)).convert(mode), kind)


def ilsvrc_photos(entries: Sequence[ClassEntry], count: int) -> dict[str, dict[str, bytes]]:
    """Names and bytes of each class, whose numbers have gaps and different lengths, as the true ones have."""
    return {
        entry.folder: {
            f"{entry.folder}_{3 + 7 * i * i}.JPEG": picture(1000 * c + i, (30 + i, 20 + c)) for i in range(count)
        }
        for c, entry in enumerate(entries)
    }


def ilsvrc_tar(path: Path, photos: Mapping[str, Mapping[str, bytes]]) -> Path:
    """ILSVRC2012_img_train.tar: a tar of tars, members not in the order of their numbers."""
    inner = []
    for wnid, images in photos.items():
        folded = path.with_name(f"{wnid}.tar")
        write_tar(folded, sorted(images.items()))
        inner.append((folded.name, folded.read_bytes()))
        folded.unlink()
    return write_tar(path, inner)


def ilsvrc_folder(path: Path, photos: Mapping[str, Mapping[str, bytes]]) -> Path:
    for wnid, images in photos.items():
        (path / wnid).mkdir(parents=True)
        for name, data in images.items():
            (path / wnid / name).write_bytes(data)
    return path


def mini_lists(folder: Path, entries: Sequence[ClassEntry], ordinals: Sequence[int]) -> Path:
    """train.csv, val.csv and test.csv with these ordinals of every class."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "val", "test"):
        wnids = [entry.folder for entry in entries if entry.split == split]
        rows = [f"{wnid}{ordinal:08}.jpg,{wnid}\n" for wnid in wnids for ordinal in ordinals]
        (folder / f"{split}.csv").write_text("filename,label\n" + "".join(rows))
    return folder


def mini_pickles(folder: Path, entries: Sequence[ClassEntry], side: int, *, python2: bool) -> NDArray[np.uint8]:
    """mini-imagenet-cache-*.pkl of `entries[0].images` images a class; the images of train."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(1)
    kept = {}
    for split in ("train", "val", "test"):
        wnids = [entry.folder for entry in entries if entry.split == split]
        count = entries[0].images
        images = rng.integers(0, 256, (count * len(wnids), side, side, 3), dtype=np.uint8)
        rows = {wnid: list(range(i * count, (i + 1) * count)) for i, wnid in enumerate(wnids)}
        if python2:
            data = python2_pickle({b"image_data": images, b"class_dict": {w.encode(): r for w, r in rows.items()}})
        else:
            data = pickle.dumps({"image_data": images, "class_dict": rows}, protocol=4)
        (folder / f"mini-imagenet-cache-{split}.pkl").write_bytes(data)
        kept[split] = images
    return kept["train"]


def caltech_members(images: Mapping[str, int], data: bytes) -> list[tuple[str, bytes]]:
    """Members of 101_ObjectCategories.tar.gz with so many images of each class."""
    return [
        (f"101_ObjectCategories/{folder}/image_{i:04}.jpg", data)
        for folder, count in images.items()
        for i in range(count, 0, -1)
    ]


def caltech_zip(path: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    """caltech-101.zip, which holds the images' tar.gz beside other files."""
    inner = write_tar(path.with_name("inner.tar.gz"), members)
    outer = [("caltech-101/Annotations.tar", b"x"), ("caltech-101/101_ObjectCategories.tar.gz", inner.read_bytes())]
    inner.unlink()
    return write_zip(path, [("__MACOSX/caltech-101/._x", b""), *outer])


def omniglot_zips(folder: Path, entries: Sequence[ClassEntry]) -> list[Path]:
    """images_background.zip and images_evaluation.zip."""
    members: dict[str, list[tuple[str, bytes]]] = {"images_background": [], "images_evaluation": []}
    for number, entry in enumerate(entries):
        part = "images_evaluation" if entry.split == "test" else "images_background"
        alphabet, character = entry.folder.rsplit("-", 1)
        for i in range(entry.images):
            data = picture(number * 100 + i, (15, 15), "PNG", "1")
            members[part].append((f"{part}/{alphabet}/{character}/{number:04}_{i + 1:02}.png", data))
    return [write_zip(folder / f"{part}.zip", found) for part, found in members.items()]
