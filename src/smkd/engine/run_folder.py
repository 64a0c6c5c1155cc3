"""The folder of a run: who may write there, what is resumed, and which checkpoints are kept.

runs/<name>/config.yaml, command.txt, env.json, metrics.jsonl, tensorboard/, checkpoints/
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smkd import distributed
from smkd.config import loading
from smkd.config.checks import check_used, cut_differently
from smkd.config.run_config import RunConfig
from smkd.engine import checkpoint
from smkd.engine.checkpoint_schema import RESUMED, checked_moments, needed
from smkd.engine.log import check_there, console
from smkd.errors import CheckpointError, ConfigError
from smkd.files import PARTIAL

NAME = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)
REFUSED = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of reading that are no damage: no permission, no more open files, no memory."""


@contextlib.contextmanager
def held(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Be the only writer of a folder, which is made if need be, and taken away again if it is still empty.

    Args:
        folder: the folder.
        say: told in one line where there are no locks.

    Raises:
        ConfigError: another process writes there; names its host and process.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={folder} is a file, not a folder")
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    file = _locked(folder / NAME, say)
    try:
        yield
    finally:
        if file is not None:
            # gone before it is free, so that nobody locks a file that no longer has a name
            with contextlib.suppress(OSError):
                (folder / NAME).unlink(missing_ok=True)
            os.close(file)
        with contextlib.suppress(OSError):  # one that holds something stays
            for place in missing:
                place.rmdir()


def _locked(path: Path, say: Callable[[str], None]) -> int | None:
    try:
        import fcntl
    except ImportError:
        path.parent.mkdir(parents=True, exist_ok=True)
        say("this system has no file locks: see to it that no other process writes to this run")
        return None
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another start has just taken its empty folder away
            continue
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is(file, path):  # its last holder has just removed it
                os.close(file)
                continue
            os.ftruncate(file, 0)
            os.write(file, f"{socket.gethostname()} {os.getpid()}\n".encode())
        except OSError as error:
            holder = os.pread(file, 1000, 0).decode(errors="replace").split()
            os.close(file)
            if error.errno in HELD:
                who = f"process {holder[1]} on {holder[0]}" if len(holder) == 2 else "another process"
                raise ConfigError(
                    f"'{path.parent}' is being written by {who}; wait for its end, or choose another out="
                ) from error
            say(f"no lock on '{path}' ({error.strerror}): see to it that no other process writes to this run")
            return None
        return file


def _is(file: int, path: Path) -> bool:
    """Whether an open file is the one that has this name."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file), there)


@dataclass
class Selection:
    """Accuracies of one validation after another.

    Attributes:
        patience: validations without a gain after which the run ends; 0 for never.
        best: highest accuracy so far; of equal ones the first counts.
        stale: validations since.
        step: optimiser steps at the best one.
    """

    patience: int = 0
    best: float = -math.inf
    stale: int = 0
    step: int = -1

    def take(self, accuracy: float | None, step: int) -> bool:
        """Note a validation, or that there was none; whether it is the best so far."""
        if accuracy is None:
            return False
        if accuracy > self.best:
            self.best, self.stale, self.step = accuracy, 0, step
            return True
        self.stale += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return 0 < self.patience <= self.stale


DAMAGED = ".damaged"
"""Suffix that a checkpoint gets once its content does not fit its checksums."""
UNTOLD = ("out", "resume", "overwrite", "resume_with")
"""Settings that say where or whether to go on; they are no change of a run."""


@dataclass
class FoundCheckpoint:
    """The newest whole state of a run.

    Attributes:
        state: what the file holds.
        path: the file.
        damaged: files that should have come first and cannot be read, and why.
    """

    state: dict[str, Any]
    path: Path
    damaged: dict[Path, str]


@dataclass
class Standing:
    """Where a run stands.

    Attributes:
        typed: the settings as typed, with the words of `resume_with` of all starts.
        config: the settings to go on with: what is counted in epochs as the run began, then `resume_with`.
        found: the state to go on from; none for a new run.
        changes: settings that are no longer what they were.
        kept: settings that stay what they were, though others are typed.
    """

    typed: RunConfig
    config: RunConfig
    found: FoundCheckpoint | None
    changes: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def run_path(config: RunConfig) -> Path:
    """Where a run lives."""
    return config.out or Path("runs") / (config.recipe or config.phase)


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Keep other runs out of the folder while this one works there; the first process does so for all.

    Raises:
        ConfigError: another run works there.
    """
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            stack.enter_context(held(out, lambda line: console.print(line, markup=False)))
        yield


def resumable(config: RunConfig, out: Path) -> Standing:
    """Where a run stands, and with which settings it goes on.

    Raises:
        ConfigError: the folder holds another run, or this one where `resume` is off; or none that could be changed.
        CheckpointError: it holds checkpoints, and none that can be read.
    """
    settings = out / "config.yaml"
    before = loading.load_config(settings) if settings.exists() else None
    distributed.barrier()  # all processes look before the first one writes
    changes = [] if before is None else _changes(before, config)
    # a restart of the command that replaced what was here goes on
    if before is None or (config.overwrite and (changes or not before.overwrite)):
        if config.resume_with:
            raise ConfigError(f"resume_with={' '.join(config.resume_with)}: there is no run in '{out}' to go on with")
        return Standing(config, config, None)
    if changes:
        raise ConfigError(
            f"'{out}' holds a run with another configuration ({'; '.join(changes[:3])}"
            f"{'; ...' if len(changes) > 3 else ''}); choose another out=, or overwrite=true, "
            "or change this run from here on by resume_with=key=value"
        )
    if not config.resume:
        raise ConfigError(f"'{out}' already holds this run and resume=false; choose another out=, or overwrite=true")
    kept, new = before.resume_with, config.resume_with
    new = () if kept[len(kept) - len(new) :] == new else new  # a restart of the command that made the change
    typed = config.model_copy(update={"resume_with": (*kept, *new)})
    found = newest(out)
    begun = typed if found is None else loading.lasting(typed, loading.check(found.state["config"]))
    config = loading.resumed_with(begun, typed.resume_with)
    stays = loading.differences(loading.resumed_with(typed, typed.resume_with), config)
    check_used(config, [word.partition("=")[0] for word in new])
    changes = [line for line in loading.differences(before, typed, free=True) if line.split(":")[0] not in UNTOLD]
    return Standing(typed, config, found, [*changes, *(f"resume_with: {word}" for word in new)], stays)


def _changes(before: RunConfig, config: RunConfig) -> list[str]:
    """What makes another run of it."""
    cut = cut_differently(before, config)
    return [line for line in loading.differences(before, config) if line.split(":")[0] not in cut]


def newest(out: Path) -> FoundCheckpoint | None:
    """The newest state of a run that can be read; None if it has no checkpoint.

    Raises:
        CheckpointError: it has checkpoints, and none can be read.
    """
    ordered, others = _by_age(out)
    damaged: dict[Path, str] = {}
    for path in ordered:
        if (state := _read(path, damaged)) is not None:
            return FoundCheckpoint(state, path, damaged)
    newest: FoundCheckpoint | None = None
    for path in others:
        state = _read(path, damaged)
        if state is not None and (newest is None or int(state["step"]) > int(newest.state["step"])):
            newest = FoundCheckpoint(state, path, damaged)
    if newest is None and damaged:
        raise CheckpointError(
            f"'{out}': none of its {len(damaged)} checkpoints can be read; choose another out=, or overwrite=true"
        )
    return newest


def _by_age(out: Path) -> tuple[list[Path], list[Path]]:
    """Checkpoints of a run: the last ones, newest first, and the others in any order."""
    folder = out / "checkpoints"
    last = folder / "last.pt"
    ordered = [last, *checkpoint.earlier(last)] if last.is_file() else checkpoint.earlier(last)
    return ordered, [path for path in (*sorted(folder.glob("step-*.pt")), folder / "best.pt") if path.is_file()]


def _read(path: Path, damaged: dict[Path, str]) -> dict[str, Any] | None:
    """What a checkpoint holds; None, and a note why, if it is damaged.

    It is read a second time before it counts as damaged: PyTorch raises the end of a loading process, which an earlier
    run in this Python may have left, in whatever the main thread is doing.

    Raises:
        CheckpointError: the machine does not let it be read, which says nothing about the file.
    """
    try:
        return _whole(path)
    except CheckpointError:
        try:
            return _whole(path)
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in REFUSED:
                raise
            damaged[path] = str(error)
            return None


def _whole(path: Path) -> dict[str, Any]:
    state = checkpoint.load_checkpoint(path)
    needed(state, RESUMED, str(path))
    checked_moments(state, str(path))
    return state


def tidy(out: Path, found: FoundCheckpoint | None, selection: Selection) -> list[str]:
    """Bring the folder of a run that goes on in order: no half-written or damaged file, the best state in its place.

    Args:
        out: the folder.
        found: what the run goes on from.
        selection: whose best state `best.pt` should hold; where that is lost, the next validation makes another.

    Returns:
        Lines about what was found.
    """
    for folder in (out, out / "checkpoints"):
        for partial in folder.glob(f".*{PARTIAL}"):
            partial.unlink()
    if found is None:
        return []
    notes = []
    for path, why in found.damaged.items():
        path.replace(path.with_name(path.name + DAMAGED))
        notes.append(f"{why}; it is '{path.name}{DAMAGED}' now")
    if found.path.name != "last.pt":
        notes.append(f"there is no whole last.pt; going on from '{found.path}'")
        checkpoint.save_checkpoint(found.state, found.path.with_name("last.pt"))
    return notes + _restore_best(out, found, selection)


def _restore_best(out: Path, found: FoundCheckpoint, selection: Selection) -> list[str]:
    best = out / "checkpoints" / "best.pt"
    if selection.best == -math.inf:
        return []
    try:
        checkpoint.verify_archive(best)
        return []
    except CheckpointError as error:
        why = str(error)
    if found.state["step"] == selection.step:
        checkpoint.save_checkpoint(found.state, best)
        return [f"{why}; written again from '{found.path.name}'"]
    for path in [path for group in _by_age(out) for path in group if path != best]:
        state = _read(path, {})
        if state is not None and state["step"] == selection.step:
            checkpoint.save_checkpoint(state, best)
            return [f"{why}; written again from '{path.name}'"]
    selection.best = -math.inf
    return [f"{why}; no other file holds that state, so the next validation counts as the best"]


def remove(out: Path) -> None:
    """Clear a run's folder, now that everything the new run needs has been read; no other folder is touched."""
    distributed.barrier()
    if distributed.is_main() and (out / "config.yaml").exists():
        # the settings last: killed in between, the folder still counts as a run
        for entry in sorted(out.iterdir(), key=lambda entry: entry.name == "config.yaml"):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != NAME:
                entry.unlink()
    distributed.barrier()


def keep_checkpoint(state: dict[str, Any], folder: Path, config: RunConfig, *, is_best: bool) -> None:
    """Keep a state as the last one and, where asked for, under other names.

    The last one comes last: killed before, the run goes on from an earlier state and writes the others again.

    Raises:
        SmkdError: it cannot be written, or the run's folder is gone.
    """
    check_there(folder.parent)
    if config.save_every and state["epoch"] % config.save_every == 0 and not state["step_in_epoch"]:
        checkpoint.save_checkpoint(state, folder / f"step-{state['step']:08d}.pt")
    if is_best:
        checkpoint.save_checkpoint(state, folder / "best.pt")
    last = folder / "last.pt"
    with checkpoint.keeping_earlier(last, config.keep):
        checkpoint.save_checkpoint(state, last)
