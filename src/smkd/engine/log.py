"""What a run writes about itself: settings, environment, running means, metrics, lines on the console."""

from __future__ import annotations

import json
import math
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from smkd import __version__, distributed
from smkd.config import loading
from smkd.config.run_config import RunConfig
from smkd.engine.step import StepResult
from smkd.errors import ConfigError, SmkdError
from smkd.files import printable

Labels = NDArray[np.int64]


def cluster_agreement(assigned: Labels, labels: Labels) -> dict[str, float]:
    """Agreement of a clustering with the classes.

    Args:
        assigned: prototype with the largest teacher logit, per image.
        labels: class per image.

    Returns:
        nmi: normalised mutual information, 0 to 1; ari: adjusted Rand index, at most 1; fmi: Fowlkes-Mallows
        index, 0 to 1; prototypes: how many different ones were assigned.
    """
    from sklearn import metrics

    return {
        "nmi": float(metrics.normalized_mutual_info_score(labels, assigned)),
        "ari": float(metrics.adjusted_rand_score(labels, assigned)),
        "fmi": float(metrics.fowlkes_mallows_score(labels, assigned)),
        "prototypes": len(np.unique(assigned)),
    }


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
    """Writes metrics.jsonl, TensorBoard and, if asked, W&B; on other processes than the first it does nothing.

    Args:
        out: run folder.
        config: resolved configuration.
        device: for env.json.
        step: where the run starts; records of later steps, left by an interrupted epoch, are dropped.
        active: whether this process writes.
    """

    def __init__(self, out: Path, config: RunConfig, device: torch.device, *, step: int, active: bool) -> None:
        self.active = active
        self.progress: Progress | None = None
        if not active:
            return
        self.wandb = _start_wandb(out, config) if config.wandb else None
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(loading.dump(config), encoding="utf-8")
        with (out / "command.txt").open("a", encoding="utf-8") as file:
            file.write(shlex.join(sys.argv) + "\n")
        (out / "env.json").write_text(json.dumps(environment(device), indent=2) + "\n", encoding="utf-8")
        _drop_records_after(out / "metrics.jsonl", step)
        self.metrics = (out / "metrics.jsonl").open("a", encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter

        self.tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One object of metrics.jsonl: its kind ('train', 'epoch', 'validation'), the step, and the values."""
        if not self.active:
            return
        self.metrics.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **values}) + "\n")
        self.metrics.flush()
        numbers = {f"{kind}/{k}": float(v) for k, v in values.items() if isinstance(v, int | float)}
        for name, value in numbers.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def say(self, text: str) -> None:
        """A line on the console."""
        if self.active:
            (self.progress.console if self.progress else console).print(text)

    @contextmanager
    def bar(self, title: str, total: int, done: int) -> Iterator[Bar]:
        """Progress bar over steps where a terminal is there; elsewhere nothing."""
        if not self.active or not console.is_terminal:
            yield Bar(None)
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console) as progress:
            self.progress = progress
            progress.add_task(title, total=total, completed=done, note="")
            yield Bar(progress)
        self.progress = None

    def close(self) -> None:
        """Flush and close every sink."""
        if not self.active:
            return
        self.metrics.close()
        self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _start_wandb(out: Path, config: RunConfig) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("wandb=true needs the extra: pip install 'smkd[wandb]'") from error
    return wandb.init(project=config.wandb_project, name=out.name, config=config.model_dump(mode="json"))


def _drop_records_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        with suppress(ValueError):  # a line cut short by a crash
            if json.loads(line)["step"] <= step:
                kept.append(line)
    path.write_text("".join(kept), encoding="utf-8")


class Bar:
    """A progress bar, or nothing."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress

    def advance(self, note: str) -> None:
        """One step further."""
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], advance=1, note=note)


class Meter:
    """Running means of one epoch over all devices; reads the device only when a log line is due.

    Args:
        log: where the lines go.
        config: of the run.
        epoch: counted from 0.
        steps: of the epoch.
        out: the run folder, for the message about a loss that is not finite.
    """

    def __init__(self, log: RunLog, config: RunConfig, epoch: int, steps: int, out: Path) -> None:
        self.log, self.config, self.epoch, self.steps, self.out = log, config, epoch, steps, out
        self.note = ""
        self.skipped = 0
        self.assigned: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.epoch_loss: list[float] = []
        self._restart()

    def _restart(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.empty: dict[str, int] = {}
        self.count = 0
        self.since = time.perf_counter()

    def record(self, step: int, result: StepResult, lr: float) -> None:
        """Add one step; write a line if it is time."""
        for name, value in result.losses.items():
            self.sums[name] = self.sums.get(name, 0) + value
        for name, count in result.empty.items():
            self.empty[name] = self.empty.get(name, 0) + count
        self.assigned.append(result.assigned)
        self.labels.append(result.labels)
        self.count += 1
        done = step + 1
        if done % self.config.log_every == 0 or done % self.steps == 0:
            self._flush(done, lr)

    def _flush(self, step: int, lr: float) -> None:
        total = torch.stack(list(self.sums.values()))  # [losses]
        means = dict(zip(self.sums, (distributed.mean(total) / self.count).tolist(), strict=True))
        broken = [name for name, value in means.items() if not math.isfinite(value)]
        if broken:
            raise SmkdError(
                f"the loss is no longer finite ({', '.join(broken)}) near step {step}; the last checkpoint in "
                f"'{self.out}' is unharmed; try precision=fp32, a lower optim.lr, or head.fixed_norm=true"
            )
        speed = self.count * self.config.batch_size / (time.perf_counter() - self.since)
        # a term that some device found empty may be missing in the counts of this one
        counts = {name: distributed.sum_int(self.empty.get(name, 0), total.device) for name in self.sums}
        empty = {f"empty_{name}": count for name, count in counts.items() if count}
        self.log.write("train", step, {**means, "lr": lr, "images_per_second": round(speed, 1), **empty})
        self.note = f"epoch {self.epoch + 1} loss {means['loss']:.3f} {speed:.0f} images/s"
        self.epoch_loss.append(means["loss"])
        self._restart()

    def close(self, seconds: float) -> dict[str, float]:
        """Numbers of the whole epoch, over all devices.

        Args:
            seconds: how long it took.
        """
        assigned = distributed.gather(torch.cat(self.assigned), dim=0).cpu().numpy()
        labels = distributed.gather(torch.cat(self.labels), dim=0).numpy()
        # with one class for all there is nothing to agree with
        agreement = cluster_agreement(assigned, labels) if labels.min() < labels.max() else {}
        scores = {
            "loss": float(np.mean(self.epoch_loss)),
            **agreement,
            "images_per_second": round(self.steps * self.config.batch_size / seconds, 1),
            "seconds": round(seconds, 2),
        }
        skipped = distributed.sum_int(self.skipped, self.assigned[0].device)
        if skipped:
            scores["skipped_images"] = skipped
            self.log.say(f"epoch {self.epoch + 1}: {skipped} unreadable images were replaced")
        nmi = f"nmi {agreement['nmi']:.3f}, " if agreement else ""
        self.log.say(
            f"epoch {self.epoch + 1}/{self.config.epochs}: loss {scores['loss']:.4f}, {nmi}"
            f"{scores['images_per_second']:.0f} images/s"
        )
        return scores
