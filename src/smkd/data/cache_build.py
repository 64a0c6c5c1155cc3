"""Making the decoded images of a cache, over several processes: sizes first, then each image's pixels in its place."""

from __future__ import annotations

import mmap
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smkd.data.decoding import shape
from smkd.data.images import StoredImages
from smkd.errors import DataError
from smkd.files import PARTIAL
from smkd.machine import free_memory
from smkd.processes import end_with_parent
from smkd.progress import T, Track

Index = NDArray[np.void]
INDEX = np.dtype([("offset", "<i8"), ("height", "<i4"), ("width", "<i4"), ("check", "<u4")])
"""A row of the index; height and width are 0 for an image that could not be read."""
DECODED_AT_ONCE = 32
"""Images a process takes at a time."""
ROOM = 0.9
"""Share of the free memory that a cache may take."""
ELSEWHERE = "make room, choose another folder with data.cache_dir=<folder>, or a smaller data.cache_size"


def shrunk(picture: Image.Image, size: int | None) -> Image.Image:
    """The picture with its shorter side at `size` pixels, never larger than it was; the aspect is kept."""
    height, width = shrunk_shape(picture.height, picture.width, size)
    if (height, width) == (picture.height, picture.width):
        return picture
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def shrunk_shape(height: int, width: int, size: int | None) -> tuple[int, int]:
    """Height and width that `shrunk` gives."""
    shorter = min(height, width)
    if size is None or shorter <= size:
        return height, width
    return round(height * size / shorter), round(width * size / shorter)


def build_in_memory(images: StoredImages, size: int | None, jobs: int, track: Track | None) -> tuple[Index, Tensor]:
    """Index, and uint8 [bytes] that processes forked later share.

    Raises:
        DataError: not enough memory.
    """
    index = _layout(0, images, size, jobs, track)
    wanted, free = end(index), free_memory()
    if free is not None and wanted > ROOM * free:
        raise DataError(
            f"data.cache=memory needs {size_in_words(wanted)}, {size_in_words(free)} are free; "
            "use data.cache=mmap, or a smaller data.cache_size"
        )
    # anonymous shared pages: the processes that decode write into them
    pixels = torch.frombuffer(mmap.mmap(-1, max(1, wanted)), dtype=torch.uint8)
    _fill(pixels, index, images, size, jobs, track)
    return index, pixels


def write_pixels(
    path: Path, start: int, images: StoredImages, size: int | None, jobs: int, track: Track | None
) -> Index:
    """Write the pixels of the images into a file, from byte `start` on.

    Raises:
        DataError: the disk has too little room.
        OSError: it refused.
    """
    index = _layout(start, images, size, jobs, track)
    wanted, free = end(index), shutil.disk_usage(path.parent).free
    if wanted > free:
        raise DataError(_no_space(path.parent, f" needs {size_in_words(wanted)}, {size_in_words(free)} are free"))
    with path.open("r+b") as file:
        file.truncate(max(wanted, start))
    _fill(str(path), index, images, size, jobs, track)
    return index


def end(index: Index) -> int:
    """First byte behind the pixels of all images."""
    lengths = index["height"].astype(np.int64) * index["width"] * 3
    return int((index["offset"] + lengths).max(initial=0))


def size_in_words(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine from making a cache in the folder meanwhile.

    The lock is the kernel's and belongs to this process alone, so a killed process leaves none behind. Where the file
    system has no locks, both make the file, and the last rename puts the same bytes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        if _locked(file.fileno()):
            for left in folder.glob(f"*{PARTIAL}"):  # by a killed process
                left.unlink(missing_ok=True)
        yield


def _locked(file: int) -> bool:
    with suppress(ImportError, OSError):  # Windows; file systems without locks
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX)
        return True
    return False


def _no_space(folder: Path, problem: str) -> str:
    return f"data.cache: '{folder}'{problem}; {ELSEWHERE}"


def _layout(start: int, images: StoredImages, size: int | None, jobs: int, track: Track | None) -> Index:
    """Index whose checks are still missing; the images lie one behind the other from `start` on."""
    parts = list(_each(_Measure(images, size), len(images), jobs, track, "sizes of the images"))
    index = np.zeros(len(images), dtype=INDEX)
    index["height"], index["width"] = np.concatenate(parts).T
    lengths = index["height"].astype(np.int64) * index["width"] * 3
    index["offset"] = start + np.cumsum(lengths) - lengths
    return index


def _fill(
    place: str | Tensor, index: Index, images: StoredImages, size: int | None, jobs: int, track: Track | None
) -> None:
    """Decode the images into their places and complete the index."""
    done = 0
    for part in _each(_Decode(images, size, index, place), len(images), jobs, track, "decoding the images"):
        if isinstance(part, OSError):
            raise part
        rows = index[done : done + len(part)]
        rows["check"] = np.maximum(part, 0)
        for name in ("height", "width"):
            rows[name][part < 0] = 0
        done += len(part)


class _Measure:
    """Heights and widths of some images in the cache, int32 [images, 2]; zeros for an unreadable one."""

    def __init__(self, images: StoredImages, size: int | None) -> None:
        self.images, self.size = images, size

    def __call__(self, indices: Sequence[int]) -> NDArray[np.int32]:
        return np.array([self._shape(index) for index in indices], dtype=np.int32).reshape(-1, 2)

    def _shape(self, index: int) -> tuple[int, int]:
        try:
            return shrunk_shape(*shape(self.images.encoded(index)), self.size)
        except (DataError, OSError, ValueError):  # the one who loads the image is told
            return 0, 0


class _Decode:
    """Puts the pixels of some images where they belong; int64 [images] with their CRC-32, -1 for an unreadable one.

    An error of the disk is returned: a worker process would lose its number.
    """

    def __init__(self, images: StoredImages, size: int | None, index: Index, place: str | Tensor) -> None:
        self.images, self.size, self.index, self.place = images, size, index, place

    def __call__(self, indices: Sequence[int]) -> NDArray[np.int64] | OSError:
        try:
            return np.array([self._put(index) for index in indices], dtype=np.int64)
        except OSError as error:
            return error

    def _put(self, index: int) -> int:
        offset, height, width, _ = (int(value) for value in self.index[index])
        if height == 0:
            return -1
        try:
            picture = shrunk(self.images.picture(index), self.size)
        except DataError:
            return -1
        if (picture.height, picture.width) != (height, width):
            return -1
        data = picture.tobytes()
        if isinstance(self.place, Tensor):
            self.place.numpy()[offset : offset + len(data)] = np.frombuffer(data, dtype=np.uint8)
        else:
            with open(self.place, "r+b") as file:
                file.seek(offset)
                file.write(data)
        return zlib.crc32(data)


class _Chunks(Dataset[T]):
    def __init__(self, work: Callable[[Sequence[int]], T], count: int) -> None:
        self.work, self.count = work, count

    def __len__(self) -> int:
        return -(-self.count // DECODED_AT_ONCE)

    def __getitem__(self, chunk: int) -> T:
        return self.work(range(chunk * DECODED_AT_ONCE, min(self.count, (chunk + 1) * DECODED_AT_ONCE)))


def _each(work: Callable[[Sequence[int]], T], count: int, jobs: int, track: Track | None, title: str) -> Iterator[T]:
    """Results for chunks of consecutive images, in order."""
    chunks = _Chunks(work, count)
    workers = 0 if jobs == 1 else min(jobs, len(chunks))
    # a generator of its own: the run's random numbers stay where they are
    loader = DataLoader(
        chunks,
        batch_size=None,
        num_workers=workers,
        collate_fn=_same,
        generator=torch.Generator(),
        worker_init_fn=end_with_parent,
    )
    parts: Iterable[Any] = loader if track is None else track(loader, title, len(chunks))
    try:
        yield from parts
    except RuntimeError as error:
        raise DataError(f"data.cache: a process that decodes images was killed (out of memory?): {error}") from error


def _same(part: T) -> T:
    return part
