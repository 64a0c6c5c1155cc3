"""The `.smkd` file of a classifier or an index: safetensors with the settings as JSON in its header.

The metadata have the one key `smkd`. Reading the file executes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smkd import __version__
from smkd.config import foreign_text
from smkd.errors import CheckpointError
from smkd.files import explained, written_aside
from smkd.models.finite import check_finite, weight_fault

KEY = "smkd"
FORMAT = 1
WEIGHTS = "backbone."
"""What the names of a backbone's weights begin with."""
MAKERS = {"classifier": "smkd fit", "index": "smkd index"}
"""Kinds of files, and what makes them."""


def write(path: Path, kind: str, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write aside, sync and rename: a failure leaves what was there before.

    Raises:
        CheckpointError: it cannot be written.
    """
    header = {"format": FORMAT, "kind": kind, "version": __version__, "settings": settings}
    kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with explained(path, CheckpointError), written_aside(path) as aside:
        aside.write_bytes(save(kept, {KEY: json.dumps(header)}))


def read(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a file that `write` made.

    Raises:
        CheckpointError: missing, cut short, of another kind, or with weights that are not finite; names them.
    """
    if not path.is_file():
        there = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"'{path}' {there}; expected a file of `{MAKERS[kind]}`")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            header = foreign_text.parsed(metadata[KEY]) if KEY in metadata else None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # types that this PyTorch does not have end in the last two
    except (OSError, SafetensorError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"cannot read '{path}': cut short, or not a file of `{MAKERS[kind]}`") from error
    found = header.get("kind") if isinstance(header, dict) else None
    if not isinstance(header, dict) or found != kind:
        made = f"was made by `{MAKERS[found]}`" if isinstance(found, str) and found in MAKERS else "holds other tensors"
        raise CheckpointError(f"'{path}' {made}; expected a file of `{MAKERS[kind]}`")
    if header.get("format") != FORMAT:
        raise CheckpointError(f"'{path}' is of format {str(header.get('format'))[:40]}; this smkd reads {FORMAT}")
    settings = header.get("settings")
    if not isinstance(settings, dict):
        raise CheckpointError(f"'{path}': its settings are missing; make it again")
    for name, value in tensors.items():
        # who keeps features looks at them row by row
        if value.is_floating_point() and name.startswith(WEIGHTS):
            if fault := weight_fault(value):
                raise CheckpointError(f"'{path}': {name} is {fault}")
            check_finite({name: value}, str(path))
    return settings, tensors


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
