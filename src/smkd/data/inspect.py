"""Read every image of a split once: sizes, content hashes, faults, and statistics of the channels."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from smkd.data.color import Channels
from smkd.data.images import FileStore, Images, StoredImages, unpacked
from smkd.data.shards import ShardStore
from smkd.errors import DataError
from smkd.files import listed
from smkd.processes import deaths_named, end_with_parent
from smkd.progress import Track

SCANNED_AT_ONCE = 64
"""Images looked at in one go: what a process holds is one image and these few numbers."""
CHANNELS, LEVELS = 3, 256


@dataclass
class ImageFacts:
    """What a scan found in some images.

    Attributes:
        sizes: (height, width) of each image in pixels; zeros for an unreadable one.
        hashes: of the decoded pixels, so that copies under other names, or as another lossless file, are the same;
            empty for an unreadable image.
        files: SHA-256 in hex of each image as it is stored; empty for one that cannot be opened.
        histogram: int64 [3, 256], how many pixels of each channel have each value.
        unreadable: index and message of each image that cannot be read to its end.
    """

    sizes: list[tuple[int, int]] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros((CHANNELS, LEVELS), dtype=np.int64))
    unreadable: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: ImageFacts) -> None:
        """Put the images of another part behind these."""
        self.sizes += other.sizes
        self.hashes += other.hashes
        self.files += other.files
        self.histogram += other.histogram
        self.unreadable += other.unreadable


def look(images: StoredImages, indices: Iterable[int]) -> ImageFacts:
    """Look at some images in this process."""
    seen = ImageFacts()
    for index in indices:
        file = ""
        try:
            data = images.encoded(index)
            file = hashlib.sha256(data).hexdigest()
            picture = images.decoded(index, data)
        except DataError as error:
            seen.sizes.append((0, 0))
            seen.hashes.append(b"")
            seen.files.append(file)
            seen.unreadable.append((index, str(error)))
            continue
        seen.sizes.append((picture.height, picture.width))
        content = hashlib.blake2b(picture.tobytes(), digest_size=16, salt=f"{picture.height}x{picture.width}".encode())
        seen.hashes.append(content.digest())
        seen.files.append(file)
        seen.histogram += np.array(picture.histogram(), dtype=np.int64).reshape(CHANNELS, LEVELS)
    return seen


def scan(images: StoredImages, jobs: int, track: Track | None = None, title: str = "") -> ImageFacts:
    """Look at every image of a split, in order.

    Args:
        images: the split.
        jobs: processes; 1 looks in this one.
        track: shows progress, under `title`.
    """
    chunks = _Chunks(images)
    workers = 0 if jobs == 1 else min(jobs, len(chunks))
    parts: Iterable[ImageFacts] = DataLoader(
        chunks, batch_size=None, num_workers=workers, collate_fn=_same, worker_init_fn=end_with_parent
    )
    seen = ImageFacts()
    with deaths_named():
        for part in parts if track is None else track(parts, title, len(chunks)):
            seen.add(part)
    return seen


class _Chunks(Dataset[ImageFacts]):
    """An item is what a chunk of consecutive images holds."""

    def __init__(self, images: StoredImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return -(-len(self.images) // SCANNED_AT_ONCE)

    def __getitem__(self, chunk: int) -> ImageFacts:
        return look(self.images, range(chunk * SCANNED_AT_ONCE, min(len(self.images), (chunk + 1) * SCANNED_AT_ONCE)))


def _same(seen: Any) -> Any:
    return seen


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel on the 0-1 scale, every pixel weighing alike.

    Attributes:
        mean, std: red, green, blue.
        images: how many were read.
        pixels: how many there are in them.
        unreadable: images left out.
    """

    mean: Channels
    std: Channels
    images: int
    pixels: int
    unreadable: int = 0


def channel_statistics(histogram: NDArray[np.int64]) -> tuple[Channels, Channels]:
    """Mean and population standard deviation of each channel on the 0-1 scale.

    Args:
        histogram: int64 [3, 256], how many pixels of a channel have each value.
    """
    means, deviations = [], []
    for row in histogram:
        counts = [int(count) for count in row]  # Python's integers do not overflow
        pixels = sum(counts)
        total = sum(value * count for value, count in enumerate(counts))
        squares = sum(value * value * count for value, count in enumerate(counts))
        top = LEVELS - 1
        means.append(total / (top * pixels))
        deviations.append(math.sqrt(pixels * squares - total * total) / (top * pixels))
    return (means[0], means[1], means[2]), (deviations[0], deviations[1], deviations[2])


def image_statistics(images: StoredImages, jobs: int = 1, track: Track | None = None) -> Statistics:
    """Statistics of every readable image of a split.

    Args:
        images: the split, for normalisation the training images.
        jobs: processes.
        track: shows progress.

    Raises:
        DataError: not one image can be read.
    """
    seen = scan(images, jobs, track, "train")
    pixels = int(seen.histogram[0].sum())
    if not pixels:
        raise DataError(f"not one image can be read; the first: {seen.unreadable[0][1]}")
    mean, std = channel_statistics(seen.histogram)
    unreadable = len(seen.unreadable)
    return Statistics(mean, std, len(images) - unreadable, pixels, unreadable)


SHOWN = 3


def record_of(images: Images) -> dict[str, Any]:
    """Classes with their numbers of images, and a digest of names and sizes; plain values, for a checkpoint.

    Names are relative, so data may be moved. Pixels are not read: another image of the same name and size in bytes is
    not noticed, and of data sets of the Hub and embedded ones names alone are compared.

    Args:
        images: the training split.
    """
    counts = np.bincount(images.labels, minlength=len(images.class_names)).tolist()
    digest = hashlib.sha256(images.labels.tobytes())
    for name, size in _named(images):
        digest.update(name + b"\0%d\0" % size)
    return {"classes": dict(zip(images.class_names, counts, strict=True)), "digest": digest.hexdigest()}


def record_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What changed between two records, in a few words each; nothing if they are equal."""
    old, new = before["classes"], now["classes"]
    found = []
    for missing, what in ((old.keys() - new.keys(), "gone"), (new.keys() - old.keys(), "new")):
        if missing:
            found.append(f"{len(missing)} classes are {what} ({listed(sorted(missing))})")
    counts = [f"'{name}' {old[name]} -> {new[name]}" for name in old if name in new and old[name] != new[name]]
    if counts:
        more = ", ..." if len(counts) > SHOWN else ""
        found.append(f"{len(counts)} classes have another number of images ({', '.join(counts[:SHOWN])}{more})")
    if not found and before["digest"] != now["digest"]:
        found.append("as many images as before, but with other names or sizes")
    return found


def _named(images: Images) -> Iterable[tuple[bytes, int]]:
    """Name and size in bytes of each image; 0 where only reading it would tell."""
    if not isinstance(images, StoredImages):
        return ((os.fsencode(images.name(index)), 0) for index in range(len(images)))
    store, items = images.store, images.items.tolist()
    if isinstance(store, FileStore):
        return ((os.fsencode(unpacked(store.paths, item)), _size(store.name(item))) for item in items)
    if isinstance(store, ShardStore):
        return ((os.fsencode(unpacked(store.names, item)), int(store.size[item])) for item in items)
    return ((os.fsencode(store.name(item)), 0) for item in items)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # an unreadable image, which is reported when it is loaded
        return -1
