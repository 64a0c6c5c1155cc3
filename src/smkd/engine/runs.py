"""What the folders of runs say of them, also of runs that go on or were killed; nothing is locked or changed."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smkd.config import foreign_text, loading
from smkd.config.run_config import RunConfig
from smkd.engine.run_folder import NAME, Selection
from smkd.errors import ConfigError

MARKS = ("config.yaml", "metrics.jsonl")
"""Files of a run's folder by which it is known."""


@dataclass(frozen=True)
class RunSummary:
    """A run in one line.

    Attributes:
        folder: of the run.
        recipe: its name; the phase where there is none.
        data: the folder of its images, or what they are called.
        state: 'complete', 'stopped', 'running (...)', or what is wrong with the folder.
        epoch, epochs: whole epochs that are done, and of how many.
        best: highest validation accuracy in percent; None if nothing was measured.
        best_epoch: the epoch of it.
        hours: of training, without validations and starts; a run that goes on again counts on.
        device: it was last started on.
    """

    folder: Path
    recipe: str = ""
    data: str = ""
    state: str = ""
    epoch: int = 0
    epochs: int = 0
    best: float | None = None
    best_epoch: int | None = None
    hours: float = 0.0
    device: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "folder": str(self.folder)}


def find_runs(place: Path) -> list[Path]:
    """Folders of runs: the place itself, or those below it in order.

    Raises:
        ConfigError: there is no such folder, or no run in it.
    """
    if not place.is_dir():
        raise ConfigError(f"'{place}' is no folder")
    if (place / MARKS[0]).is_file():
        return [place]
    found = sorted(path.parent for path in place.rglob(MARKS[0]) if (path.parent / MARKS[1]).is_file())
    if not found:
        raise ConfigError(f"'{place}' holds no run, which is a folder with {' and '.join(MARKS)}")
    return found


def config_of(run: Path) -> RunConfig:
    """The settings of a run.

    Raises:
        ConfigError: the folder is no run, or its config.yaml cannot be read.
    """
    if not (run / MARKS[0]).is_file():
        raise ConfigError(f"'{run}' " + (f"is no run: it holds no {MARKS[0]}" if run.exists() else "does not exist"))
    return loading.load_config(run / MARKS[0])


def named_runs(runs: Sequence[Path]) -> dict[str, Path]:
    """Runs by what to call them: the folder's name, or its path where two have the same."""
    names = [run.resolve().name for run in runs]
    return {str(run) if names.count(name) > 1 else name: run for name, run in zip(names, runs, strict=True)}


def run_summary(folder: Path) -> RunSummary:
    """What a run's folder says of it; what is damaged there becomes its state."""
    try:
        config = loading.load_config(folder / MARKS[0])
        records = [record for _, record in foreign_text.json_records(folder / MARKS[1]) if record is not None]
    except ConfigError as error:
        return RunSummary(folder, state=f"unreadable: {error}")
    except OSError as error:
        return RunSummary(folder, state=f"unreadable: {error.filename}: {error.strerror}")
    epochs = [record for record in records if record.get("kind") == "epoch"]
    validations = [record for record in records if record.get("kind") == "validation"]
    epoch = max((_number(record, "epoch") for record in epochs), default=0)
    scores = {int(_number(record, "epoch")): _number(record, "accuracy") for record in validations}
    best_epoch = max(scores, key=scores.__getitem__, default=None)
    return RunSummary(
        folder, config.recipe or config.phase, str(config.data.root or config.data.name),
        _holder(folder) or ("complete" if _is_complete(config, int(epoch), list(scores.values())) else "stopped"),
        int(epoch), config.epochs, None if best_epoch is None else scores[best_epoch], best_epoch,
        sum(_number(record, "seconds") for record in epochs) / 3600, _device(folder),
    )  # fmt: skip


def _number(record: dict[str, Any], key: str) -> float:
    value = record.get(key, 0)
    return float(value) if isinstance(value, int | float) else 0.0


def _is_complete(config: RunConfig, epoch: int, scores: list[float]) -> bool:
    selection = Selection(config.validation.patience)
    for number, score in enumerate(scores):
        selection.take(score, number)
    return epoch >= config.epochs or selection.exhausted


def _holder(folder: Path) -> str:
    """'running (...)' if a process holds the run; of another machine that is what its lock's file says."""
    try:
        host, number = (folder / NAME).read_text(encoding="utf-8").split()
        if host == socket.gethostname():
            os.kill(int(number), 0)
    except (OSError, ValueError):
        return ""
    return f"running (process {number} on {host})"


def _device(folder: Path) -> str:
    try:
        return str(foreign_text.read_json(folder / "env.json").get("device", ""))
    except (OSError, ValueError):
        return ""


def run_differences(first: Path, second: Path) -> list[str]:
    """Settings in which two runs differ, as `key: first -> second`: those that change what is computed come first.

    Raises:
        ConfigError: a folder is no run, or its config.yaml cannot be read.
    """
    one, other = config_of(first), config_of(second)
    return [*loading.differences(one, other), *loading.differences(one, other, free=True)]


def next_steps(run: Path, config: RunConfig) -> list[str]:
    """What follows a run, a command and its use a line."""
    steps = []
    if config.phase == "pretrain":
        recipe = (config.recipe or "folder-pretrain").replace("-pretrain", "-distill")
        data = "" if config.data.root is None else f" data={config.data.root}"
        steps.append(f"smkd distill {recipe}{data} init={run}   phase 2, with labels")
    steps += [
        f"smkd eval {run} --shot 1 --shot 5   few-shot accuracy, with its interval",
        f"smkd fit SUPPORT_DIR -o clf.smkd --backbone {run}   a classifier of your own classes",
        f"smkd app --backbone {run}   the same in the browser",
    ]
    return steps
