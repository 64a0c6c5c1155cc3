"""The forms of an export, and its place: checks that it is free or a former export, writes aside, then renames."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from smkd.errors import CheckpointError, ConfigError
from smkd.files import explained, nearest, written_aside
from smkd.weights.smkd_file import CLASSIFIER, CLASSIFIER_FILE, EXPORT, is_of_kind

WEIGHTS, SETTINGS, CARD = "model.safetensors", "config.json", "README.md"
FOLDER_FILES = (WEIGHTS, SETTINGS, CARD)
"""All that the folder of a backbone may hold; that of a classifier holds the last and `CLASSIFIER_FILE`."""
LIBRARY = "smkd"
"""What a model card says of its making."""
NOTE = "smkd.json"
"""File in a PyTorch program that says what it is."""
PRODUCER = "smkd"
"""What an ONNX file says of its making."""


class Form(NamedTuple):
    """One of the forms.

    Attributes:
        suffix: of its name, where none is given.
        is_folder: whether it is a folder.
        is_program: whether it computes something, for images of a certain size.
        of_classifiers: whether a classifier has it too.
    """

    suffix: str
    is_folder: bool = False
    is_program: bool = False
    of_classifiers: bool = False


EXPORT_FORMS = {
    "timm": Form("-timm", is_folder=True),
    "safetensors": Form(".safetensors"),
    "onnx": Form(".onnx", is_program=True, of_classifiers=True),
    "torch-export": Form(".pt2", is_program=True, of_classifiers=True),
    "hub": Form("-hub", is_folder=True, of_classifiers=True),
}


def form_of(name: str) -> Form:
    """The form of that name; raises `ConfigError` with the nearest name if there is none."""
    if name not in EXPORT_FORMS:
        raise ConfigError(f"--to {name}: unknown form{nearest(name, EXPORT_FORMS)} (known: {', '.join(EXPORT_FORMS)})")
    return EXPORT_FORMS[name]


class Exported(NamedTuple):
    """What an export wrote.

    Attributes:
        path: the file or folder.
        report: lines about what was checked and what to know.
    """

    path: Path
    report: list[str]


def check_free(path: Path, *, is_folder: bool, suffix: str, overwrite: bool) -> None:
    """Raise `ConfigError` if something other than a former export is at a path, unless it may be overwritten."""
    if is_folder and path.exists() and not path.is_dir():
        raise ConfigError(f"-o '{path}' is a file; this form is a folder")
    if not is_folder and path.is_dir():
        raise ConfigError(f"-o '{path}' is a folder; give a file, such as {path / f'model{suffix}'}")
    if path.exists() and not overwrite and not _is_former_export(path):
        what = "is not empty and no former export" if path.is_dir() else "exists and is no former export"
        raise ConfigError(f"-o '{path}' {what}; choose another, or add --overwrite")


def _is_former_export(path: Path) -> bool:
    if path.is_dir():
        names = {each.name for each in path.iterdir()}
        if names == {CARD, CLASSIFIER_FILE}:
            # `smkd fit` may have written such a file beside somebody's own text
            card = (path / CARD).read_text(encoding="utf-8", errors="replace")
            return f"\nlibrary_name: {LIBRARY}\n" in card and is_of_kind(path / CLASSIFIER_FILE, CLASSIFIER)
        return not names or (names <= set(FOLDER_FILES) and is_of_kind(path / WEIGHTS, EXPORT))
    return is_of_kind(path, EXPORT) or _is_program(path) or _onnx_producer(path) == PRODUCER


def _is_program(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(f"/{NOTE}") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _onnx_producer(path: Path) -> str:
    """What an ONNX file says of its making; empty if it is no such file."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        return ""
    try:
        return str(onnx.load(path, format="protobuf", load_external_data=False).producer_name)
    except DecodeError:
        return ""


@contextlib.contextmanager
def writing(path: Path, *, is_folder: bool) -> Iterator[Path]:
    """Where to write a file or a folder; it is moved to `path` at the end, and removed if anything goes wrong.

    Of a folder that is there the exported files are replaced, each at once; others are left alone.

    Raises:
        CheckpointError: it cannot be written.
    """
    with explained(path, CheckpointError), written_aside(path, folder=is_folder) as aside:
        yield aside
        for name in FOLDER_FILES if is_folder else ():
            if not (aside / name).exists():
                (path / name).unlink(missing_ok=True)
