"""Feature files: HDF5 in the layout of the published code, read without copying and written aside, then renamed.

all_feats    float32 [capacity, dim]
all_labels   integers [capacity]; rows past `count` are padding in both
count        integer [1]
attributes   the fields of `FeatureSource`; files of other programs have none
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smkd import __version__
from smkd.config.schema import MOST_BLOCKS
from smkd.errors import DataError
from smkd.fewshot.features import Features, check_features, check_form, shape_in_words
from smkd.files import expanded, explained, written_aside

HDF5_DATASETS = ("all_feats", "all_labels", "count")
MOST_RATIO = 200
"""Compressed numbers may have so many times the bytes that the file has of them. Features compress to a half; only
zeros, as in rows that were never filled, shrink more."""
SMALL = 2**24
"""Bytes that any file may claim."""


@dataclass(frozen=True)
class FeatureSource:
    """Where features come from, as attributes of the file. Empty or 0 is unknown.

    Attributes:
        model: the network in words.
        checkpoint_sha256: of the checkpoint file.
        dataset, split: what was read.
        transform: from image to input, such as 'resize 360, crop 320'.
        parts: which tokens.
        blocks: of which blocks, counted from 1; from the end (-1 is the last) in files of before, which say how many.
        class_names: name of each label.
        skipped: unreadable images that were left out. Filled in by the writer.
        smkd_version: Filled in by the writer.
    """

    model: str = ""
    checkpoint_sha256: str = ""
    dataset: str = ""
    split: str = ""
    transform: str = ""
    parts: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    skipped: int = 0
    smkd_version: str = ""


class FeatureWriter:
    """Writes a feature file batch by batch; `path` appears when the whole file is on disk.

    with FeatureWriter(path, rows=len(images), dim=768, source=source) as writer:
        writer.append(values, labels)

    An exception, Ctrl-C included, removes what was written and leaves a file that was there before as it was.

    Args:
        path: the file; missing folders are made.
        rows: images of the split, at least 1. Fewer may be appended: the others count as skipped.
        dim: numbers a row.
        source: for the attributes.

    Raises:
        DataError: the file cannot be written (no space, no permission), or not one row was appended.
    """

    def __init__(self, path: Path, *, rows: int, dim: int, source: FeatureSource) -> None:
        self.path, self.rows, self.dim = expanded(path), rows, dim
        self.source = replace(source, smkd_version=__version__)
        self.stack = contextlib.ExitStack()
        self.labels = np.zeros(rows, np.int64)
        self.count = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            with explained(self.path, DataError):
                self.file = stack.enter_context(stack.enter_context(written_aside(self.path)).open("wb"))
                header = _header(self.labels, self.count, self.dim, self.source)
                self.size = len(header) + 4 * self.rows * self.dim
                free = shutil.disk_usage(self.path.parent).free
                if self.size > free:
                    raise DataError(f"cannot write '{self.path}': needs {self.size:,} bytes, {free:,} are free")
                self.file.write(header)
            self.stack = stack.pop_all()
        return self

    def append(self, values: Tensor, labels: NDArray[np.int64]) -> None:
        """Write the next rows.

        Args:
            values: float32 [n, dim].
            labels: int64 [n].

        Raises:
            DataError: they cannot be written.
            ValueError: shapes that do not fit each other or the file.
        """
        end = self.count + len(labels)
        if values.shape != (len(labels), self.dim) or end > self.rows:
            given = f"features {list(values.shape)} and {len(labels)} labels after {self.count} rows"
            raise ValueError(f"{given} do not fit a file of [{self.rows}, {self.dim}]")
        with explained(self.path, DataError):
            self.file.write(values.detach().cpu().numpy().astype("<f4", order="C", copy=False).data)
        self.labels[self.count : end] = labels
        self.count = end

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):  # what is left in the buffer
                self.stack.__exit__(kind, error, trace)
            return
        with explained(self.path, DataError), self.stack:
            self._finish()

    def _finish(self) -> None:
        if not self.count:
            raise DataError(f"cannot write '{self.path}': not one image of the split can be read")
        self.file.truncate(self.size)  # the padding
        self.file.seek(0)
        source = replace(self.source, skipped=self.rows - self.count)
        self.file.write(_header(self.labels, self.count, self.dim, source))


def _header(labels: NDArray[np.int64], count: int, dim: int, source: FeatureSource) -> bytes:
    """The file up to its features, which are the last in it: as long for any labels, `count` and number skipped.

    HDF5 only lays the file out, in memory. It never writes to disk, where a write that fails leaves the library with a
    file it cannot close, and ends the process later with a segmentation fault.
    """
    memory = io.BytesIO()
    with h5py.File(memory, "w", libver="v108", alignment_threshold=1, alignment_interval=64) as file:
        features = file.create_dataset("all_feats", (len(labels), dim), "<f4")
        file["all_labels"] = labels
        file["count"] = np.array([count])
        for field in fields(FeatureSource):
            value = getattr(source, field.name)
            if isinstance(value, int):
                file.attrs[field.name] = value
            elif value:
                file.attrs[field.name] = (
                    _utf8(value) if isinstance(value, str) else [_attribute(each) for each in value]
                )
        file.flush()
        features[0, 0] = 0  # the first number written gives the features their place, after all that is there
        offset = features.id.get_offset()
    return memory.getvalue()[:offset]


def _attribute(each: int | str) -> int | str:
    return _utf8(each) if isinstance(each, str) else each


def _utf8(text: str) -> str:
    """Text as it is, but for bytes of a folder's name that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_features(path: str | Path) -> Features:
    """Features of a file, in the order of its rows.

    Plain float32 features are mapped copy-on-write: pages are read when they are used, and writing to the tensor does
    not change the file. You may replace the file meanwhile, but not write into it. Other features (compressed,
    float16, float64) are loaded.

    Raises:
        DataError: the file is missing, cut short, of another layout, or its rows fail `check_features`.
    """
    path = expanded(path)
    with _opened(path) as file:
        features, labels, count = _layout(file, path)
        values = torch.from_numpy(_mapped(path, features, count))
        numbers, source = labels[:count], _source(file)
    return replace(check_features(values, numbers, source.class_names, where=f"'{path}'"), skipped=source.skipped)


def read_source(path: str | Path) -> FeatureSource:
    """What a feature file says about its origin.

    Raises:
        DataError: the file is missing, cut short or of another layout.
    """
    path = expanded(path)
    with _opened(path) as file:
        _layout(file, path)
        return _source(file)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise DataError(f"cannot read '{path}': it is not a regular file")
    try:
        path.open("rb").close()
    except FileNotFoundError as error:
        raise DataError(f"feature file '{path}' does not exist") from error
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror}") from error
    if not h5py.is_hdf5(path):
        raise DataError(f"'{path}' is not an HDF5 file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        reason = str(error).split("\n")[0].strip("'\"")
        raise DataError(f"cannot read '{path}': cut short or damaged ({reason})") from error


def _layout(file: Any, path: Path) -> tuple[Any, Any, int]:
    """Features, labels and the number of rows that count."""
    names = list(file)
    for name in HDF5_DATASETS:
        if name in names and _leads_out(file, name, names):
            raise DataError(f"'{path}': {name} is a link to another place; numbers should be in the file itself")
    if not all(name in names and isinstance(file[name], h5py.Dataset) for name in HDF5_DATASETS):
        found = ", ".join(sorted(names)) or "nothing"
        raise DataError(f"'{path}' is no feature file: it holds {found}; expected {', '.join(HDF5_DATASETS)}")
    features, labels, count = (file[name] for name in HDF5_DATASETS)
    check_form(features, labels, f"'{path}'")
    if count.size != 1 or count.dtype.kind not in "iu":
        raise DataError(f"'{path}': count is {count.dtype} {shape_in_words(count)}, expected one integer")
    _check_stored(count, path, 1)
    rows = int(np.asarray(count[()]).item())
    if not 0 <= rows <= len(features):
        raise DataError(f"'{path}': count is {rows}, but there are {len(features)} rows")
    _check_stored(features, path, rows)
    _check_stored(labels, path, rows)
    return features, labels, rows


def _leads_out(file: Any, name: str, names: list[str]) -> bool:
    """Whether a name is a link that may lead to another file; it is not followed to see where."""
    link = file.get(name, getlink=True)
    if isinstance(link, h5py.SoftLink):
        target = link.path.removeprefix("/")
        if target not in names:
            return "/" in target
        link = file.get(target, getlink=True)
    return not isinstance(link, h5py.HardLink)


def _check_stored(dataset: Any, path: Path, rows: int) -> None:
    """Refuse rows of numbers that are in other files, were never written, or that the file is too small to hold."""
    name = dataset.name.strip("/")
    if dataset.external or dataset.is_virtual:
        raise DataError(f"'{path}': {name} is stored in other files; numbers should be in the file itself")
    stored = dataset.id.get_storage_size()
    wanted = rows * math.prod(dataset.shape[1:]) * dataset.dtype.itemsize
    if wanted and not stored:
        raise DataError(f"'{path}': {name} is {shape_in_words(dataset)}, but no number of it was ever written")
    # a chunk is read whole
    chunk = math.prod(dataset.chunks) * dataset.dtype.itemsize if dataset.chunks else 0
    most = stored if dataset.chunks is None else max(SMALL, MOST_RATIO * stored)
    if stored > path.stat().st_size or max(wanted, chunk) > most:
        raise DataError(
            f"cannot read '{path}': {name} claims {max(wanted, chunk):,} bytes, of which the file holds {stored:,}"
        )
    if dataset.chunks is not None:
        _check_chunks(dataset, path, rows)


def _check_chunks(dataset: Any, path: Path, rows: int) -> None:
    """Refuse rows of which a chunk was never written: they would be read as zeros."""
    all_chunks = math.prod(-(-size // length) for size, length in zip(dataset.shape, dataset.chunks, strict=True))
    if dataset.id.get_num_chunks() == all_chunks:
        return
    sides = (range(0, size, length) for size, length in zip((rows, *dataset.shape[1:]), dataset.chunks, strict=True))
    for place in itertools.product(*sides):
        if not dataset.id.get_chunk_info_by_coord(place).size:
            last = min(rows, place[0] + dataset.chunks[0]) - 1
            name = dataset.name.strip("/")
            raise DataError(
                f"'{path}': rows {place[0]} to {last} of {name} were never written in whole; make the file again"
            )


def _mapped(path: Path, features: Any, count: int) -> NDArray[np.float32]:
    """The first rows of `all_feats`, mapped if they lie in the file as memory would hold them."""
    offset = features.id.get_offset()  # None for chunks
    if offset is None or offset % 4 or features.dtype != np.float32 or not count:
        loaded: NDArray[np.float32] = features.astype(np.float32)[:count]
        return loaded
    if offset + 4 * features.size > path.stat().st_size:
        # touching pages past the end would kill the process
        raise DataError(f"cannot read '{path}': cut short within all_feats")
    return np.memmap(path, np.float32, mode="c", offset=offset, shape=(count, features.shape[1]))


def _source(file: Any) -> FeatureSource:
    known = [field for field in fields(FeatureSource) if field.name in file.attrs]
    values = {field.name: _plain(file.attrs[field.name], field.default) for field in known if field.name != "blocks"}
    return FeatureSource(**values, blocks=_blocks(file.attrs.get("blocks", 0)))


def _blocks(given: Any) -> tuple[int, ...]:
    """Block numbers; files of before have one number, which is how many last ones."""
    numbers = np.asarray(given)
    if numbers.ndim:
        return tuple(int(number) for number in numbers)
    return tuple(range(-min(max(int(numbers), 0), MOST_BLOCKS), 0))


def _plain(value: Any, default: object) -> Any:
    """An attribute as the type of its default."""
    if isinstance(default, tuple):
        return tuple(_text(item) for item in np.ravel(value))
    return int(np.asarray(value).item()) if isinstance(default, int) else _text(value)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
