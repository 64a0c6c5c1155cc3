"""Data sets of the Hugging Face Hub, and folders of Parquet files with the images inside, through `datasets`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from smkd.data.decoding import read_file
from smkd.data.formats import nfc
from smkd.data.tables import LABEL_COLUMNS, NEEDS_HF, Listing
from smkd.errors import DataError

PREFIX = "hf:"
SPLIT_NAMES = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test"}


class HubStore:
    """Encoded images of one column of some tables, one table after the other.

    Args:
        tables: objects of `datasets.Dataset`; their files are memory-mapped, also when pickled to a worker.
        names: what to call each table in a message.
        column: the one with the images.
    """

    def __init__(self, tables: Sequence[Any], names: Sequence[str], column: str) -> None:
        import datasets

        self.tables = [
            table.select_columns([column]).cast_column(column, datasets.Image(decode=False)) for table in tables
        ]
        self.names, self.column = list(names), column
        self.starts = np.cumsum([0, *(len(table) for table in tables)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, item: int) -> bytes:
        """See `Store.read`."""
        table, row = self._place(item)
        cell = self.tables[table][row][self.column] or {}
        if cell.get("bytes") is not None:
            return bytes(cell["bytes"])
        if cell.get("path") is None:
            raise ValueError("the cell is empty")
        return read_file(cell["path"])

    def name(self, item: int) -> str:
        """Table, row, and the file name if the table keeps it."""
        table, row = self._place(item)
        return f"{self.names[table]}[{row}]"

    def _place(self, item: int) -> tuple[int, int]:
        table = int(np.searchsorted(self.starts, item, side="right")) - 1
        return table, int(item - self.starts[table])


def open_hub(root: str, label_column: str | None = None) -> Listing:
    """A data set by its name, `hf:owner/name` or `hf:owner/name:configuration`, or a folder of Parquet files.

    If no class is in two parts, the train, validation and test parts are the splits. Otherwise, as in ordinary
    classification sets, all labelled parts are put together and have no splits of their own.

    Args:
        root: name with its prefix, or the folder.
        label_column: the column that holds the class, where more than one may.

    Raises:
        DataError: `datasets` is not installed, the data set cannot be loaded, or its columns leave a choice.
    """
    parts = _load(root)
    first = next(iter(parts.values()))
    image, label = _image_column(root, first), _label_column(root, first, label_column)
    classes = {name: _classes(root, name, table, label) for name, table in parts.items()}
    parts = {name: table for name, table in parts.items() if classes[name]}
    if not parts:
        raise DataError(f"'{root}' has no rows with a label in its column '{label}'")
    store = HubStore(list(parts.values()), [f"{root}/{name}" for name in parts], image)
    splits = _own_splits(list(parts), classes)
    merged = "" if splits or len(parts) == 1 else f", {' and '.join(parts)} put together"
    kind = "a Hugging Face data set" if root.startswith(PREFIX) else "Parquet files with images"
    return Listing(
        store, list(itertools.chain.from_iterable(classes[name] for name in parts)), splits,
        f"{kind} (columns '{image}' and '{label}'{merged})",
    )  # fmt: skip


def _load(root: str) -> Mapping[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"'{root}' needs the extra: {NEEDS_HF}") from error
    name, _, configuration = root.removeprefix(PREFIX).partition(":") if root.startswith(PREFIX) else (root, "", "")
    try:
        loaded: Mapping[str, Any] = datasets.load_dataset(name, configuration or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot load '{root}': {reason}") from error
    return loaded


def _image_column(root: str, table: Any) -> str:
    import datasets

    def holds_images(feature: Any) -> bool:
        if isinstance(feature, dict):
            return "bytes" in feature
        return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in ("binary", "large_binary")

    found = [name for name, feature in table.features.items() if holds_images(feature)]
    if len(found) != 1:
        raise DataError(f"'{root}' should have one column of images; its columns are {_shown(table)}")
    return str(found[0])


def _label_column(root: str, table: Any, wanted: str | None) -> str:
    import datasets

    if wanted is not None:
        if wanted not in table.features:
            raise DataError(f"data.label_column={wanted}: '{root}' has no such column; it has {_shown(table)}")
        return wanted
    labelled = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    named = [name for name in LABEL_COLUMNS if name in table.features]
    found = named[:1] or labelled
    if len(found) != 1:
        problem = f"more than one label column ({', '.join(found)})" if found else "no label column"
        raise DataError(f"'{root}' has {problem}; choose with data.label_column=NAME from {_shown(table)}")
    return found[0]


def _shown(table: Any) -> str:
    return ", ".join(table.features)


def _classes(root: str, part: str, table: Any, column: str) -> list[str]:
    """Class of each row; none at all for a part whose labels are withheld, as test parts often are."""
    import datasets

    values = table.select_columns([column])[:][column]
    feature = table.features[column]
    if isinstance(feature, datasets.ClassLabel):
        values = [feature.int2str(value) if value is not None and value >= 0 else None for value in values]
    unlabelled = sum(value in (None, "") for value in values)
    if unlabelled == len(values):
        return []
    if unlabelled:
        raise DataError(f"'{root}', part '{part}': {unlabelled} of {len(values)} rows have no label in '{column}'")
    return [nfc(str(value).strip()) for value in values]


def _own_splits(parts: list[str], classes: Mapping[str, list[str]]) -> list[str] | None:
    """Split of each row, if the parts are splits by class; none if they share classes or are called otherwise."""
    if len(parts) < 2 or any(part not in SPLIT_NAMES for part in parts):
        return None
    shared = [pair for pair in itertools.combinations(parts, 2) if set(classes[pair[0]]) & set(classes[pair[1]])]
    return None if shared else [SPLIT_NAMES[part] for part in parts for _ in classes[part]]
