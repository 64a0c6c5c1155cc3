"""Tar shards in the manner of WebDataset: files of one key are a sample; read in any order through the plain tar.

An image `<key>.jpg` has its class in `<key>.cls`, `<key>.json` ("label" or "class") or `<key>.txt`; without any of
them in the shards, it is the folder the image is in. The key ends at the first dot of the file name.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tarfile
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smkd.data.decoding import check_length
from smkd.data.formats import is_foreign, is_hidden_path, is_picture, nfc
from smkd.data.images import SPLITS, packed, readable_images, unpacked
from smkd.data.tables import LABEL_COLUMNS, Listing
from smkd.errors import DataError

LABEL_KINDS = ("cls", "json", "txt")
LARGEST_LABEL = 1 << 20
OPEN_SHARDS = 64


class Shard(NamedTuple):
    """The images of one tar, in little memory: there may be millions.

    Attributes:
        names: member names, packed.
        offsets, sizes: int64, where their bytes are.
        classes: class of each image by kind of label file, and by its folder as the kind ''; empty for none.
        twice: name of the first image whose key an earlier one has; empty if there is none.
        foreign: Pillow cannot read some of the images here.
    """

    names: NDArray[np.bytes_]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    classes: dict[str, list[str]]
    twice: str
    foreign: bool


class ShardStore:
    """Images inside tar files.

    Args:
        shards: paths of the tar files.
        shard: int32 [images], number of the file each image is in.
        offset, size: int64 [images], where its bytes are in it.
        names: member name of each image, packed.
    """

    def __init__(
        self, shards: list[str], shard: NDArray[np.int32], offset: NDArray[np.int64], size: NDArray[np.int64],
        names: NDArray[np.bytes_],
    ) -> None:  # fmt: skip
        self.shards, self.shard, self.offset, self.size, self.names = shards, shard, offset, size, names
        self._forget()

    def __len__(self) -> int:
        return len(self.shard)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "process": 0, "open": OrderedDict()}

    def read(self, item: int) -> bytes:
        """See `Store.read`."""
        check_length(int(self.size[item]))
        file = self._file(int(self.shard[item]))
        file.seek(int(self.offset[item]))
        return file.read(int(self.size[item]))

    def name(self, item: int) -> str:
        """Path of the tar and the member in it."""
        return f"{self.shards[int(self.shard[item])]}:{unpacked(self.names, item)}"

    def _forget(self) -> None:
        self.process = os.getpid()
        self.open: OrderedDict[int, BinaryIO] = OrderedDict()

    def _file(self, number: int) -> BinaryIO:
        if self.process != os.getpid():  # a forked worker must not move its parent's file positions
            self._forget()
        if number not in self.open:
            if len(self.open) >= OPEN_SHARDS:
                self.open.popitem(last=False)[1].close()
            self.open[number] = open(self.shards[number], "rb")  # noqa: SIM115  # stays open between reads
        self.open.move_to_end(number)
        return self.open[number]


def open_shards(paths: list[Path]) -> Listing:
    """Images of tar files; split by the files' names (train-000.tar, val/000.tar) where all of them say so.

    Raises:
        DataError: not a plain tar, no images in it, images without a class, or a key that holds two images.
    """
    shards = [_index(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    kinds = [kind for kind in LABEL_KINDS if any(kind in shard.classes for shard in shards)]
    classes: list[str] = []
    for path, shard in zip(paths, shards, strict=True):
        classes += _classes(path, shard, kinds[0] if kinds else "")
    if not classes:
        raise DataError(f"{_count(paths)} ('{paths[0]}', ...) holds no images; expected <key>.jpg with <key>.cls")
    counts = [len(shard.names) for shard in shards]
    names = np.concatenate([shard.names for shard in shards])
    kept, left_out = np.arange(len(classes), dtype=np.int64), list[str]()
    if any(shard.foreign for shard in shards):
        place = paths[0] if len(paths) == 1 else paths[0].parent
        kept, left_out = readable_images([unpacked(names, item) for item in range(len(names))], classes, f"'{place}'")
    store = ShardStore(
        [str(path) for path in paths],
        np.repeat(np.arange(len(paths), dtype=np.int32), counts)[kept],
        np.concatenate([shard.offsets for shard in shards])[kept],
        np.concatenate([shard.sizes for shard in shards])[kept],
        names[kept],
    )
    named = [_split(path) for path in paths]
    splits = [split for split, count in zip(named, counts, strict=True) for _ in range(count) if split]
    if splits and len(splits) < len(classes):
        raise DataError(f"'{paths[named.index('')]}' is named after no split, but other shards are; name all or none")
    return Listing(
        store, [classes[item] for item in kept], [splits[item] for item in kept] if splits else None,
        f"{_count(paths)} with classes from {_origin(kinds)}", left_out,
    )  # fmt: skip


def _count(paths: list[Path]) -> str:
    return "a tar shard" if len(paths) == 1 else f"{len(paths)} tar shards"


def _origin(kinds: list[str]) -> str:
    return f".{kinds[0]} files" if kinds else "their folders"


def _split(path: Path) -> str:
    """The split a shard is named after, by its file or its folder; empty if none."""
    found = re.match(rf"({'|'.join(SPLITS)})(?![a-z])", path.name.lower())
    return found[1] if found else path.parent.name if path.parent.name in SPLITS else ""


def _classes(path: Path, shard: Shard, kind: str) -> list[str]:
    """Class of each image of a shard."""
    if kind and shard.twice:
        raise DataError(f"'{path}': two images have the key '{_key(shard.twice)}' ('{shard.twice}' is the second)")
    classes = shard.classes.get(kind, [""] * len(shard.names))
    if "" in classes:
        name = unpacked(shard.names, classes.index(""))
        expected = f"'{_key(name)}.{kind}'" if kind else "a .cls, .json or .txt file, or a class folder"
        raise DataError(f"'{path}': image '{name}' has no class; expected {expected} in the same shard")
    return classes


@lru_cache(maxsize=1 << 14)
def _index(path: str, size: int, changed: int) -> Shard:
    """Read the headers of a tar once; `size` and `changed` are there to notice another file of the name."""
    names: list[str] = []
    places: list[tuple[int, int]] = []
    labels: dict[str, dict[str, str]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isreg() or is_hidden_path(member.name):
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("the file ends early")
                ending = member.name.rsplit(".", 1)[-1].lower()
                if is_picture(member.name):
                    names.append(member.name)
                    places.append((member.offset_data, member.size))
                elif ending in LABEL_KINDS:
                    text = _text(archive, member, path)
                    label = _json_label(text) if ending == "json" else text.strip()
                    labels.setdefault(ending, {})[_key(member.name)] = nfc(label)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"'{path}' is not a whole, uncompressed tar file: {error}") from error
    keys = [_key(name) for name in names]
    # one string a class, however many images
    classes = {kind: [sys.intern(of_key.get(key, "")) for key in keys] for kind, of_key in labels.items()}
    classes[""] = [sys.intern(nfc(os.path.basename(os.path.dirname(name)))) for name in names]
    twice = _second(names, keys)
    offsets, sizes = np.array(places, dtype=np.int64).reshape(-1, 2).T
    return Shard(packed(names), offsets, sizes, classes, twice, any(map(is_foreign, names)))


def _second(names: list[str], keys: list[str]) -> str:
    """The first name whose key an earlier one has; empty if there is none."""
    seen: set[str] = set()
    for name, key in zip(names, keys, strict=True):
        if key in seen:
            return name
        seen.add(key)
    return ""


def _key(name: str) -> str:
    folder, base = os.path.split(name)
    return os.path.join(folder, base.split(".", 1)[0])


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> str:
    if member.size > LARGEST_LABEL:
        raise DataError(f"'{path}': label file '{member.name}' has {member.size} bytes, more than {LARGEST_LABEL}")
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    try:
        return file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}': label file '{member.name}' is not UTF-8 text") from error


def _json_label(text: str) -> str:
    """The label of a sample's JSON, empty if there is none."""
    try:
        values = json.loads(text)
    except ValueError:
        return ""
    values = values if isinstance(values, dict) else {}
    return next((str(values[name]).strip() for name in LABEL_COLUMNS if values.get(name) not in (None, "")), "")
