"""Fetching one file: with progress, going on after a cut connection, and never trusted before its checksum agrees."""

from __future__ import annotations

import errno
import hashlib
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from typing import BinaryIO

from smkd.errors import ChecksumError, DownloadError

OnBytes = Callable[[int, int | None], None]
"""Called with how many bytes are there and how many there are in all, if that is known."""
READ_AT_ONCE = 1 << 18
DOWNLOAD_ATTEMPTS = 5
"""Connections in a row that may bring nothing before the download is given up."""
TIMEOUT = 30.0
"""Seconds without an answer after which a connection counts as cut."""


def download(url: str, target: Path, digest: str, on_progress: OnBytes, *, pause: float = 1.0) -> None:
    """Put the file at an address to `target`, unless it is there already.

    An unfinished download stays as `<name>.part` and is continued, also by a later call; another process that wants the
    same file waits for it. A file with a wrong checksum is kept as `<name>.wrong`.

    Args:
        url: http or https.
        target: where it goes; its folder is made if need be.
        digest: 'md5:<hex>' or 'sha256:<hex>' of the whole file.
        on_progress: told of the bytes.
        pause: seconds before connecting again, doubled each time.

    Raises:
        DownloadError: not found, unreachable, or a redirect without end; the reason alone.
        ChecksumError: the file is another one, also where it was there before.
        OSError: the disk's fault.
    """
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        with _alone(part) as file:
            if not target.is_file():
                _receive(url, file, on_progress, pause)
                with suppress(OSError):  # a device
                    os.fsync(file.fileno())
                _check(part, target, digest)
                os.replace(part, target)
                return
            part.unlink()
    _check(target, target, digest)


@contextmanager
def _alone(part: Path) -> Iterator[BinaryIO]:
    """The unfinished file, to append to; other processes wait, where the file system has locks."""
    while True:
        with part.open("ab") as file:
            with suppress(ImportError, OSError):
                import fcntl

                fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            # who had it before may have finished and renamed it
            if part.exists() and os.path.samestat(part.stat(), os.fstat(file.fileno())):
                yield file
                return


def _receive(url: str, file: BinaryIO, on_progress: OnBytes, pause: float) -> None:
    vain = 0
    while True:
        before = os.fstat(file.fileno()).st_size
        try:
            if _receive_once(url, file, before, on_progress):
                return
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            if error.code == 416 and before:  # the server has no more than is here: start over, the checksum decides
                file.truncate(0)
            elif error.code < 500:
                raise DownloadError(_told(error)) from error
            reason = f"{error.code} {error.reason}"
        except (ValueError, InvalidURL) as error:
            raise DownloadError(str(error) or type(error).__name__) from error
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
                raise  # the disk's fault, not the network's
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        vain = 0 if os.fstat(file.fileno()).st_size > before else vain + 1
        if vain >= DOWNLOAD_ATTEMPTS:
            raise DownloadError(f"{reason}, {DOWNLOAD_ATTEMPTS} times in a row")
        time.sleep(pause * 2**vain)


def _receive_once(url: str, file: BinaryIO, start: int, on_progress: OnBytes) -> bool:
    """Append what one connection brings; whether that completes the file."""
    request = urllib.request.Request(url, headers={"User-Agent": "smkd"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    response: HTTPResponse
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        goes_on = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        done = start if goes_on else 0
        if start and not goes_on:
            file.truncate(0)
        length = response.headers.get("Content-Length")
        total = done + int(length) if length and length.isdigit() else None
        try:
            while block := response.read(READ_AT_ONCE):
                file.write(block)
                done += len(block)
                on_progress(done, total)
        finally:
            file.flush()
    return total is None or done == total


def _check(path: Path, target: Path, digest: str) -> None:
    kind, expected = digest.split(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if found != expected:
        kept = target.with_name(f"{target.name}.wrong")
        os.replace(path, kept)
        raise ChecksumError(
            f"has {kind.upper().replace('SHA', 'SHA-')} {found}, expected {expected}; it is kept as '{kept}'"
        )


def _told(error: urllib.error.HTTPError) -> str:
    if "infinite loop" in str(error.reason):
        return "the server redirects without end"
    return f"{error.code} {error.reason}"
