"""`dataset.json`: what a prepared folder holds, written so that equal data gives equal bytes.

{"format": 1, "name": ..., "version": ..., "split_rule": ..., "options": {...},
 "counts": {"train": {"classes": 64, "images": 38400}, ...},
 "files": {"train": {"<class>": {"<image>": [<bytes>, "<sha256>"], ...}, ...}, ...}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from smkd.errors import DataError
from smkd.files import sha256, written_aside
from smkd.prepare.registry import SPLITS, SplitCount

FILE_NAME = "dataset.json"
FORMAT = 1

FileRecord = tuple[int, str]
"""Size in bytes and SHA-256 in hex."""


@dataclass(frozen=True)
class Identity:
    """What makes two prepared folders the same data set."""

    name: str
    version: str
    split_rule: str
    options: Mapping[str, str | int]

    def __str__(self) -> str:
        options = ", ".join(f"{key} {value}" for key, value in self.options.items())
        return f"{self.name} (version {self.version}{', ' if options else ''}{options})"


@dataclass(frozen=True)
class Manifest:
    """A read `dataset.json`; `files` maps '<split>/<class>/<image>' to size and hash."""

    identity: Identity
    counts: Mapping[str, SplitCount]
    files: Mapping[str, FileRecord]


def manifest_hash(root: Path) -> str:
    """SHA-256 of the folder's `dataset.json`: equal for equal data, whoever prepared it and however often killed.

    Raises:
        DataError: the folder has no `dataset.json`.
    """
    _read_bytes(root / FILE_NAME)
    return sha256(root / FILE_NAME)


def write_manifest(root: Path, identity: Identity, files: Mapping[str, FileRecord]) -> None:
    """Write `dataset.json`; `files` as in `Manifest`."""
    with written_aside(root / FILE_NAME) as aside, aside.open("w", encoding="utf-8", newline="\n") as file:
        _write(file, identity, files)


def read_manifest(root: Path) -> Manifest:
    """The folder's `dataset.json`.

    Raises:
        DataError: it is missing, is no JSON, or lacks a field.
    """
    path = root / FILE_NAME
    try:
        values = json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{path}' is not JSON ({error}); prepare the folder again") from error
    try:
        if values["format"] != FORMAT:
            raise DataError(f"'{path}': format {values['format']}, this version of smkd reads format {FORMAT}")
        identity = Identity(values["name"], values["version"], values["split_rule"], values["options"])
        counts = {split: SplitCount(**values["counts"][split]) for split in SPLITS}
        files = {
            f"{split}/{folder}/{name}": (int(size), str(digest))
            for split, folders in values["files"].items()
            for folder, images in folders.items()
            for name, (size, digest) in images.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"'{path}': field {error} is missing or not of the right kind; prepare the folder again"
        ) from error
    return Manifest(identity, counts, files)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"'{path}' does not exist; make it with `smkd data prepare NAME --out {path.parent}`"
        ) from error


def _write(file: TextIO, identity: Identity, files: Mapping[str, FileRecord]) -> None:
    """A file a line, in pieces: the whole text of tieredImageNet would take 100 MB of memory."""
    names = sorted(files)  # what shares a prefix stays together, so splits and classes do
    head: dict[str, Any] = {
        "format": FORMAT,
        "name": identity.name,
        "version": identity.version,
        "split_rule": identity.split_rule,
        "options": dict(sorted(identity.options.items())),
        "counts": _counts(names),
    }
    file.write(json.dumps(head, indent=1)[:-2] + ',\n "files": {')
    for i, (split, of_split) in enumerate(groupby(names, key=lambda name: name.split("/")[0])):
        file.write(f"{',' if i else ''}\n{json.dumps(split)}: {{")
        for j, (folder, of_class) in enumerate(groupby(of_split, key=lambda name: name.split("/")[1])):
            file.write(f"{',' if j else ''}\n {json.dumps(folder)}: {{")
            for k, name in enumerate(of_class):
                size, digest = files[name]
                file.write(f'{"," if k else ""}\n  {json.dumps(name.split("/")[2])}: [{size}, "{digest}"]')
            file.write("}")
        file.write("}")
    file.write("}\n}\n")


def _counts(names: list[str]) -> dict[str, dict[str, int]]:
    counts = {split: {"classes": 0, "images": 0} for split in SPLITS}
    for (split, _), images in groupby(names, key=lambda name: name.split("/")[:2]):
        counts[split]["classes"] += 1
        counts[split]["images"] += sum(1 for _ in images)
    return counts
