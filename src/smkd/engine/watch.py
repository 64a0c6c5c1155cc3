"""`smkd watch`: what a run that goes on says of itself, read from its folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from smkd.config import foreign_text
from smkd.config.run_config import RunConfig
from smkd.engine.evaluator import INTERVAL, scores_in_words
from smkd.engine.runs import MARKS, config_of, run_summary

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 40
SECONDS = 2.0
"""Between two looks."""
SHOWN = 5
"""Validations."""


def state_of(run: Path) -> list[str]:
    """Lines: state, progress, speed and time left; curves of the losses; the last validations.

    Raises:
        ConfigError: the folder is no run, or its config.yaml cannot be read.
    """
    config = config_of(run)
    summary = run_summary(run)
    path = run / MARKS[1]
    found = foreign_text.json_records(path) if path.is_file() else []
    records = [record for _, record in found if record is not None]
    train, scores, epochs = ([r for r in records if r.get("kind") == k] for k in ("train", "validation", "epoch"))
    lines = [
        f"{run}: {summary.recipe} on {summary.data}, {summary.state}",
        f"epoch {summary.epoch} of {summary.epochs}{_speed(config, train, epochs, summary.state)}",
    ]
    for term in ("loss", "cls", "mim", "patch", "supervised"):
        values = [float(record[term]) for record in train if isinstance(record.get(term), int | float)]
        if values:
            lines.append(f"{term:11}{spark(values):{WIDTH}} {values[-1]:.4g}")
    accuracies = [float(r["accuracy"]) for r in scores if isinstance(r.get("accuracy"), int | float)]
    if accuracies:
        lines.append(f"{'accuracy':11}{spark(accuracies):{WIDTH}} {accuracies[-1]:.2f}, best {max(accuracies):.2f}")
    for record in scores[-SHOWN:]:
        shown = {key: value for key, value in record.items() if key.endswith(("accuracy", "-shot", INTERVAL))}
        lines.append(f"  epoch {record.get('epoch')}: {scores_in_words(shown)}")
    return lines


def _speed(config: RunConfig, train: Sequence[Any], epochs: Sequence[Any], state: str) -> str:
    """Images a second and, of a run that goes on, the time left; empty before the first line of the log."""
    speed = train[-1].get("images_per_second") if train else None
    if not isinstance(speed, int | float) or not speed:
        return ""
    said = f", step {train[-1]['step']}, {speed:.0f} images/s"
    if not state.startswith("running"):
        return said
    if not epochs:
        return f"{said}; time left is known after the first epoch"
    steps = epochs[-1]["step"] / epochs[-1]["epoch"] * config.epochs - train[-1]["step"]
    left = timedelta(seconds=round(steps * config.batch_size / speed))
    return f"{said}, {left} left without validations"


def spark(values: Sequence[float]) -> str:
    """A curve in one line: means of at most 40 parts, the lowest as ▁ and the highest as █."""
    count = min(WIDTH, len(values))
    bounds = [len(values) * place // count for place in range(count + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in pairwise(bounds)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int((mean - low) / span * len(BLOCKS)))] for mean in means)


def follow(run: Path) -> None:
    """Show the state until the run ends, or Ctrl-C."""
    from rich.live import Live
    from rich.text import Text

    with Live(Text("\n".join(state_of(run))), auto_refresh=False) as live:
        while run_summary(run).state.startswith("running"):
            time.sleep(SECONDS)
            live.update(Text("\n".join(state_of(run))), refresh=True)
