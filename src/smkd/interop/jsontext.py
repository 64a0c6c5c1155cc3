"""JSON that others wrote, or that a crash cut short."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_BYTES = 2**24
"""Of a JSON file beside weights; the index of the largest models has 1 MB."""


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text; bytes may be of any Unicode encoding, with or without a byte-order mark.

    Raises:
        ValueError: it is no JSON, or nested so deep that nothing here wrote it.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def records(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Each line of a file of objects, one a line, and its object; None where a line is none.

    Raises:
        OSError: it cannot be read.
    """
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            value = parsed(line)
        except ValueError:
            value = None
        yield line, value if isinstance(value, dict) else None


def read(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than `MOST_BYTES`, no JSON, or no object.
    """
    with path.open("rb") as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    try:
        values = parsed(text)
    except ValueError as error:
        raise ValueError("it is not valid JSON") from error
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    return values
