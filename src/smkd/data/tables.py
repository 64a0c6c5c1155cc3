"""A CSV or Parquet table of image paths and labels, also one table per split as Ravi and Larochelle's lists."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from smkd.data.formats import nfc
from smkd.data.images import SPLITS, FileStore, Store, readable_images
from smkd.data.splits import check_columns, check_split, read_csv
from smkd.errors import DataError
from smkd.files import listed

PATH_COLUMNS = ("path", "filename", "file_name")
LABEL_COLUMNS = ("label", "class")
TABLE_SUFFIXES = (".csv", ".parquet")
DRIVE = re.compile(r"[A-Za-z]:[\\/]")
NEEDS_HF = "pip install 'smkd[hf]'"


@dataclass(frozen=True)
class Listing:
    """Every image of a data set that is not class folders.

    Attributes:
        store: the images.
        classes: class of each.
        splits: split of each; none if the data set has no splits of its own.
        form: what it is, in a few words.
        left_out: see `StoredImages`.
        labelled: whether the images have classes.
    """

    store: Store
    classes: list[str]
    splits: list[str] | None
    form: str
    left_out: list[str] = field(default_factory=list)
    labelled: bool = True


def is_image_table(path: Path) -> bool:
    """Whether a CSV or Parquet file names images, by its columns."""
    if path.suffix.lower() == ".parquet":
        names = [name.lower() for name, kind in parquet_columns(path).items() if kind == "string"]
    else:
        try:
            with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
                cells = next(csv.reader(file), [])
        except (OSError, csv.Error):
            return False
        # also with a wrong separator, which `read_csv` names
        names = [name.strip().lower() for cell in cells for name in re.split("[;|\t]", cell)]
    return any(name in PATH_COLUMNS for name in names)


def open_tables(paths: list[Path], label_column: str | None = None) -> Listing:
    """Images that tables name: columns path, filename or file_name, label or class, and optionally split.

    Paths are relative to the table's folder, or to images/ beside it, where miniImageNet's lists expect them.

    Args:
        paths: one table, or tables named after their splits (train.csv, ...).
        label_column: the column that holds the class, if it is not called label or class.

    Raises:
        DataError: a column is missing or there twice, a cell is empty, an image is absent or listed twice.
    """
    by_file = all(path.stem.lower() in SPLITS for path in paths)
    folder = paths[0].parent
    look = _Folders(folder)
    first: dict[str, tuple[Path, int]] = {}
    images: list[str] = []
    classes: list[str] = []
    splits: list[str] = []
    for path in paths:
        columns = None
        for line, row in _rows(path):
            columns = columns or _columns(row, path, label_column)
            image, label = row[columns[0]], nfc(row[columns[1]].strip())
            if not image.strip() or not label:
                empty = columns[1] if image.strip() else columns[0]
                raise DataError(f"'{path}', line {line}: the column '{empty}' is empty")
            known, before = first.setdefault(look.place(image), (path, line))
            if (known, before) != (path, line):
                raise DataError(
                    f"'{path}', line {line}: '{image}' is listed twice (first in '{known.name}', line {before})"
                )
            images.append(image)
            classes.append(label)
            if "split" in row and not by_file:
                splits.append(check_split(row["split"].strip(), path, line))
        if columns is None:
            raise DataError(f"table '{path}' has no rows")
        if by_file:
            splits += [path.stem.lower()] * (len(classes) - len(splits))
    name = ", ".join(path.name for path in paths)
    kept, left_out = readable_images(images, classes, name)
    store = FileStore(folder, _located(look, [images[item] for item in kept], name))
    return Listing(
        store, [classes[item] for item in kept], [splits[item] for item in kept] if splits else None,
        f"a table of paths and labels ({name})", left_out,
    )  # fmt: skip


def parquet_columns(path: Path) -> dict[str, str]:
    """Type of each column of a Parquet file: 'string', 'image' (bytes, or a struct with bytes) or 'other'.

    Raises:
        DataError: pyarrow is not installed, or the file is not Parquet.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"reading '{path}' needs the extra: {NEEDS_HF}") from error
    try:
        schema = pyarrow.parquet.read_schema(path)
        check_columns([name.lower() for name in schema.names], path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"'{path}' is not a Parquet file: {_first_line(error)}") from error
    types = pyarrow.types
    kinds = {}
    for column in schema:
        inner = column.type.field("bytes").type if _has_bytes(column.type, types) else column.type
        is_text = types.is_string(inner) or types.is_large_string(inner)
        is_bytes = types.is_binary(inner) or types.is_large_binary(inner)
        kinds[column.name] = "string" if is_text else "image" if is_bytes else "other"
    return kinds


def _has_bytes(kind: object, types: object) -> bool:
    return bool(types.is_struct(kind)) and kind.get_field_index("bytes") >= 0  # type: ignore[attr-defined]


def _rows(path: Path) -> Iterable[tuple[int, dict[str, str]]]:
    return read_csv(path) if path.suffix.lower() == ".csv" else _parquet_rows(path)


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows as text, numbered from 1, batch by batch."""
    wanted = [name for name, kind in parquet_columns(path).items() if kind != "image"]
    import pyarrow
    import pyarrow.parquet

    line = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=wanted):
            for row in batch.to_pylist():
                line += 1
                yield line, {name.lower(): "" if value is None else str(value) for name, value in row.items()}
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read '{path}': {_first_line(error)}") from error


def _columns(row: dict[str, str], path: Path, label_column: str | None) -> tuple[str, str]:
    """Names of the columns that hold path and class."""
    found = []
    for names in (PATH_COLUMNS, (label_column.lower(),) if label_column else LABEL_COLUMNS):
        there = [name for name in names if name in row]
        if len(there) != 1:
            known = " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
            problem = f"both {' and '.join(there)}" if there else f"no column {known}"
            raise DataError(
                f"'{path}' has {problem}; its columns are {', '.join(row)} "
                "(data.label_column=NAME says which holds the class)"
            )
        found += there
    return found[0], found[1]


def _located(look: _Folders, images: list[str], table: str) -> list[str]:
    """Paths relative to the folder, or all below images/ if they are there."""
    for place in ("", "images"):
        paths = [os.path.join(place, image) for image in images]
        if all(map(look.holds, paths)):
            return paths
    missing = images
    for place in ("", "images"):
        found = [look.find(os.path.join(place, image)) for image in images]
        absent = [image for image, path in zip(images, found, strict=True) if path is None]
        if not absent:
            return [path for path in found if path is not None]
        missing = min(missing, absent, key=len)
    hint = ""
    if any(DRIVE.match(image) for image in missing):
        hint = f"; paths of a Windows drive must be made relative to '{look.root}', with / between the folders"
    elif any("\\" in image for image in missing):
        hint = "; write / between the folders, not \\"
    raise DataError(
        f"{table} names {len(missing)} of {len(images)} images that are not in '{look.root}': {listed(missing)}{hint}"
    )


class _Folders:
    """What lies in the folders that paths name. Each is listed once, which asks the system nothing about a file.

    Args:
        root: folder that the paths are relative to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[str, set[str]] = {}
        self.names: dict[Path, dict[str, str]] = {}
        self.normal: dict[str, str] = {}

    def place(self, image: str) -> str:
        """Where a path leads, in the same words however the path is written."""
        name = image[len(start := _start(image)) :]
        if name in ("", os.curdir, os.pardir):
            return nfc(os.path.normpath(self.root / image))
        if start not in self.normal:
            self.normal[start] = os.path.join(nfc(os.path.normpath(self.root / start)), "")
        return self.normal[start] + nfc(name)

    def holds(self, image: str) -> bool:
        """Whether the listing of its folder has a file by exactly this name."""
        start = _start(image)
        if start not in self.files:
            self.files[start] = set()
            with suppress(OSError, ValueError), os.scandir(self.root / start) as entries:
                self.files[start] = {entry.name for entry in entries if entry.is_file()}
        return image[len(start) :] in self.files[start]

    def find(self, image: str) -> str | None:
        """Path of the image relative to the folder as the system has it; none if it is not there.

        The name may be written with other Unicode characters or stand among blanks, or its folder not be listed.
        """
        if self.holds(image) or os.path.isfile(self.root / image):
            return image
        there = Path()
        for part in Path(image.strip()).parts:
            name = self._inside(self.root / there).get(nfc(part), part)
            there /= name
        return str(there) if os.path.isfile(self.root / there) else None

    def _inside(self, folder: Path) -> dict[str, str]:
        """Name in the folder of each name in NFC."""
        if folder not in self.names:
            with suppress(OSError, ValueError):
                self.names[folder] = {nfc(name): name for name in os.listdir(folder)}
        return self.names.get(folder, {})


def _start(path: str) -> str:
    """A path up to its file's name."""
    return path[: path.rfind("/") + 1]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
