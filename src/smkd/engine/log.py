"""The log of a run: settings, environment, metrics, lines on the console."""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL.Image import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from smkd import __version__
from smkd.config import foreign_text, loading
from smkd.config.run_config import RunConfig
from smkd.errors import ConfigError, SmkdError
from smkd.files import explained, printable, written_aside


class _Lines(Console):
    """Prints texts as they are, one line each, whatever the names in them."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


console = _Lines(highlight=False, soft_wrap=True, markup=False)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and source revision, for `env.json`."""
    names = ("torch", "numpy", "pydantic", "pillow", "scikit-learn", "h5py")
    is_cuda = device.type == "cuda"
    return {
        "smkd": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in names},
        "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
        "cuda": torch.version.cuda if is_cuda else None,
        "threads": torch.get_num_threads(),
        "revision": _revision(),
    }


def _revision() -> str | None:
    folder = Path(__file__).parent
    try:
        shown = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return shown.stdout.strip()


class RunLog:
    """Writes metrics.jsonl, TensorBoard and, if asked, W&B. In processes other than the first it does nothing.

    Args:
        out: run folder.
        config: resolved configuration.
        device: for env.json.
        step, epoch: steps and whole epochs that are done where the run starts; records that an interrupted run made
            after that are dropped.
        active: whether this process writes.
        changes: settings that are no longer what they were, for history.jsonl.
    """

    def __init__(
        self, out: Path, config: RunConfig, device: torch.device, *, step: int, epoch: int, active: bool,
        changes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.active, self.out = active, out
        self.progress: Progress | None = None
        if not active:
            return
        self.wandb = _start_wandb(out, config) if config.wandb else None
        out.mkdir(parents=True, exist_ok=True)
        _write(out / "config.yaml", loading.dump(config))
        with (out / "command.txt").open("a", encoding="utf-8") as file:
            file.write(shlex.join(sys.argv) + "\n")
        _write(out / "env.json", json.dumps(environment(device), indent=2) + "\n")
        if changes:
            with (out / "history.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 3), "step": step, "changes": list(changes)}) + "\n")
        if damaged := _drop_records_after(out / "metrics.jsonl", step, epoch):
            self.say(f"{out / 'metrics.jsonl'}: {damaged} damaged lines were dropped")
        self.metrics = (out / "metrics.jsonl").open("a", encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter

        self.tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self.hook = threading.excepthook
        threading.excepthook = self._thread_failed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Flush and close every sink; what fails then is no news after an error."""
        if not self.active:
            return
        with contextlib.suppress(OSError) if kind else explained(self.out / "tensorboard", SmkdError):
            self.metrics.close()
            self.tensorboard.close()
        threading.excepthook = self.hook
        if self.wandb is not None:
            self.wandb.finish()

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        # TensorBoard raises the error of its thread once more where the next number is written
        if not type(failed.thread).__module__.startswith("tensorboard."):
            self.hook(failed)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One object of metrics.jsonl: its kind ('train', 'epoch', 'validation'), the step, and the values.

        Raises:
            SmkdError: it cannot be written, or the run's folder is gone.
        """
        if not self.active:
            return
        check_there(self.out)
        with explained(self.out / "metrics.jsonl", SmkdError):
            line = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
            self.metrics.write(json.dumps(line) + "\n")
            self.metrics.flush()
        numbers = {f"{kind}/{k}": float(v) for k, v in values.items() if isinstance(v, int | float)}
        with explained(self.out / "tensorboard", SmkdError):
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def show(self, pictures: Mapping[str, Image], step: int) -> None:
        """Pictures by name, for TensorBoard and W&B."""
        if not self.active:
            return
        with explained(self.out / "tensorboard", SmkdError):
            for name, picture in pictures.items():
                self.tensorboard.add_image(name, np.asarray(picture), step, dataformats="HWC")
        if self.wandb is not None:
            import wandb

            self.wandb.log({name: wandb.Image(picture) for name, picture in pictures.items()}, step=step)

    def say(self, text: str) -> None:
        """A line on the console."""
        if self.active:
            (self.progress.console if self.progress else console).print(text)

    @contextlib.contextmanager
    def bar(self, title: str, total: int, done: int) -> Iterator[Bar]:
        """Progress bar over steps on a terminal; elsewhere a bar that shows nothing."""
        if not self.active or not console.is_terminal:
            yield Bar(None)
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console) as progress:
            self.progress = progress
            progress.add_task(title, total=total, completed=done, note="")
            yield Bar(progress)
        self.progress = None


def check_there(out: Path) -> None:
    """Raise `SmkdError` if the folder of a run that has begun was removed or moved."""
    if not (out / "config.yaml").exists():
        raise SmkdError(f"'{out}' is gone: it was removed or moved while the run wrote to it; nothing more is saved")


def _start_wandb(out: Path, config: RunConfig) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("wandb=true needs the extra: pip install 'smkd[wandb]'") from error
    return wandb.init(project=config.wandb_project, name=out.name, config=config.model_dump(mode="json"))


def _drop_records_after(path: Path, step: int, epoch: int) -> int:
    """Keep what was recorded up to a step; how many whole lines of the rest were damaged."""
    if not path.exists():
        return 0
    lines = list(foreign_text.json_records(path))
    kept = [line for line, record in lines if record is not None and _is_before(record, step, epoch)]
    if len(kept) < len(lines):
        _write(path, "".join(kept))
    # a crash cuts the last line short
    return sum(record is None and line.endswith("\n") for line, record in lines)


def _is_before(record: dict[str, Any], step: int, epoch: int) -> bool:
    # after its last step an epoch may still have to be closed
    key, last = ("epoch", epoch) if "epoch" in record else ("step", step)
    return isinstance(record.get(key), int) and record[key] <= last


def _write(path: Path, text: str) -> None:
    with explained(path, SmkdError), written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


class Bar:
    """A progress bar, or nothing."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress

    def advance(self, note: str) -> None:
        """One step further."""
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], advance=1, note=note)
