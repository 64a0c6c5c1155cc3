"""Fetch an archive of a data set, and say what to do by hand where that fails."""

from __future__ import annotations

from pathlib import Path

from smkd.download import OnBytes, download
from smkd.errors import ChecksumError, DataError, DownloadError
from smkd.files import explained
from smkd.prepare.registry import Download


def fetch_file(wanted: Download, folder: Path, on_progress: OnBytes, *, pause: float = 1.0) -> Path:
    """The file, downloaded into `folder` unless it is there already; see `smkd.download.download`.

    Args:
        wanted: what to fetch.
        folder: where it goes; made if need be.
        on_progress: told of the bytes.
        pause: seconds before connecting again, doubled each time.

    Raises:
        DataError: not found, unreachable, a redirect without end, a full disk, or a wrong checksum (the file is then
            kept aside).
    """
    target = folder / wanted.name
    try:
        with explained(folder, DataError, advice="the same command goes on from there"):
            download(wanted.url, target, wanted.digest, on_progress, pause=pause)
    except ChecksumError as error:
        raise DataError(
            f"'{wanted.name}' from {wanted.url} {error}; try again, or fetch it by hand from {wanted.page}"
        ) from error
    except DownloadError as error:
        raise DataError(
            f"cannot download {wanted.url}: {error}; fetch '{wanted.name}' by hand from {wanted.page} and give it with "
            f"{wanted.option}"
        ) from error
    return target
