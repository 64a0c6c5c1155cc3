"""`smkd data prepare`: from a name and the user's files to a prepared folder."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from smkd.download import OnBytes, download
from smkd.errors import ChecksumError, DataError, DownloadError
from smkd.files import expanded, explained
from smkd.machine import cores
from smkd.prepare.archives import reading
from smkd.prepare.build import Plan, Target, build_folder
from smkd.prepare.caltech import plan_caltech, repeats
from smkd.prepare.cifar import plan_cifar
from smkd.prepare.imagenet import known_pairs, open_ilsvrc, plan_mini, plan_tiered, read_lists
from smkd.prepare.manifest import Identity, manifest_hash
from smkd.prepare.mini_copies import find_copy, plan_folders, plan_pickles
from smkd.prepare.omniglot import plan_omniglot
from smkd.prepare.registry import Benchmark, Download, benchmark, ilsvrc_counts
from smkd.processes import allowed
from smkd.progress import OnProgress

Size = int | Literal["original"]

SIDES = range(8, 4097)
MINI_SIZE = 480
"""Side in pixels to which the authors of SMKD resized miniImageNet."""
TAKES: Mapping[str, tuple[str, ...]] = {
    "mini-imagenet": ("source", "lists", "size"),
    "tiered-imagenet": ("source", "size", "link"),
    "cifar-fs": ("archives",),
    "fc100": ("archives",),
    "caltech101": ("archives",),
    "omniglot": ("archives",),
}


@dataclass(frozen=True)
class PrepareRequest:
    """What the user asked for; `~` in its paths is expanded.

    Attributes:
        name: data set.
        out: folder to prepare.
        archives: its archives; downloaded beside `out` where none are given.
        source: ILSVRC-12's train folder or tar, or a copy of miniImageNet.
        lists: folder of miniImageNet's three CSV files; downloaded beside `out` if not given.
        size: side of the square images are resized to, 'original', or None for the data set's own choice.
        link: link to the source's files instead of copying them.
        processes: how many write; None means one for each core.
    """

    name: str
    out: Path
    archives: tuple[Path, ...] = ()
    source: Path | None = None
    lists: Path | None = None
    size: Size | None = None
    link: bool = False
    processes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "archives", tuple(map(expanded, self.archives)))
        for name in ("out", "source", "lists"):
            place = getattr(self, name)
            object.__setattr__(self, name, place if place is None else expanded(place))


def prepare(request: PrepareRequest, on_progress: OnProgress, warn: Callable[[str], None]) -> str:
    """Prepare a data set, or go on where a killed prepare stopped; the hash of its `dataset.json`.

    Args:
        request: what to prepare from what.
        on_progress: told of downloads (bytes) and images.
        warn: told lines that the user should read.

    Raises:
        DataError: anything about the files, the folder or the options that is not right.
    """
    facts = benchmark(request.name)
    _check_options(request)
    target = Target(request.out, Identity(facts.name, facts.version, facts.rule, _options(request)))
    if target.complete():
        shutil.rmtree(target.work, ignore_errors=True)  # left by a kill after the very last step
        return manifest_hash(request.out)
    archives = request.archives
    if not archives and "archives" in TAKES[request.name]:
        archives = _download(facts, request.out, on_progress)
    marks = {f"archive {number}": _mark(path) for number, path in enumerate(archives, 1)}
    plan = _plan(request, facts, archives, on_progress)
    for line in plan.warnings:
        warn(line)
    build_folder(target, plan, marks, request.processes or max(1, allowed(cores())), partial(on_progress, "images"))
    return manifest_hash(request.out)


def _check_options(request: PrepareRequest) -> None:
    takes = TAKES[request.name]
    for field, option in (
        ("archives", "archive"),
        ("source", "source"),
        ("lists", "lists"),
        ("size", "size"),
        ("link", "link"),
    ):
        if getattr(request, field) not in (None, (), False) and field not in takes:
            known = ", ".join("--" + name.removesuffix("s" if name == "archives" else "") for name in takes)
            raise DataError(f"--{option} does not apply to {request.name}, which takes {known}")
    if "source" in takes and request.source is None:
        raise DataError(f"{request.name} needs {benchmark(request.name).needs}")
    expected = len(benchmark(request.name).downloads)
    if request.archives and len(request.archives) != expected:
        raise DataError(f"{request.name} needs {expected} --archive, {len(request.archives)} given")
    if isinstance(request.size, int) and request.size not in SIDES:
        raise DataError(f"--size {request.size}: give {SIDES.start} to {SIDES.stop - 1} pixels, or 'original'")


def _options(request: PrepareRequest) -> dict[str, str | int]:
    """What of the user's choice changes the files."""
    if request.source is None:
        return {}
    size = _size(request) or "original"
    if request.name == "tiered-imagenet":
        return {"size": size}
    kind = find_copy(request.source)
    return {"size": size, "from": f"a copy ({kind})" if kind else "ILSVRC-12"}


def _size(request: PrepareRequest) -> int | None:
    """Side of the square images are resized to; None keeps them as they are."""
    if request.size is not None:
        return None if request.size == "original" else request.size
    is_full = request.name == "mini-imagenet" and request.source is not None and find_copy(request.source) is None
    return MINI_SIZE if is_full else None


def _plan(request: PrepareRequest, facts: Benchmark, archives: tuple[Path, ...], on_progress: OnProgress) -> Plan:
    entries = facts.classes
    match facts.name:
        case "cifar-fs" | "fc100":
            return plan_cifar(archives[0], entries)
        case "caltech101":
            return plan_caltech(archives[0], entries, repeats())
        case "omniglot":
            return plan_omniglot(archives, entries)
    source, size = request.source, _size(request)
    assert source is not None
    if facts.name == "tiered-imagenet":
        return plan_tiered(open_ilsvrc(source), entries, size, request.link)
    match find_copy(source):
        case "pickles":
            return plan_pickles(source, entries, size)
        case "folders":
            return plan_folders(source, entries, size)
    ilsvrc = open_ilsvrc(source)
    folder = request.lists
    if folder is None:
        folder = _beside(request.out) / "mini-imagenet-lists"
        for file in facts.downloads:
            fetch_file(file, folder, partial(on_progress, file.name))
    return plan_mini(ilsvrc, entries, read_lists(folder, entries), ilsvrc_counts(), size, known_pairs())


def _download(facts: Benchmark, out: Path, on_progress: OnProgress) -> tuple[Path, ...]:
    return tuple(fetch_file(file, _beside(out), partial(on_progress, file.name)) for file in facts.downloads)


def _beside(out: Path) -> Path:
    """Where downloads stay: next to the prepared folder, so that CIFAR-FS and FC100 share one."""
    return out.absolute().parent


def fetch_file(wanted: Download, folder: Path, on_progress: OnBytes, *, pause: float = 1.0) -> Path:
    """An archive, downloaded into `folder` unless it is there already; see `smkd.download.download`.

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


def _mark(archive: Path) -> str:
    """Tells two archives apart without reading them whole: size, and digest of the first MiB."""
    with reading(archive), archive.open("rb") as file:
        head = hashlib.sha256(file.read(1 << 20)).hexdigest()
        return f"{archive.stat().st_size} {head}"
