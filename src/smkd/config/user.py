"""What a user sets once for all commands: SMKD_BACKBONE, or `smkd/config.yaml` in the configuration folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from smkd.config import foreign_text
from smkd.errors import ConfigError
from smkd.files import nearest

VARIABLE = "SMKD_BACKBONE"
DEFAULT = "dinov2-small"
KEY = "backbone"


class DefaultBackbone(NamedTuple):
    """The backbone of commands that are not told one.

    Attributes:
        source: its name, file, folder or repository.
        told_by: the variable or file that says so; empty where nothing does.
    """

    source: str
    told_by: str


def config_file() -> Path:
    """`smkd/config.yaml` below the user's configuration folder (XDG_CONFIG_HOME, else ~/.config); it need not exist."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "smkd" / "config.yaml"


def default_backbone() -> DefaultBackbone:
    """What SMKD_BACKBONE says, else the user's configuration file, else `DEFAULT`.

    Raises:
        ConfigError: the file cannot be read, or holds something else than `backbone: <text>`; names it.
    """
    if told := os.environ.get(VARIABLE, "").strip():
        return DefaultBackbone(told, VARIABLE)
    file = config_file()
    if not file.exists():
        return DefaultBackbone(DEFAULT, "")
    text = foreign_text.text_of(file)
    if all(line.lstrip()[:1] in (b"", b"#") for line in text.splitlines()):
        return DefaultBackbone(DEFAULT, "")
    values = foreign_text.mapping(text, str(file))
    for key in values:
        if key != KEY:
            raise ConfigError(f"'{file}': unknown key '{key}'{nearest(key, [KEY]) or f'; known here: {KEY}'}")
    source = values.get(KEY, DEFAULT)
    if not isinstance(source, str) or not source.strip():
        raise ConfigError(f"'{file}': {KEY} should be a name of `smkd backbones`, a file, a folder, or hf:owner/name")
    return DefaultBackbone(source.strip(), str(file) if KEY in values else "")
