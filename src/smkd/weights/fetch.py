"""Where weights come from: a published name, a file, a folder, a URL with its checksum, or the Hugging Face Hub."""

from __future__ import annotations

import os
import re
import socket
import warnings
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit
from urllib.request import getproxies

from smkd.download import download
from smkd.errors import CheckpointError, ChecksumError, DownloadError, SmkdWarning
from smkd.files import expanded, explained, sha256
from smkd.progress import bars
from smkd.weights import read
from smkd.weights.attention_heads import SETTINGS_FILE
from smkd.weights.catalogue import HUB, NamedBackbone, find, misspelt, weights_folder
from smkd.weights.smkd_file import CLASSIFIER_FILE

PAUSE = 0.1
"""Seconds before a server is asked again, doubled each time."""
WEIGHT_FILES = (
    "model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin", "model.pth", "model.pt",
    "model.safetensors.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip
"""What a folder or repository is searched for, in this order."""


def is_remote(source: str) -> bool:
    """Whether a source is no file or folder but a name, a URL, or a repository."""
    return find(source) is not None or source.startswith(HUB) or re.match(r"https?:/", source) is not None


def locate_weights(source: str) -> Path:
    """The weights file that a source names, downloaded if need be.

    Args:
        source: a name of `smkd.weights.catalogue`, which comes before a file or folder of this name; a file; a folder
            with one of `WEIGHT_FILES`; `https://...#sha256=<64 hex digits>`; or `hf:owner/name`, also with `@revision`
            and `/file` behind it.

    Raises:
        CheckpointError: there is nothing, it cannot be fetched, or its checksum is wrong.
    """
    known = find(source)
    if known is not None:
        return _named(known)
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
        expected = f"expected a file, a folder, a URL, {HUB}owner/name, or a name of `smkd backbones`"
        raise CheckpointError(f"'{source}' does not exist; {expected}{misspelt(source)}")
    return path


def is_classifier(source: str) -> bool:
    """Whether a source of the Hub names the file of a classifier."""
    return source.startswith(HUB) and source.endswith(Path(CLASSIFIER_FILE).suffix)


def locate_classifier(source: str | Path) -> Path:
    """The file of a classifier, fetched if need be; a path that is not there is returned as it is.

    Args:
        source: a file; a folder of `smkd export --to hub`; or `hf:owner/name`, also with `@revision` and `/file`
            behind it.

    Raises:
        CheckpointError: the repository has none, or cannot be reached.
    """
    if str(source).startswith(HUB):
        return _from_hub(str(source), (CLASSIFIER_FILE,), "classifier")
    path = expanded(source)
    return path / CLASSIFIER_FILE if (path / CLASSIFIER_FILE).is_file() else path


def _named(known: NamedBackbone) -> Path:
    """The file of a published backbone, put there by hand or fetched once, and looked at again each time."""
    if os.path.exists(known.name):
        here = os.path.abspath(known.name)
        message = f"'{known.name}' is the published backbone, not '{here}': give that in full if it is meant"
        warnings.warn(message, SmkdWarning, stacklevel=2)
    path = known.place if known.place.is_file() else _published(known)
    found = known.sha256 and sha256(path)
    if found != known.sha256:
        # the file itself: where the Hub keeps it, a link leads to it
        whole = os.path.realpath(path)
        raise CheckpointError(
            f"'{whole}' is not {known.name}: it has SHA-256 {found}, expected {known.sha256}; remove it, and the same "
            "command fetches it again"
        )
    return path


def _published(known: NamedBackbone) -> Path:
    by_hand = f"put {known.url} at '{known.place}', or take 'pixels', which needs no network"
    if known.repository is None:
        raise CheckpointError(f"'{known.name}' cannot be fetched by a program: {by_hand}")
    path = _hub_file(known.name, known.repository, known.revision, known.file, by_hand)
    if path is None:
        raise CheckpointError(f"'{known.name}' is no longer at {known.url}; a copy of it goes to '{known.place}'")
    return path


def _from_url(source: str) -> Path:
    url, fragment = urldefrag(source)
    wanted = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment.lower())
    if wanted is None:
        raise CheckpointError(f"'{source}' needs its checksum: {url}#sha256=<64 hex digits>")
    digest = wanted[1]
    name = Path(unquote(urlsplit(url).path)).name or "weights"
    target = weights_folder() / f"{digest[:16]}-{name}"
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


def _from_hub(source: str, names: tuple[str, ...] = WEIGHT_FILES, what: str = "weights") -> Path:
    form = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?", source.removeprefix(HUB))
    if form is None:
        raise CheckpointError(f"'{source}' is not of the form {HUB}owner/name, {HUB}owner/name@revision or .../file")
    repository, revision, file = form.groups()
    names = (file,) if file else names
    for name in names:
        path = _hub_file(source, repository, revision, name)
        if path is not None:
            if what == "weights":  # the number of heads is written there
                _hub_file(source, repository, revision, SETTINGS_FILE)
            if name.endswith(read.INDEX_ENDING):
                folder = name.rpartition("/")[0]
                for part in read.shard_names(path):
                    _hub_file(source, repository, revision, f"{folder}/{part}".removeprefix("/"))
            return path
    raise CheckpointError(f"'{source}' holds no {what}; looked for {', '.join(names)}; name one: {HUB}owner/name/file")


def _is_offline() -> bool:
    """Whether the Hub's name is not known here; its own library would ask again for half a minute."""
    from huggingface_hub import constants

    if getproxies():
        return False
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def _hub_file(source: str, repository: str, revision: str | None, name: str, away: str = "") -> Path | None:
    """A file of a repository, from the Hub's own cache if it is there; None if the repository has no such file.

    Args:
        source: what messages call it.
        repository, revision, name: of the file.
        away: what to do where the Hub cannot be reached.
    """
    # with its HTTP library it takes as long to load as a small network
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # where every version has them
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
    )

    try:
        with warnings.catch_warnings():
            # a disk that is too small is told below
            warnings.simplefilter("ignore")
            return Path(
                huggingface_hub.hf_hub_download(repository, name, revision=revision, local_files_only=_is_offline())
            )
    except LocalEntryNotFoundError as error:
        told = f"; {away}" if away else f", and '{name}' is not in its cache"
        raise CheckpointError(f"cannot reach the Hub for '{source}'{told}") from error
    except EntryNotFoundError:
        return None
    except GatedRepoError as error:
        known = find(source)
        licence = f"the {known.licence}" if known is not None else "a licence"
        raise CheckpointError(
            f"'{source}' is for those who have accepted {licence}: do so at https://huggingface.co/{repository}, then "
            "say who you are (`hf auth login`, or HF_TOKEN) and give the same command"
        ) from error
    except Exception as error:  # of its HTTP library, which is another one in each version, or of the disk
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            advice = f"'{source}' is not fetched; HF_HOME may name another place"
            with explained(Path(constants.HF_HUB_CACHE), CheckpointError, advice=advice):
                raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"cannot fetch '{source}': {reason}{away and f'; {away}'}") from error
