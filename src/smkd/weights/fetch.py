"""Where weights come from: a file, a folder, a URL with its checksum, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import huggingface_hub
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # where every version has them
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from smkd.download import download
from smkd.errors import CheckpointError, ChecksumError, DownloadError
from smkd.files import expanded, explained, sha256
from smkd.progress import bars
from smkd.weights import read
from smkd.weights.attention_heads import SETTINGS_FILE

HUB = "hf:"
PAUSE = 0.1
"""Seconds before a server is asked again, doubled each time."""
WEIGHT_FILES = (
    "model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin", "model.pth", "model.pt",
    "model.safetensors.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip
"""What a folder or repository is searched for, in this order."""


def is_remote(source: str) -> bool:
    """Whether a source must be downloaded."""
    return source.startswith(HUB) or re.match(r"https?:/", source) is not None


def locate_weights(source: str) -> Path:
    """The weights file that a source names, downloaded if need be.

    Args:
        source: a file; a folder with one of `WEIGHT_FILES`; `https://...#sha256=<64 hex digits>`; or `hf:owner/name`,
            also with `@revision` and `/file` behind it.

    Raises:
        CheckpointError: there is nothing, it cannot be fetched, or its checksum is wrong.
    """
    if source.startswith(HUB):
        return _from_hub(source)
    if is_remote(source):
        # a path folds the two slashes into one
        return _from_url(re.sub(r"^(https?):/+", r"\1://", source))
    path = expanded(source)
    if path.is_dir():
        for name in WEIGHT_FILES:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"folder '{path}' holds no checkpoint and no weights ({', '.join(WEIGHT_FILES)})")
    if not path.exists():
        raise CheckpointError(f"'{source}' does not exist; expected a file, a folder, a URL, or {HUB}owner/name")
    return path


def cache_folder() -> Path:
    """Where downloads are kept: `smkd/weights` below the user's cache folder (XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smkd" / "weights"


def _from_url(source: str) -> Path:
    url, fragment = urldefrag(source)
    wanted = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment.lower())
    if wanted is None:
        raise CheckpointError(f"'{source}' needs its checksum: {url}#sha256=<64 hex digits>")
    digest = wanted[1]
    name = Path(unquote(urlsplit(url).path)).name or "weights"
    target = cache_folder() / f"{digest[:16]}-{name}"
    if target.is_file() and sha256(target) != digest:
        target.unlink()  # damaged since
    try:
        with explained(target, CheckpointError), bars() as show:
            download(url, target, f"sha256:{digest}", partial(show, name), pause=PAUSE)
    except ChecksumError as error:
        raise CheckpointError(f"{url} {error}") from error
    except DownloadError as error:
        raise CheckpointError(f"cannot download {url}: {error}") from error
    return target


def _from_hub(source: str) -> Path:
    form = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?", source.removeprefix(HUB))
    if form is None:
        raise CheckpointError(f"'{source}' is not of the form {HUB}owner/name, {HUB}owner/name@revision or .../file")
    repository, revision, file = form.groups()
    names = (file,) if file else WEIGHT_FILES
    for name in names:
        path = _hub_file(source, repository, revision, name)
        if path is not None:
            # the number of heads is written there
            _hub_file(source, repository, revision, SETTINGS_FILE)
            if name.endswith(read.INDEX_ENDING):
                folder = name.rpartition("/")[0]
                for part in read.shard_names(path):
                    _hub_file(source, repository, revision, f"{folder}/{part}".removeprefix("/"))
            return path
    raise CheckpointError(f"'{source}' holds no weights; looked for {', '.join(names)}; name one: {HUB}owner/name/file")


def _hub_file(source: str, repository: str, revision: str | None, name: str) -> Path | None:
    """A file of a repository, from the Hub's own cache if it is there; None if the repository has no such file."""
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"cannot reach the Hub for '{source}', and '{name}' is not in its cache") from error
    except EntryNotFoundError:
        return None
    except (OSError, HFValidationError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"cannot fetch '{source}': {reason}") from error
