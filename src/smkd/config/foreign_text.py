"""YAML and JSON of others, with limits on their size and depth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from smkd.errors import ConfigError

MOST_YAML_BYTES = 2**16
"""Of a file; a resolved configuration has 4,000."""
MOST_DEPTH = 32
MOST_VALUES = 10_000
"""Keys and values of a file, where each use of an alias counts what it stands for."""


def text_of(path: Path) -> bytes:
    """The bytes of a YAML file.

    Raises:
        ConfigError: it cannot be read, is no regular file, or has more than `MOST_YAML_BYTES`.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ConfigError(f"cannot read '{path}': it is not a regular file")
    try:
        with path.open("rb") as file:
            text = file.read(MOST_YAML_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read '{path}': {error.strerror}") from error
    if len(text) > MOST_YAML_BYTES:
        raise ConfigError(f"cannot read '{path}': settings have at most {MOST_YAML_BYTES} bytes")
    return text


class YamlError(ValueError):
    """A text is no YAML, or exceeds a limit.

    Attributes:
        line: line of the fault, counted from 1; None if unknown.
    """

    def __init__(self, reason: str, mark: yaml.Mark | None = None) -> None:
        super().__init__(reason)
        self.line = None if mark is None else mark.line + 1


def mapping(text: str | bytes, name: str) -> dict[str, Any]:
    """The keys and values of a YAML text.

    Args:
        text: bytes may be UTF-8 or, with a byte-order mark, UTF-16.
        name: what messages call it.

    Raises:
        ConfigError: it is no YAML, has no keys and values, a key is no text, or it exceeds a limit (`value`).
    """
    try:
        values = value(text)
    except YamlError as error:
        line = "" if error.line is None else f", line {error.line}"
        raise ConfigError(f"'{name}'{line} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"'{name}' must hold keys and values")
    for key in _keys(values):
        if not isinstance(key, str):
            raise ConfigError(f"'{name}': the key {str(key)[:40]} should be text")
    return values


def _keys(node: Any) -> Iterator[Any]:
    """Every key of a value, at any depth."""
    if isinstance(node, dict):
        yield from node
    if isinstance(node, dict | list):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from _keys(inner)


def value(text: str | bytes) -> Any:
    """The plain value of a YAML text.

    Raises:
        YamlError: it is no YAML, gives a key twice, is nested deeper than `MOST_DEPTH`, or has more than `MOST_VALUES`.
    """
    try:
        return yaml.load(text, _Loader)  # a safe one
    except YamlError:
        raise
    except yaml.MarkedYAMLError as error:
        raise YamlError(error.problem or "unreadable", error.problem_mark) from error
    # bytes that are no text; numbers and dates that look like ones and are none
    except (yaml.YAMLError, ValueError) as error:
        raise YamlError(" ".join(str(error).split())[:200] or "unreadable") from error
    except (TypeError, AttributeError, LookupError, OverflowError) as error:
        raise YamlError("a value is not of the type that its tag names") from error


class _Loader(yaml.SafeLoader):
    """Makes plain values only, after the limits are checked."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise YamlError(f"nested deeper than {MOST_DEPTH} levels", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _measured(node, {}, set())[0] > MOST_VALUES:
            raise YamlError(f"its aliases stand for more than {MOST_VALUES} values", node.start_mark)
        return node


def _measured(node: yaml.Node, known: dict[int, tuple[int, int]], open_: set[int]) -> tuple[int, int]:
    """Values in a node with what its aliases stand for, and the levels of these."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in open_:
        raise YamlError("an alias stands for what it is in", node.start_mark)
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        inner = [part for pair in node.value for part in pair]
    else:
        inner = node.value if isinstance(node, yaml.SequenceNode) else []
    parts = [_measured(part, known, open_ | {id(node)}) for part in inner]
    values, levels = 1 + sum(part[0] for part in parts), 1 + max((part[1] for part in parts), default=0)
    if levels > MOST_DEPTH:
        raise YamlError(f"nested deeper than {MOST_DEPTH} levels", node.start_mark)
    known[id(node)] = values, levels
    return values, levels


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set[str]()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise YamlError("a key should be a word", key.start_mark)
        if key.value in seen and key.value != "<<":
            raise YamlError(f"{key.value[:80]} is given twice", key.start_mark)
        seen.add(key.value)


MOST_JSON_BYTES = 2**24
"""Of a JSON file beside weights; the index of the largest models has 1 MB."""


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text; bytes may be of any Unicode encoding, with or without a byte-order mark.

    Raises:
        ValueError: it is no JSON, or is nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def json_records(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than `MOST_JSON_BYTES`, no JSON, or no object.
    """
    with path.open("rb") as file:
        text = file.read(MOST_JSON_BYTES + 1)
    if len(text) > MOST_JSON_BYTES:
        raise ValueError(f"it has more than {MOST_JSON_BYTES} bytes")
    try:
        values = parsed(text)
    except ValueError as error:
        raise ValueError("it is not valid JSON") from error
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    return values
