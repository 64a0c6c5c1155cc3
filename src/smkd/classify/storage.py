"""One file for everything: safetensors, whose header holds the settings as JSON. Reading it executes nothing.

A `.smkd` file is a safetensors file like any other; its metadata has the one key `smkd`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smkd import __version__
from smkd.errors import CheckpointError
from smkd.files import explained, written_aside

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
        CheckpointError: missing, cut short, of another kind, or with weights that are not finite.
    """
    if not path.is_file():
        there = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"'{path}' {there}; expected a file of `{MAKERS[kind]}`")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            header = json.loads(metadata[KEY]) if KEY in metadata else None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot read '{path}': cut short, or not a file of `{MAKERS[kind]}`") from error
    found = MAKERS.get(header.get("kind", "")) if isinstance(header, dict) else None
    if not isinstance(header, dict) or found != MAKERS[kind]:
        made = f"was made by `{found}`" if found else "holds other tensors"
        raise CheckpointError(f"'{path}' {made}; expected a file of `{MAKERS[kind]}`")
    for name, tensor in tensors.items():
        if name.startswith(WEIGHTS) and not tensor.isfinite().all():
            raise CheckpointError(f"'{path}': the weights '{name}' are NaN or infinite; make it again from good ones")
    if header.get("format") != FORMAT:
        raise CheckpointError(f"'{path}' is of format {header.get('format')}; this smkd reads {FORMAT}")
    return header["settings"], tensors
