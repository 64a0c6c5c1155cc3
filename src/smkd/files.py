"""Helpers for files and the machine: writing aside, disk errors in words, digests, paths, cores, names.

with explained(path, CheckpointError), written_aside(path) as aside:
    aside.write_bytes(data)
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from smkd.errors import ConfigError, SmkdError

PARTIAL = ".partial"
"""Ending of what is being written."""
LEFT = 3600.0
"""Seconds without a change after which a file aside is what a killed process left."""
FULL = 2**20
"""Bytes; with less left, a failed write is put down to the disk being full."""
SHOWN = 5
"""Names that a message lists."""
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters of a name that would break a line, or let it do something to the terminal."""
REASONS = {
    errno.ENOENT: "its folder is not there",
    errno.ENOTDIR: "a file is there where a folder is needed",
    errno.EEXIST: "a file is there where a folder is needed",
    errno.ESTALE: "the folder of the network is gone",
}
"""In other words than the system's, which would mislead."""


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~user` at its beginning replaced by the home folder.

    Raises:
        ConfigError: there is no such user, or no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0].removeprefix("~")
        told = f"there is no user '{user}' here" if user else "the home folder is not known (HOME is not set)"
        raise ConfigError(f"'{path}': {told}; write the path in full") from error


@contextlib.contextmanager
def written_aside(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A temporary place to write a file or folder: at the end it is renamed to `path`; after an error it is removed.

    The place has a name that no other process has, in the folder of `path`, which is made if need be. What is there
    when the block ends is synced to disk, renamed, and the folder is synced, so that a crash leaves the old or the new
    one whole. A link is followed. Into a folder that is there, the new files are moved one by one; others stay.
    A pipe or device (`/dev/stdout`) gets the bytes at the end.

    Args:
        path: file or folder to write.
        folder: an empty folder is made; else an empty file.

    Raises:
        OSError: it cannot be written, or may not be; most causes are found before the block begins.
    """
    target = Path(os.path.realpath(path))
    there = _mode(target)
    if there is not None and not (stat.S_ISREG(there) or stat.S_ISDIR(there)):
        with _for_special(target) as aside:
            yield aside
        return
    if there is not None and stat.S_ISDIR(there) != folder:
        number = errno.ENOTDIR if folder else errno.EISDIR
        raise OSError(number, os.strerror(number), str(path))
    if there is not None and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(target)
    aside = target.parent / f"{_beginning(target)}{secrets.token_hex(6)}{PARTIAL}"
    try:
        if folder:
            aside.mkdir()
        else:
            aside.touch(exist_ok=False)
            if there is not None:
                shutil.copymode(target, aside)
        yield aside
        _sync(aside)
        _put(aside, target)
        _sync_folder(target if folder else target.parent)
    finally:
        _remove(aside)


def write_small(path: str, data: bytes, place: str) -> None:
    """Write one of thousands of small files aside and rename it; nothing is synced.

    For a caller who keeps account of which files are whole.

    Args:
        path: file to write; its folder exists.
        data: its content.
        place: folder for what is aside, on the same disk, which the caller clears.

    Raises:
        OSError: it cannot be written.
    """
    aside = f"{place}/{os.getpid()}{PARTIAL}"
    with open(aside, "wb") as file:
        file.write(data)
    os.replace(aside, path)


@contextlib.contextmanager
def explained(
    path: Path, kind: type[SmkdError], *, option: str = "", advice: str | Callable[[], str] = ""
) -> Iterator[None]:
    """Turn an error of the disk while `path` is written into one line.

    Args:
        path: the file or folder that is being written.
        kind: class of the error to raise.
        option: the option that asked for the file, such as '--json'.
        advice: end of the line that says what to do; or a function that returns it.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = _reason(error, path)
        more = advice if isinstance(advice, str) else advice()
        kept = "; the file that was there is kept" if os.path.isfile(path) else ""
        where = f"{option}: " if option else ""
        raise kind(f"{where}cannot write '{_place(error, path)}': {reason}{more and f'; {more}'}{kept}") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def millions(count: int) -> str:
    """A number of parameters in words, with two digits at least, such as 0.16 M."""
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e6:.2g} M"


def printable(text: str) -> str:
    """The text on one line: line ends, control characters and those that turn the direction of writing are escaped."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def nearest(name: str, known: Iterable[str], alike: float = 0.4) -> str:
    """The end of an error message: `; did you mean 'x'?`, or empty if no known name is similar (0 to 1)."""
    names = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=alike)
    return f"; did you mean '{names[close[0]]}'?" if close else ""


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _beginning(path: Path) -> str:
    # short, whatever the path's name: a name that fits must not become too long aside
    return f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}-"


def _remove_left(path: Path) -> None:
    """Remove what killed processes left of the same file."""
    for left in path.parent.glob(f"{_beginning(path)}*{PARTIAL}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT:
                _remove(left)


def _put(aside: Path, target: Path) -> None:
    if not (aside.is_dir() and target.is_dir()):
        os.replace(aside, target)
        return
    for file in sorted(aside.iterdir()):
        os.replace(file, target / file.name)


def _sync(aside: Path) -> None:
    for file in [each for each in aside.rglob("*") if each.is_file()] if aside.is_dir() else [aside]:
        number = os.open(file, os.O_RDWR)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _sync_folder(folder: Path) -> None:
    # some systems and network drives have no such thing; the file itself is on disk
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextlib.contextmanager
def _for_special(target: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        aside = Path(folder) / "file"
        aside.touch()
        yield aside
        with target.open("wb") as sink, aside.open("rb") as source:
            shutil.copyfileobj(source, sink)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _reason(error: OSError | RuntimeError, path: Path) -> str:
    """The disk's error, also if a library wrapped it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return REASONS.get(seen.errno or 0) or seen.strerror or str(seen)
        seen = seen.__cause__ or seen.__context__
    # torch reports a full disk as an internal position that is off
    folder = next((each for each in path.absolute().parents if each.is_dir()), None)
    is_full = folder is not None and shutil.disk_usage(folder).free < FULL
    return os.strerror(errno.ENOSPC) if is_full else str(error).split("\n")[0]


def _place(error: BaseException, path: Path) -> str | Path:
    """The file that the error names, if it belongs to what is being written and is no file aside."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str) or name.endswith(PARTIAL):
        return path
    return name if path in Path(name).parents or Path(name) in path.parents else path
