"""Decoded images kept for repeat epochs: in a memory-mapped file that all processes of a machine share, or in memory.

    <data folder>/.smkd-cache/<split>-<size>-<settings>-<key>.images

    header   magic, key, number of images, CRC-32 of this and of the index
    index    one row an image: where its pixels lie, height, width, their CRC-32
    pixels   uint8 [height, width, 3] of one image after the other, each of its own size

The key names the images, their files' sizes and times of change, and Pillow's version: whatever changes the pixels
leads to another file, which takes the place of those with the same settings. The file is written aside, synced and
renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from torch import Tensor

from smkd.config.schema import DataConfig
from smkd.data import cache_build
from smkd.data.cache_build import INDEX, Index, shrunk, size_in_words
from smkd.data.decoding import pixels
from smkd.data.hub import PREFIX, HubStore
from smkd.data.images import FileStore, Images, StoredImages
from smkd.data.shards import ShardStore
from smkd.errors import DataError, SmkdWarning
from smkd.files import explained, sha256, written_aside
from smkd.processes import default_jobs
from smkd.progress import Track

FOLDER = ".smkd-cache"
MAGIC = b"smkd-im2"
HEADER = struct.Struct("<8s32sQI4x")
"""Magic, key, number of images, CRC-32 of the key, the number and the index."""
PAGE = 4096
"""Pixels begin at a page, so that reading the index touches none of them."""


class CachedImages:
    """Images that were decoded once.

    Args:
        source: the split they come from. Images that could not be read are asked for there again, so they end in the
            same `DataError`; so are images whose cached pixels are damaged.
        size: shorter side in pixels at most; none keeps the size.
        index: where each image lies.
        pixels: uint8 [bytes], what the index points into. Not to be written to.
        path: the file that it maps; none if it is memory.
    """

    def __init__(
        self, source: StoredImages, size: int | None, index: Index, pixels: Tensor, path: Path | None = None
    ) -> None:
        self.labels, self.class_names = source.labels, source.class_names
        self.source, self.size, self.index, self.pixels, self.path = source, size, index, pixels, path
        self._trusted = np.full(len(source), path is None)

    def __len__(self) -> int:
        return len(self.source)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pixels": self.pixels if self.path is None else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.path is not None:
            self.pixels = _mapped(self.path)

    @property
    def description(self) -> str:
        """One line for the user: where the images are, and how large."""
        side = "original size" if self.size is None else f"shorter side {self.size}"
        return f"decoded images ({side}, {size_in_words(len(self.pixels))}): {self.path or 'in memory'}"

    def load(self, index: int) -> Tensor:
        """See `Images.load`; the result may be read only."""
        offset, height, width, check = (int(value) for value in self.index[index])
        if height == 0:
            return self._fresh(index)
        flat = self.pixels[offset : offset + height * width * 3]
        if not self._trusted[index]:
            # once a process: the disk may have changed what was written
            if zlib.crc32(flat.numpy().data) != check:
                self._give_up(index)
                return self._fresh(index)
            self._trusted[index] = True
        return flat.view(height, width, 3).permute(2, 0, 1)

    def name(self, index: int) -> str:
        """See `Images.name`."""
        return self.source.name(index)

    def _fresh(self, index: int) -> Tensor:
        picture = shrunk(self.source.picture(index), self.size)
        return torch.from_numpy(pixels(picture)).permute(2, 0, 1)

    def _give_up(self, index: int) -> None:
        """Use the source for this image from now on, and let the next run make the file anew."""
        self.index["height"][index] = 0
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        warnings.warn(
            f"'{self.path}' is damaged at image '{self.name(index)}', which is decoded instead; "
            "the next run makes the cache anew",
            SmkdWarning,
            stacklevel=3,
        )


def cached(images: Images, config: DataConfig, split: str, track: Track | None = None) -> Images:
    """The images as `data.cache` asks for them.

    Images that are already in memory (`patterns`) are returned unchanged.

    Args:
        images: one split, as `open_split` gives it.
        config: the cache's kind, size and folder.
        split: its name.
        track: shows progress while the cache is made.

    Raises:
        DataError: no space, no memory, or no permission for the cache.
    """
    if config.cache == "none" or not isinstance(images, StoredImages):
        return images
    if config.cache == "memory":
        index, pixels = cache_build.build_in_memory(images, config.cache_size, default_jobs(), track)
        return CachedImages(images, config.cache_size, index, pixels)
    key = cache_key(images, config, split)
    places = [folder / f"{_asked_for(folder, config, split)}-{key.hex()[:16]}.images" for folder in _folders(config)]
    for path in places:
        if (found := _opened(path, key)) is not None:
            return CachedImages(images, config.cache_size, *found, path)
    path = next((place for place in places if _may_write(place.parent)), places[-1])
    advice = cache_build.ELSEWHERE
    with explained(path, DataError, option="data.cache", advice=advice), cache_build.alone(path.parent):
        # another process may have made it while this one waited
        found = _opened(path, key)
        if found is None:
            _build(path, key, images, config.cache_size, track)
            found = _opened(path, key)
            for outdated in path.parent.glob(f"{_asked_for(path.parent, config, split)}-*.images"):
                if outdated != path:
                    with suppress(OSError):  # in use, where the system minds
                        outdated.unlink()
    if found is None:
        raise DataError(f"data.cache: '{path}' was written but does not read back; set data.cache_dir=<folder>")
    return CachedImages(images, config.cache_size, *found, path)


def cache_key(images: StoredImages, config: DataConfig, split: str) -> bytes:
    """32 bytes that differ when the decoded images may.

    Over the split, the size, `dataset.json` where there is one, which images in which order, and the size and time of
    change of the files that hold them. Paths are relative: a folder that is moved keeps its cache.
    """
    manifest = config.root / "dataset.json" if config.root is not None else None
    about = {
        "magic": MAGIC.decode(), "pillow": PIL.__version__, "split": split, "size": config.cache_size,
        "manifest": sha256(manifest) if manifest and manifest.is_file() else None,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(about).encode())
    store, items = images.store, images.items
    match store:
        case FileStore():
            digest.update(store.paths[items].tobytes())
            files = [store.name(int(item)) for item in items]
        case ShardStore():
            for array in (store.names, store.shard, store.offset, store.size):
                digest.update(array[items].tobytes())
            files = store.shards
        case HubStore():
            digest.update(items.tobytes() + json.dumps(store.names).encode())
            files = [str(file["filename"]) for table in store.tables for file in table.cache_files]
        case _:
            raise TypeError(f"no key for {type(store).__name__}")
    digest.update(np.array([_stamp(file) for file in files], dtype=np.int64).tobytes())
    return digest.digest()


def _asked_for(folder: Path, config: DataConfig, split: str) -> str:
    """Beginning of a file name: the same for all states of the same images of the same data set."""
    names = {"dataset", "split_by", "split_seed", "split_file", "label_column", "limit_per_class"}
    settings = config.model_dump(mode="json", include=names)
    if folder.name != FOLDER:  # shared by several data sets
        settings["root"] = str(config.root)
    short = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{split}-{config.cache_size or 'original'}-{short}"


def _stamp(file: str) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except OSError:  # an unreadable image, which is reported when it is loaded
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _folders(config: DataConfig) -> list[Path]:
    """Where the cache may lie, in the order of preference."""
    if config.cache_dir is not None:
        return [config.cache_dir]
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smkd"
    if config.root is None or config.root.as_posix().startswith(PREFIX):
        return [user]
    beside = config.root if config.root.is_dir() else config.root.parent
    return [beside / FOLDER, user]


def _may_write(folder: Path) -> bool:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return os.access(there, os.W_OK | os.X_OK)


def _build(path: Path, key: bytes, images: StoredImages, size: int | None, track: Track | None) -> None:
    start = -(-(HEADER.size + len(images) * INDEX.itemsize) // PAGE) * PAGE
    with written_aside(path) as aside:
        index = cache_build.write_pixels(aside, start, images, size, default_jobs(), track)
        with aside.open("r+b") as file:
            file.write(HEADER.pack(MAGIC, key, len(index), _index_check(key, index)) + index.tobytes())


def _opened(path: Path, key: bytes) -> tuple[Index, Tensor] | None:
    """Index and pixels of a cache file; none if it is not there, of other images, cut short or damaged."""
    try:
        with path.open("rb") as file:
            head = file.read(HEADER.size)
            length = os.fstat(file.fileno()).st_size
            if len(head) < HEADER.size:
                return None
            magic, found, count, check = HEADER.unpack(head)
            if (magic, found) != (MAGIC, key) or HEADER.size + count * INDEX.itemsize > length:
                return None
            index = np.frombuffer(file.read(count * INDEX.itemsize), dtype=INDEX).copy()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    if _index_check(key, index) != check or length < cache_build.end(index):
        return None
    return index, _mapped(path)


def _mapped(path: Path) -> Tensor:
    pixels: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(pixels)


def _index_check(key: bytes, index: Index) -> int:
    return zlib.crc32(index.tobytes(), zlib.crc32(key + struct.pack("<Q", len(index))))
