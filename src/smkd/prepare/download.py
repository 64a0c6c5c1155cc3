"""Download one file: with progress, going on after a cut connection, and used only if its checksum agrees."""

from __future__ import annotations

import errno
import hashlib
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from smkd.errors import DataError
from smkd.files import explained
from smkd.prepare.registry import Download

OnProgress = Callable[[int, int | None], None]
"""Called with what is done and what there is in all, if that is known."""

READ_AT_ONCE = 1 << 18
DOWNLOAD_ATTEMPTS = 5
"""Connections in a row that may bring nothing before the download is given up."""
TIMEOUT = 30.0
"""Seconds without an answer after which a connection counts as cut."""


def fetch_file(download: Download, folder: Path, on_progress: OnProgress, *, pause: float = 1.0) -> Path:
    """The file, downloaded into `folder` unless it is there already.

    An unfinished download stays as `<name>.part` and is continued, also by a later call.

    Args:
        download: what to fetch.
        folder: where it goes; made if need be.
        on_progress: told of the bytes.
        pause: seconds before connecting again, doubled each time.

    Raises:
        DataError: not found, unreachable, a redirect without end, a full disk, or a wrong checksum (the file is then
            kept aside).
    """
    target = folder / download.name
    if target.is_file():
        _check(target, download, folder / f"{download.name}.wrong")
        return target
    part = folder / f"{download.name}.part"
    with explained(folder, DataError, advice="the same command goes on from there"):
        folder.mkdir(parents=True, exist_ok=True)
        _receive(download, part, on_progress, pause)
    _check(part, download, folder / f"{download.name}.wrong")
    os.replace(part, target)
    return target


def file_digest(path: Path, kind: str) -> str:
    """Hex digest of a file; `kind` as hashlib knows it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _receive(download: Download, part: Path, on_progress: OnProgress, pause: float) -> None:
    vain = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _receive_once(download, part, before, on_progress):
                return
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            if error.code == 416 and before:  # the server has no more than is here: start over, the checksum decides
                part.unlink()
            elif error.code < 500:
                raise DataError(_by_hand(download, _told(error))) from error
            reason = f"{error.code} {error.reason}"
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
                raise  # the disk's fault, not the network's
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        after = part.stat().st_size if part.exists() else 0
        vain = 0 if after > before else vain + 1
        if vain >= DOWNLOAD_ATTEMPTS:
            raise DataError(_by_hand(download, f"{reason}, {DOWNLOAD_ATTEMPTS} times in a row"))
        time.sleep(pause * 2**vain)


def _receive_once(download: Download, part: Path, start: int, on_progress: OnProgress) -> bool:
    """Append to `part` what one connection brings; whether that completes it."""
    request = urllib.request.Request(download.url, headers={"User-Agent": "smkd"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    response: HTTPResponse
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        goes_on = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        done = start if goes_on else 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length and length.isdigit() else None
        with part.open("ab" if goes_on else "wb") as file:
            while block := response.read(READ_AT_ONCE):
                file.write(block)
                done += len(block)
                on_progress(done, total)
    return total is None or done == total


def _check(path: Path, download: Download, aside: Path) -> None:
    kind, expected = download.digest.split(":")
    found = file_digest(path, kind)
    if found != expected:
        os.replace(path, aside)
        raise DataError(
            f"'{download.name}' from {download.url} has {kind.upper()} {found}, expected {expected}; it is kept as "
            f"'{aside}'; try again, or fetch it by hand from {download.page}"
        )


def _told(error: urllib.error.HTTPError) -> str:
    if "infinite loop" in str(error.reason):
        return "the server redirects without end"
    return f"{error.code} {error.reason}"


def _by_hand(download: Download, reason: str) -> str:
    return (
        f"cannot download {download.url}: {reason}; fetch '{download.name}' by hand from {download.page} "
        f"and give it with {download.option}"
    )
