"""The header of an exported file: JSON under the one key `smkd` of a safetensors header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from smkd import __version__
from smkd.config import foreign_text
from smkd.config.run_config import RunConfig
from smkd.config.schema import Section
from smkd.errors import CheckpointError

KEY = "smkd"
FORMAT = 1
KIND = "backbone"
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
    """All that is known of a backbone besides its weights.

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


def metadata(settings: BackboneInfo) -> dict[str, str]:
    """Of a safetensors file with these settings."""
    values = {"format": FORMAT, "kind": KIND, "version": __version__, "settings": settings.model_dump(mode="json")}
    # one key only: several are written in any order, and the same export should be the same bytes
    return {KEY: json.dumps(values)}


def is_export(path: Path) -> bool:
    """Whether `smkd export` wrote a safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            return found(file.metadata() or {}) is not None
    except (OSError, SafetensorError):
        return False


def found(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """What `smkd export` wrote into a file's metadata, unchecked; None if there is nothing of the kind."""
    try:
        values = foreign_text.parsed(metadata.get(KEY, "null"))
    except ValueError:
        return None
    if not isinstance(values, dict) or values.get("kind") != KIND:
        return None
    return values


def checked_info(values: Mapping[str, Any], file: str) -> BackboneInfo:
    """The settings in what `found` gave.

    Raises:
        CheckpointError: damaged, or written by another version of this package.
    """
    if values.get("format") != FORMAT:
        raise CheckpointError(f"'{file}' is an export of format {values.get('format')}; this smkd reads {FORMAT}")
    try:
        return BackboneInfo.model_validate(values.get("settings"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"'{file}': its header is damaged, or of another version of smkd ({values.get('version')}): "
            f"{place}: {first['msg']}"
        ) from error
