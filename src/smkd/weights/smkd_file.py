"""The one file format of this package: safetensors, whose metadata has the one key `smkd` with JSON. Reading it
executes nothing.

The JSON holds the format's number, the kind of file (a classifier, an index, or a backbone of `smkd export`), the
version that wrote it, and the kind's settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smkd import __version__
from smkd.config import foreign_text
from smkd.config.run_config import RunConfig
from smkd.config.schema import Section
from smkd.errors import CheckpointError
from smkd.files import explained, written_aside
from smkd.weights.architecture import check_finite, weight_fault
from smkd.weights.rename import BACKBONE

KEY = "smkd"
FORMAT = 1
CLASSIFIER, INDEX, EXPORT = "classifier", "index", "backbone"
"""Kinds of files."""
CLASSIFIER_FILE = "classifier.smkd"
"""A classifier in a folder or a repository of the Hub."""
MAKERS = {CLASSIFIER: "smkd fit", INDEX: "smkd index", EXPORT: "smkd export"}
UNKNOWN_LICENSE = "unknown"


class Score(NamedTuple):
    """An accuracy in percent that was measured with the weights.

    Attributes:
        name: such as '5-way 1-shot'.
        value, ci95: mean, and half width of its 95 % interval; None where none was recorded.
        dataset, split: what was measured.
        conditions: head, queries, episodes and transform in words.
    """

    name: str
    value: float
    ci95: float | None
    dataset: str
    split: str
    conditions: str


class BackboneInfo(Section):
    """The settings of an exported backbone: all that is known of it besides its weights.

    Attributes:
        name: what to call it.
        network: which of its run's two it is.
        config: of its run; `config.model` describes the backbone. It holds no path of any machine.
        scores: accuracies that were measured with these weights.
        license: identifier as the Hub has them, such as 'apache-2.0'.
        source: whose weights they are, if another project's; `config` then only says how images are prepared.
    """

    name: str
    network: Literal["teacher", "student"]
    config: RunConfig
    scores: tuple[Score, ...] = ()
    license: str = UNKNOWN_LICENSE
    source: str = ""


def encoded(kind: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a file; the same content gives the same bytes."""
    header = {"format": FORMAT, "kind": kind, "version": __version__, "settings": settings}
    kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # one key only, as several would be written in any order
    return save(kept, {KEY: json.dumps(header)})


def write(path: Path, kind: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write aside, sync and rename: a failure leaves what was there before.

    Raises:
        CheckpointError: it cannot be written.
    """
    with explained(path, CheckpointError), written_aside(path) as aside:
        aside.write_bytes(encoded(kind, settings, tensors))


def read(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a file of one kind; the settings are unchecked.

    Raises:
        CheckpointError: missing, cut short, of another kind, or with weights that are not finite; names them.
    """
    if not path.is_file():
        there = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"'{path}' {there}; expected a file of `{MAKERS[kind]}`")
    try:
        with safe_open(path, "pt") as file:
            header = _header(file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # types that this PyTorch does not have end in the last two
    except (OSError, SafetensorError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"cannot read '{path}': cut short, or not a file of `{MAKERS[kind]}`") from error
    found = header.get("kind")
    if found != kind:
        made = f"was made by `{MAKERS[found]}`" if isinstance(found, str) and found in MAKERS else "holds other tensors"
        raise CheckpointError(f"'{path}' {made}; expected a file of `{MAKERS[kind]}`")
    _check_format(header, str(path))
    settings = header.get("settings")
    if not isinstance(settings, dict):
        raise CheckpointError(f"'{path}': its settings are missing; make it again")
    for name, value in tensors.items():
        # who keeps features looks at them row by row
        if value.is_floating_point() and name.startswith(BACKBONE):
            if fault := weight_fault(value):
                raise CheckpointError(f"'{path}': {name} is {fault}")
            check_finite({name: value}, str(path))
    return settings, tensors


def is_of_kind(path: Path, kind: str) -> bool:
    """Whether a file is of this format and kind; what cannot be read is not."""
    try:
        with safe_open(path, "pt") as file:
            return header_of(file.metadata(), kind) is not None
    except (OSError, SafetensorError):
        return False


def header_of(metadata: Mapping[str, str] | None, kind: str) -> dict[str, Any] | None:
    """What the metadata of a safetensors file say, unchecked; None if that is nothing about this kind."""
    try:
        header = _header(metadata)
    except ValueError:
        return None
    return header if header.get("kind") == kind else None


def backbone_info(header: Mapping[str, Any], file: str) -> BackboneInfo:
    """The settings in the header of an exported backbone.

    Args:
        header: what `header_of` gave.
        file: what messages call it.

    Raises:
        CheckpointError: damaged, or written by another version of this package.
    """
    _check_format(header, file)
    try:
        return BackboneInfo.model_validate(header.get("settings"))
    except ValidationError as error:
        raise CheckpointError(
            f"'{file}': its header is damaged, or of another version of smkd ({str(header.get('version'))[:40]}): "
            f"{settings_fault(error)}"
        ) from error


def tensor(tensors: Mapping[str, Tensor], name: str, kind: torch.dtype, axes: int, path: str | Path) -> Tensor:
    """A tensor that a file must hold.

    Raises:
        CheckpointError: it is missing, or of another type or number of axes.
    """
    value = tensors.get(name)
    if value is None:
        raise CheckpointError(f"'{path}': {name} is missing; make it again")
    if value.dtype != kind or value.ndim != axes:
        wanted = f"{str(kind).removeprefix('torch.')} with {axes} axes"
        found = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        raise CheckpointError(f"'{path}': {name} is {found}, expected {wanted}; make it again")
    return value


def settings_fault(error: ValidationError) -> str:
    """The first thing that is wrong with settings, in a line."""
    first = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(map(str, first["loc"]))[:120]
    if first["type"] == "missing":
        return f"{place} is missing"
    return f"{place}: {first['msg']}".removeprefix(": ").replace("Value error, ", "")


def _header(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """What the metadata say; empty if that is nothing. Raises `ValueError` where it is no JSON."""
    values = foreign_text.parsed((metadata or {}).get(KEY, "null"))
    return values if isinstance(values, dict) else {}


def _check_format(header: Mapping[str, Any], file: str) -> None:
    number = header.get("format")
    if number != FORMAT:
        what = "an export " if header.get("kind") == EXPORT else ""
        raise CheckpointError(f"'{file}' is {what}of format {str(number)[:40]}; this smkd reads {FORMAT}")
