"""A CSV or Parquet table of image paths and labels, also one table per split as Ravi and Larochelle's lists."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from smkd.data.class_split import check_split, listed, read_csv
from smkd.data.images import SPLITS, FileStore, Store
from smkd.errors import DataError

PATH_COLUMNS = ("path", "filename")
LABEL_COLUMNS = ("label", "class")
TABLE_SUFFIXES = (".csv", ".parquet")
NEEDS_HF = "pip install 'smkd[hf]'"


@dataclass(frozen=True)
class Listing:
    """Every image of a data set that is not class folders.

    Attributes:
        store: the images.
        classes: class of each.
        splits: split of each; none if the data set has no splits of its own.
        form: what it is, in a few words.
    """

    store: Store
    classes: list[str]
    splits: list[str] | None
    form: str


def is_image_table(path: Path) -> bool:
    """Whether a CSV or Parquet file names images, by its columns."""
    if path.suffix.lower() == ".parquet":
        names = [name.lower() for name, kind in parquet_columns(path).items() if kind == "string"]
    else:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            names = [name.strip().lower() for name in next(csv.reader(file), [])]
    return any(name in PATH_COLUMNS for name in names)


def open_tables(paths: list[Path], label_column: str | None = None) -> Listing:
    """Images that tables name: columns path or filename, label or class, and optionally split.

    Paths are relative to the table's folder, or to images/ beside it, where miniImageNet's lists expect them.

    Args:
        paths: one table, or tables named after their splits (train.csv, ...).
        label_column: the column that holds the class, if it is not called label or class.

    Raises:
        DataError: a column is missing, a cell is empty, an image is absent or listed twice.
    """
    by_file = all(path.stem.lower() in SPLITS for path in paths)
    folder = paths[0].parent
    files: dict[str, str] = {}
    classes: list[str] = []
    splits: list[str] = []
    for path in paths:
        columns = None
        for line, row in _rows(path):
            columns = columns or _columns(row, path, label_column)
            image, label = row[columns[0]], row[columns[1]]
            if not image or not label:
                empty = columns[0] if not image else columns[1]
                raise DataError(f"'{path}', line {line}: the column '{empty}' is empty")
            if image in files:
                raise DataError(f"'{path}', line {line}: '{image}' is listed twice (first in {files[image]})")
            files[image] = f"'{path.name}', line {line}"
            classes.append(label)
            if "split" in row and not by_file:
                splits.append(check_split(row["split"], path, line))
        if columns is None:
            raise DataError(f"table '{path}' has no rows")
        if by_file:
            splits += [path.stem.lower()] * (len(classes) - len(splits))
    name = ", ".join(path.name for path in paths)
    store = FileStore(folder, _located(folder, list(files), name))
    return Listing(store, classes, splits or None, f"a table of paths and labels ({name})")


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
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"'{path}' is not a Parquet file: {_first_line(error)}") from error
    types = pyarrow.types
    kinds = {}
    for field in schema:
        inner = field.type.field("bytes").type if _has_bytes(field.type, types) else field.type
        is_text = types.is_string(inner) or types.is_large_string(inner)
        is_bytes = types.is_binary(inner) or types.is_large_binary(inner)
        kinds[field.name] = "string" if is_text else "image" if is_bytes else "other"
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
                yield line, {name.lower(): "" if value is None else str(value).strip() for name, value in row.items()}
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read '{path}': {_first_line(error)}") from error


def _columns(row: dict[str, str], path: Path, label_column: str | None) -> tuple[str, str]:
    """Names of the columns that hold path and class."""
    found = []
    for names in (PATH_COLUMNS, (label_column.lower(),) if label_column else LABEL_COLUMNS):
        there = [name for name in names if name in row]
        if len(there) != 1:
            problem = f"both {' and '.join(there)}" if there else f"no column {' or '.join(names)}"
            raise DataError(
                f"'{path}' has {problem}; its columns are {', '.join(row)} "
                "(data.label_column=NAME says which holds the class)"
            )
        found += there
    return found[0], found[1]


def _located(folder: Path, images: list[str], table: str) -> list[str]:
    """Paths relative to the folder, or all below images/ if they are there."""
    missing = images
    for place in ("", "images"):
        paths = [os.path.join(place, image) for image in images]
        absent = [image for image, path in zip(images, paths, strict=True) if not os.path.isfile(folder / path)]
        if not absent:
            return paths
        missing = min(missing, absent, key=len)
    raise DataError(
        f"{table} names {len(missing)} of {len(images)} images that are not in '{folder}': {listed(missing)}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
