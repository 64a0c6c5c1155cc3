"""Feature files: HDF5 in the layout of the published code, read without copying and written aside, then renamed.

all_feats    float32 [capacity, dim]
all_labels   integers [capacity]; rows past `count` are padding in both
count        integer [1]
attributes   the fields of `Source`; other programs' files do without
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smkd import __version__
from smkd.errors import DataError
from smkd.fewshot.features import Features

DATASETS = ("all_feats", "all_labels", "count")
CHECK_NUMBERS = 2**20
"""Numbers looked at together when searching for NaN: 4 MB of float32."""
SHOWN_ROWS = 5
MOST_RATIO = 200
"""Compressed numbers may have so many times the bytes that the file has of them. Features compress to a half; only
zeros, as in rows that were never filled, shrink more."""
SMALL = 2**24
"""Bytes that any file may claim."""


@dataclass(frozen=True)
class Source:
    """Where features come from, as attributes of the file. Empty or 0 is unknown.

    Attributes:
        model: the network in words.
        checkpoint_sha256: of the checkpoint file.
        dataset, split: what was read.
        transform: from image to input, such as 'resize 360, crop 320'.
        parts, blocks: which tokens of how many last blocks.
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
    blocks: int = 0
    class_names: tuple[str, ...] = ()
    skipped: int = 0
    smkd_version: str = ""


class FeatureWriter:
    """Writes a feature file batch by batch; nothing is at `path` until all of it is on disk.

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

    def __init__(self, path: Path, *, rows: int, dim: int, source: Source) -> None:
        self.path, self.rows, self.dim = path, rows, dim
        self.source = replace(source, smkd_version=__version__)
        self.aside = path.with_name(f".{path.name}.partial")
        self.labels = np.zeros(rows, np.int64)
        self.count = 0

    def __enter__(self) -> Self:
        with _writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_dir():
                raise DataError(f"cannot write '{self.path}': it is a folder")
            self.file = self.aside.open("wb")
        try:
            with _writing(self.path):
                header = _header(self.labels, self.count, self.dim, self.source)
                self.size = len(header) + 4 * self.rows * self.dim
                free = shutil.disk_usage(self.path.parent).free
                if self.size > free:
                    raise DataError(f"cannot write '{self.path}': needs {self.size:,} bytes, {free:,} are free")
                self.file.write(header)
        except BaseException:
            self._discard()
            raise
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
        with _writing(self.path):
            self.file.write(values.detach().cpu().numpy().astype("<f4", order="C", copy=False).data)
        self.labels[self.count : end] = labels
        self.count = end

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _finish(self) -> None:
        if not self.count:
            raise DataError(f"cannot write '{self.path}': not one image of the split can be read")
        with _writing(self.path):
            self.file.truncate(self.size)  # the padding
            self.file.seek(0)
            source = replace(self.source, skipped=self.rows - self.count)
            self.file.write(_header(self.labels, self.count, self.dim, source))
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.aside.replace(self.path)

    def _discard(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            self.aside.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kept = "; the file that was there is kept" if path.is_file() else ""
        raise DataError(f"cannot write '{path}': {error.strerror or error}{kept}") from error


def _header(labels: NDArray[np.int64], count: int, dim: int, source: Source) -> bytes:
    """The file up to its features, which are the last in it: as long for any labels, `count` and number skipped.

    HDF5 only lays the file out, in memory. It never writes to disk, where a write that fails leaves the library with a
    file it cannot close, and ends the process later with a segmentation fault.
    """
    memory = io.BytesIO()
    with h5py.File(memory, "w", libver="v108", alignment_threshold=1, alignment_interval=64) as file:
        features = file.create_dataset("all_feats", (len(labels), dim), "<f4")
        file["all_labels"] = labels
        file["count"] = np.array([count])
        for field in fields(Source):
            value = getattr(source, field.name)
            if isinstance(value, int):
                file.attrs[field.name] = value
            elif value:
                file.attrs[field.name] = _utf8(value) if isinstance(value, str) else [_utf8(text) for text in value]
        file.flush()
        features[0, 0] = 0  # the first number written gives the features their place, after all that is there
        offset = features.id.get_offset()
    return memory.getvalue()[:offset]


def _utf8(text: str) -> str:
    """Text as it is, but for bytes of a folder's name that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_features(path: Path) -> Features:
    """Features of a file, in the order of its rows.

    Where they are stored as plain float32 they are mapped copy-on-write: pages come from the file as they are touched,
    and writing to the tensor never reaches it. Replacing the file is safe, writing into it meanwhile is not. Anything
    else (compressed, float16, float64) is loaded.

    Raises:
        DataError: the file is missing, cut short, of another layout, or its rows fail `check_features`.
    """
    with _opened(path) as file:
        features, labels, count = _layout(file, path)
        values = torch.from_numpy(_mapped(path, features, count))
        numbers, source = labels[:count], _source(file)
    return replace(check_features(values, numbers, source.class_names, where=f"'{path}'"), skipped=source.skipped)


def read_source(path: Path) -> Source:
    """What a feature file says about its origin.

    Raises:
        DataError: the file is missing, cut short or of another layout.
    """
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
    for name in DATASETS:
        if name in names and _leads_out(file, name, names):
            raise DataError(f"'{path}': {name} is a link to another place; numbers should be in the file itself")
    if not all(name in names and isinstance(file[name], h5py.Dataset) for name in DATASETS):
        found = ", ".join(sorted(names)) or "nothing"
        raise DataError(f"'{path}' is no feature file: it holds {found}; expected {', '.join(DATASETS)}")
    features, labels, count = (file[name] for name in DATASETS)
    _check_form(features, labels, f"'{path}'")
    if count.size != 1 or count.dtype.kind not in "iu":
        raise DataError(f"'{path}': count is {count.dtype} {_shape(count)}, expected one integer")
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
        raise DataError(f"'{path}': {name} is {_shape(dataset)}, but no number of it was ever written")
    # a chunk is read whole
    chunk = math.prod(dataset.chunks) * dataset.dtype.itemsize if dataset.chunks else 0
    most = stored if dataset.chunks is None else max(SMALL, MOST_RATIO * stored)
    if stored > path.stat().st_size or max(wanted, chunk) > most:
        raise DataError(
            f"cannot read '{path}': {name} claims {max(wanted, chunk):,} bytes, of which the file holds {stored:,}"
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


def _source(file: Any) -> Source:
    known = [field for field in fields(Source) if field.name in file.attrs]
    return Source(**{field.name: _plain(file.attrs[field.name], field.default) for field in known})


def _plain(value: Any, default: object) -> Any:
    """An attribute as the type of its default."""
    if isinstance(default, tuple):
        return tuple(_text(item) for item in np.ravel(value))
    return int(np.asarray(value).item()) if isinstance(default, int) else _text(value)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def check_features(
    values: Tensor | NDArray[Any], labels: Tensor | NDArray[Any], class_names: Sequence[str] = (), *,
    where: str = "features",
) -> Features:  # fmt: skip
    """Features made of plain arrays, checked.

    Args:
        values: floats [rows, dim]; float32 is not copied.
        labels: integers [rows]. They become 0..C-1 in their order, unless they already count through `class_names`.
        class_names: name of each label; 'class 7' for the integer 7 without.
        where: for messages, what the features are called.

    Raises:
        DataError: no rows, other shapes or types, names that do not match the labels, or NaN or infinite rows (counted
            and named; too large for float32 is infinite).
    """
    integers = labels.cpu().numpy() if isinstance(labels, Tensor) else labels
    _check_form(values, integers, where)
    if not len(values):
        raise DataError(f"{where}: no rows")
    names = list(class_names)
    present, ranks = np.unique(integers, return_inverse=True)
    if names and present[0] >= 0 and present[-1] < len(names):
        ranks = integers
    elif names and len(names) != len(present):
        raise DataError(f"{where}: {len(names)} class names, but {len(present)} labels from {present[0]} on")
    features = Features(_float32(values), ranks.astype(np.int64), names or [f"class {label}" for label in present])
    _check_finite(features, where)
    return features


def _check_form(values: Any, labels: Any, where: str) -> None:
    """Types and shapes of tensors, arrays or HDF5 datasets."""
    floats = values.is_floating_point() if isinstance(values, Tensor) else values.dtype.kind == "f"
    # an HDF5 dataset without any extent has no shape
    if not floats or len(values.shape or ()) != 2 or not values.shape[1]:
        raise DataError(f"{where}: features are {values.dtype} {_shape(values)}, expected floats [rows, dim]")
    if labels.dtype.kind not in "iu" or len(labels.shape or ()) != 1:
        raise DataError(f"{where}: labels are {labels.dtype} {_shape(labels)}, expected integers [rows]")
    if len(labels) != len(values):
        raise DataError(f"{where}: labels not matching features ({len(labels)} labels, {len(values)} features)")


def _shape(array: Any) -> list[int]:
    return list(array.shape or ())


def _float32(values: Tensor | NDArray[Any]) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().float()
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))


def _check_finite(features: Features, where: str) -> None:
    step = max(1, CHECK_NUMBERS // features.values.shape[1])
    count, first = 0, list[int]()
    for start in range(0, len(features.values), step):
        bad = (~features.values[start : start + step].isfinite().all(dim=1)).nonzero().flatten()
        count += len(bad)
        first += (start + bad[: SHOWN_ROWS - len(first)]).tolist()
    if count:
        rows = ", ".join(map(str, first)) + (", ..." if count > SHOWN_ROWS else "")
        name = features.class_names[features.labels[first[0]]]
        raise DataError(
            f"{where}: {count} of {len(features.values)} rows are NaN or infinite "
            f"(rows {rows}, counted from 0; the first is of class '{name}')"
        )
