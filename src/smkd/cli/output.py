"""Files that options ask for: what may be replaced, and writing them. `-` is standard output."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import typer

from smkd.errors import ConfigError
from smkd.files import explained, printable, written_aside

STANDARD = Path("-")
"""Standard output."""
standard: ContextVar[TextIO | None] = ContextVar("standard", default=None)
"""Where it goes while a verb's own lines are sent to standard error."""


@dataclass(frozen=True)
class Output:
    """Marks an option of a verb as something that the verb writes, as in `Annotated[Path, typer.Option(...), JSON]`.

    Attributes:
        what: it is, in words.
        is_own: whether what is there was written by the same option once, so that it may be replaced. None: the verb
            looks itself.
        is_text: whether '-' may stand for standard output.
        is_folder: whether it is a folder; None for either.
        beside: whether it must not lie in a folder that is read: it would be taken for a part of it.
    """

    what: str
    is_own: Callable[[Path], bool] | None = None
    is_text: bool = False
    is_folder: bool | None = False
    beside: bool = False


def _is_json(path: Path) -> bool:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    # one key of each verb's: `eval` and `compare`, `fit`, `predict` and `score`, `bench`, `data verify`
    marks = {"results", "left_out", "unreadable", "images_per_second", "problems"}
    return isinstance(values, dict) and not marks.isdisjoint(values)


def _begins(*beginnings: bytes) -> Callable[[Path], bool]:
    def is_own(path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(max(map(len, beginnings))).startswith(beginnings)

    return is_own


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(500)
    # the title is that of pages from before they were marked
    return b'<meta name="generator" content="smkd">' in start or b"<title>Few-shot accuracy</title>" in start


def _is_feature_file(path: Path) -> bool:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return "all_feats" in file
    except OSError:
        return False


def _is_smkd(kind: str) -> Callable[[Path], bool]:
    def is_own(path: Path) -> bool:
        from smkd.weights.smkd_file import is_of_kind

        return is_of_kind(path, kind)

    return is_own


def _holds(*names: str) -> Callable[[Path], bool]:
    return lambda folder: {each.name for each in folder.iterdir() if each.name[0] != "."} <= set(names)


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


JSON = Output("a JSON file of smkd", _is_json, is_text=True)
CSV = Output("a CSV file of `smkd predict`", _begins(b"image,answer,known"), is_text=True)
RECIPE = Output("a recipe", is_text=True)
PAGE = Output("a page of smkd", _is_page)
FEATURES = Output("a feature file", _is_feature_file)
CLASSIFIER = Output("a file of `smkd fit`", _is_smkd("classifier"))
INDEX = Output("a file of `smkd index`", _is_smkd("index"))
CHECKPOINT = Output(
    "an imported run", lambda path: path.is_file() or _holds("checkpoints")(path), is_folder=None
)  # a file is refused by the verb
EXPORT = Output("an export", is_folder=None)
FIGURES = [f"{name}.{kind}" for name in ("accuracy", "confusion", "episodes") for kind in ("png", "svg")]
PICTURES = Output("pictures of `smkd eval`", _holds(*FIGURES), is_folder=True)
SHEETS = Output("contact sheets", _holds("train.png", "val.png", "test.png"), is_folder=True, beside=True)
RUN = Output("a run folder", _is_run, is_folder=True)
PICTURE = Output("a picture", _begins(b"\x89PNG", b"<svg", b"<?xml"))
DEMO = Output("a folder of `smkd demo`", _holds("phase1", "phase2", "results.json", "report.html"), is_folder=True)
PREPARED = Output("a prepared folder", is_folder=True, beside=True)
SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp", ".pt", ".pth", ".bin",
    ".safetensors", ".smkd", ".h5", ".hdf5", ".onnx", ".pt2", ".npz", ".npy", ".tar", ".gz", ".tgz", ".zip", ".7z",
    ".parquet", ".xlsx",
)  # fmt: skip
"""Of files that no text is written to."""


def check(option: str, path: Path, output: Output, inputs: Iterable[Path]) -> None:
    """Whether an option may write there, before any work is done.

    Args:
        option: as it is typed, such as '--json'.
        path: its value.
        output: what is to be written.
        inputs: files and folders that the same call reads.

    Raises:
        ConfigError: it is an input of the call or something else that is there, or it cannot be written.
    """
    if path == STANDARD:
        if not output.is_text:
            raise ConfigError(f"{option} -: {output.what} cannot go to standard output; give a name")
        return
    for each in inputs:
        _check_input(option, path, output, each)
    if output.is_text and path.suffix.lower() in SUFFIXES:
        raise ConfigError(f"{option} '{path}': {output.what} does not end in {path.suffix}; {OTHER}")
    with explained(path, ConfigError, option=option):
        there = _mode(path, output)
        if there is None or not (stat.S_ISREG(there) or stat.S_ISDIR(there)):
            return
        if output.is_folder is not None and stat.S_ISDIR(there) != output.is_folder:
            kind, other = ("file", "folder") if output.is_folder else ("folder", "file")
            raise ConfigError(f"{option}: cannot write '{path}': it is a {kind}; give a {other}")
        is_folder = stat.S_ISDIR(there)
        empty = not any(path.iterdir()) if is_folder else path.stat().st_size == 0
        if not empty and output.is_own is not None and not output.is_own(path):
            found = "holds other things than" if is_folder else "exists and is not"
            raise ConfigError(f"{option}: '{path}' {found} {output.what}; it is left as it is: {OTHER}")


OTHER = "give another name"


def _check_input(option: str, path: Path, output: Output, read: Path) -> None:
    """Compare resolved paths and inodes."""
    target, source = Path(os.path.realpath(path)), Path(os.path.realpath(read))
    if target == source or (os.path.exists(path) and os.path.samefile(path, read)):
        raise ConfigError(f"{option}: '{path}' is read by the same call and would be replaced; {OTHER}")
    if output.is_folder is not False and target in source.parents:
        raise ConfigError(f"{option}: '{path}' holds '{read}', which the same call reads; {OTHER}")
    if output.beside and source in target.parents:
        raise ConfigError(f"{option}: '{path}' lies in '{read}', which the same call reads; {OTHER}")


def _mode(path: Path, output: Output) -> int | None:
    """Type of what is there, None for nothing; raises `OSError` where nothing can be written."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        pass
    if output.is_text and not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"there is no folder '{path.parent}'", str(path))
    above = next(each for each in path.absolute().parents if each.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(above))
    return None


def say(line: str = "", *, err: bool = False) -> None:
    """Print one line, whatever the names in it."""
    typer.echo(printable(line), err=err)


def say_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows with their columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def write_text(path: Path, text: str, option: str) -> None:
    """Write a file as UTF-8; raises `ConfigError`, naming the option, if it cannot be written."""
    # paths in the text may hold bytes that are no UTF-8
    data = text.encode("utf-8", errors="surrogateescape")
    if path == STANDARD:
        stream = standard.get() or sys.stdout
        stream.flush()
        stream.buffer.write(data)
        stream.flush()
        return
    with explained(path, ConfigError, option=option), written_aside(path) as aside:
        aside.write_bytes(data)


def write_json(path: Path, values: Any) -> None:
    """Write what `--json` asks for."""
    write_text(path, json.dumps(values, indent=2) + "\n", "--json")
