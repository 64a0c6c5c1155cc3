"""Writing a prepared folder: restartable, over several processes, in bounded memory.

    <root>/<train|val|test>/<class>/<image>   each written aside and renamed
           dataset.json                       last of all
           .prepare/                          while it is being made: request.json, journal, files aside

The journal names every image that is done. A killed prepare is repeated: images of the journal are kept, others made
again, so `dataset.json` is the same as without the interruption.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from smkd.data.formats import is_hidden
from smkd.errors import DataError
from smkd.files import PARTIAL, explained, written_aside
from smkd.prepare.manifest import FILE_NAME, FileRecord, Identity, read_manifest, write_manifest
from smkd.prepare.writing import AS_IT_IS, WORK_FOLDER, FileRange, Item, Pixels, Record, Writing, write_items
from smkd.processes import GUARD, end_where_unguarded, end_with_parent

CHUNK_IMAGES, CHUNK_BYTES = 64, 4 * 1024 * 1024
"""Most of what one task of a worker takes."""
TASKS_AHEAD = 3
"""Tasks per worker that wait in memory."""


@dataclass(frozen=True)
class Plan:
    """The images that a builder found in its source: all are checked, none is written yet.

    Attributes:
        items: the images, each target once; read lazily where that saves memory.
        total: how many.
        writing: how to write them.
        warnings: lines the user should read.
    """

    items: Iterable[Item]
    total: int
    writing: Writing = AS_IT_IS
    warnings: tuple[str, ...] = ()


class Target:
    """The folder being prepared.

    Args:
        root: the folder; it may be missing, empty, or left by a killed prepare of the same data.
        identity: what it is to hold.
    """

    def __init__(self, root: Path, identity: Identity) -> None:
        self.root, self.identity = root, identity
        self.work = root / WORK_FOLDER
        self.journal = self.work / "journal"
        self._wanted = {**asdict(identity), "options": dict(identity.options)}

    def take_up(self, source: Mapping[str, str]) -> dict[str, FileRecord]:
        """Make the folder ready to be written; the images that are done already.

        Args:
            source: what must agree with an earlier prepare that was killed, such as the digests of the archives.

        Raises:
            DataError: the folder holds something else, or may not be written.
        """
        done = self.done()
        with _explained(self.root):
            self.work.mkdir(parents=True, exist_ok=True)
            begun = self._request()
            if begun is not None and begun.get("source") != dict(source):
                raise DataError(f"'{self.root}' was begun from another source; give that one, or delete the folder")
            for left in self.work.glob(f"*{PARTIAL}"):
                left.unlink(missing_ok=True)
            with written_aside(self.work / "request.json") as aside:
                aside.write_text(json.dumps({"wanted": self._wanted, "source": dict(source)}), encoding="utf-8")
        return {name: record for name, record in done.items() if _size(self.root / name) == record[0]}

    def write_journal(self, done: Mapping[str, FileRecord]) -> None:
        """Replace the journal: what it named and is gone, or was cut by a kill, is dropped."""
        with written_aside(self.journal) as aside, aside.open("w", encoding="utf-8", newline="\n") as journal:
            journal.writelines(_line((name, *record)) for name, record in done.items())

    def complete(self) -> bool:
        """Whether the folder is finished: `dataset.json` of the same data, and every file it names.

        Raises:
            DataError: the folder holds something else.
        """
        files = self.done()
        return (self.root / FILE_NAME).exists() and all(_size(self.root / n) == size for n, (size, _) in files.items())

    def _manifest_files(self) -> Mapping[str, FileRecord]:
        manifest = read_manifest(self.root)
        if manifest.identity != self.identity:
            raise DataError(f"'{self.root}' holds {manifest.identity}, not {self.identity}; choose another --out")
        return manifest.files

    def done(self) -> Mapping[str, FileRecord]:
        """What the folder's manifest or journal names.

        Raises:
            DataError: the folder holds something else.
        """
        with _explained(self.root):
            if self.root.exists() and not self.root.is_dir():
                raise DataError(f"--out: '{self.root}' is a file; give a folder")
            if (self.root / FILE_NAME).exists():
                return self._manifest_files()
            return self._begun()

    def _begun(self) -> Mapping[str, FileRecord]:
        begun = self._request()
        if begun is not None:
            if begun.get("wanted") != self._wanted:
                raise DataError(
                    f"'{self.root}' was begun with other settings; repeat that command, or delete the folder"
                )
            return read_journal(self.journal)
        if self.root.exists():
            other = sorted(entry.name for entry in self.root.iterdir() if not is_hidden(entry.name))
            if other:
                raise DataError(f"'{self.root}' already holds '{other[0]}'; give an empty or new folder with --out")
        return {}

    def _request(self) -> dict[str, object] | None:
        try:
            values = json.loads((self.work / "request.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return values if isinstance(values, dict) else {}


def build_folder(
    target: Target,
    plan: Plan,
    source: Mapping[str, str],
    processes: int,
    on_progress: Callable[[int, int | None], None],
) -> None:
    """Write what the plan holds and is not there yet, then `dataset.json`.

    Args:
        target: the folder.
        plan: its content.
        source: see `Target.take_up`.
        processes: how many write; 1 means this one.
        on_progress: told of images done and in all.

    Raises:
        DataError: no space, no permission, a bad image, or a source that changed meanwhile.
    """
    done = target.take_up(source)
    finished = len(done)
    todo = (item for item in plan.items if item.target not in done)
    with _explained(target.root, lambda: f"{finished} of {plan.total} images are done; "):
        target.write_journal(done)
        with target.journal.open("a", encoding="utf-8", newline="\n") as journal:
            on_progress(finished, plan.total)
            for records in _written(str(target.root), plan.writing, chunks(todo), processes):
                journal.writelines(map(_line, records))
                journal.flush()
                finished += len(records)
                on_progress(finished, plan.total)
        del done
        files = read_journal(target.journal)
        if len(files) != plan.total:
            raise DataError(f"the source changed while it was read: {len(files)} images came, {plan.total} expected")
        write_manifest(target.root, target.identity, files)
        shutil.rmtree(target.work)


def chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in lists of bounded number and bytes."""
    chunk: list[Item] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += _held(item)
        if len(chunk) >= CHUNK_IMAGES or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def read_journal(path: Path) -> dict[str, FileRecord]:
    """Images a journal names; a last line without its end, cut by a kill, does not count."""
    if not path.exists():
        return {}
    files: dict[str, FileRecord] = {}
    with path.open(encoding="utf-8", newline="\n") as journal:
        for line in journal:
            fields = line.rstrip("\n").split("\t")
            if line.endswith("\n") and len(fields) == 3:
                files[fields[2]] = (int(fields[0]), fields[1])
    return files


def _explained(root: Path, done: Callable[[], str] = str) -> AbstractContextManager[None]:
    again = "make room if that is why, and run the same command again: it goes on from there"
    return explained(root, DataError, option="--out", advice=lambda: f"{done()}{again}")


def _written(out: str, writing: Writing, work: Iterator[list[Item]], processes: int) -> Iterator[list[Record]]:
    end_where_unguarded()
    if processes == 1:
        for chunk in work:
            yield write_items(out, writing, chunk)
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin_worker)
    running: set[Future[list[Record]]] = set()
    try:
        for chunk in work:
            running.add(pool.submit(write_items, out, writing, chunk))
            if len(running) >= processes * TASKS_AHEAD:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (task.result() for task in finished)
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (task.result() for task in finished)
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed (out of memory?); run the same command again, with fewer --processes; from "
            f"Python, {GUARD}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process answers Ctrl-C
    end_with_parent()


def _held(item: Item) -> int:
    source = item.source.data if isinstance(item.source, Pixels) else item.source
    return 0 if isinstance(source, FileRange) else len(source)


def _line(record: Record) -> str:
    target, size, digest = record
    return f"{size}\t{digest}\t{target}\n"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
