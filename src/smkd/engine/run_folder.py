"""The folder of a run: who may write there, what is resumed, and which checkpoints are kept.

runs/<name>/config.yaml, command.txt, env.json, metrics.jsonl, tensorboard/, checkpoints/
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smkd import distributed
from smkd.config import loading
from smkd.config.run_config import RunConfig
from smkd.engine import checkpoint
from smkd.errors import ConfigError


@dataclass
class Selection:
    """Accuracies of one validation after another.

    Attributes:
        patience: validations without a gain after which the run ends; 0 for never.
        best: highest accuracy so far; of equal ones the first counts.
        stale: validations since.
    """

    patience: int = 0
    best: float = -math.inf
    stale: int = 0

    def take(self, accuracy: float | None) -> bool:
        """Note a validation, or that there was none; whether it is the best so far."""
        if accuracy is None:
            return False
        if accuracy > self.best:
            self.best, self.stale = accuracy, 0
            return True
        self.stale += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return 0 < self.patience <= self.stale


def run_path(config: RunConfig) -> Path:
    """Where a run lives."""
    return config.out or Path("runs") / (config.recipe or config.phase)


def resumable(config: RunConfig, out: Path) -> Path | None:
    """Checkpoint to go on from; None for a new run.

    Raises:
        ConfigError: the folder holds another run, or this one where `resume` is off.
    """
    settings, last = out / "config.yaml", out / "checkpoints" / "last.pt"
    there = settings.exists()
    distributed.barrier()  # all processes look before the first one writes
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file, not a folder")
    if config.overwrite or not there:
        return None
    changes = loading.differences(loading.load_config(settings), config)
    if changes:
        raise ConfigError(
            f"'{out}' holds a run with another configuration ({'; '.join(changes[:3])}"
            f"{'; ...' if len(changes) > 3 else ''}); choose another out=, or overwrite=true"
        )
    if not config.resume:
        raise ConfigError(f"'{out}' already holds this run and resume=false; choose another out=, or overwrite=true")
    return last if last.is_file() else None


def remove(out: Path) -> None:
    """Clear a run's folder, now that everything the new run needs has been read; no other folder is touched."""
    distributed.barrier()
    if distributed.is_main() and (out / "config.yaml").exists():
        shutil.rmtree(out)
    distributed.barrier()


def keep_checkpoint(state: dict[str, Any], folder: Path, config: RunConfig, *, is_best: bool) -> None:
    """Keep a state as the last one and, where asked for, under other names."""
    last = folder / "last.pt"
    checkpoint.save_checkpoint(state, last)
    if is_best:
        checkpoint.link(last, "best.pt")
    if config.save_every and state["epoch"] % config.save_every == 0:
        checkpoint.link(last, f"step-{state['step']:08d}.pt")
