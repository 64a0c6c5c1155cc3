"""Looking at every image of a split once, over several processes: size, content hash, channel histogram, faults."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from smkd.data.images import StoredImages
from smkd.data.processes import deaths_named, end_with_parent
from smkd.errors import DataError
from smkd.progress import Track

CHUNK = 64
"""Images looked at in one go: what a process holds is one image and these few numbers."""
CHANNELS, LEVELS = 3, 256


@dataclass
class Seen:
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

    def add(self, other: Seen) -> None:
        """Put the images of another part behind these."""
        self.sizes += other.sizes
        self.hashes += other.hashes
        self.files += other.files
        self.histogram += other.histogram
        self.unreadable += other.unreadable


def look(images: StoredImages, indices: Iterable[int]) -> Seen:
    """Look at some images in this process."""
    seen = Seen()
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


def scan(images: StoredImages, jobs: int, track: Track | None = None, title: str = "") -> Seen:
    """Look at every image of a split, in order.

    Args:
        images: the split.
        jobs: processes; 1 looks in this one.
        track: shows progress, under `title`.
    """
    chunks = _Chunks(images)
    workers = 0 if jobs == 1 else min(jobs, len(chunks))
    parts: Iterable[Seen] = DataLoader(
        chunks, batch_size=None, num_workers=workers, collate_fn=_same, worker_init_fn=end_with_parent
    )
    seen = Seen()
    with deaths_named():
        for part in parts if track is None else track(parts, title, len(chunks)):
            seen.add(part)
    return seen


class _Chunks(Dataset[Seen]):
    """An item is what a chunk of consecutive images holds."""

    def __init__(self, images: StoredImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return -(-len(self.images) // CHUNK)

    def __getitem__(self, chunk: int) -> Seen:
        return look(self.images, range(chunk * CHUNK, min(len(self.images), (chunk + 1) * CHUNK)))


def _same(seen: Any) -> Any:
    return seen
