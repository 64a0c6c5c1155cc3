"""Files that options ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smkd.errors import ConfigError


def write_text(path: Path, text: str, option: str) -> None:
    """Write a file as UTF-8; raises `ConfigError`, naming the option, if it cannot be written."""
    try:
        # paths in the text may hold bytes that are no UTF-8
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise ConfigError(f"{option}: cannot write '{path}': {error.strerror}") from error


def write_json(path: Path, values: Any) -> None:
    """Write what `--json` asks for."""
    write_text(path, json.dumps(values, indent=2) + "\n", "--json")
