"""What a run would be: data, settings and weights are checked, three steps are timed, and nothing is written."""

from __future__ import annotations

from typing import Any

from smkd.config import loading
from smkd.config.run_config import RunConfig
from smkd.data.sources import opened_once
from smkd.device import pick_device
from smkd.engine import run_folder
from smkd.engine.bench import Bench, measure_steps
from smkd.engine.evaluator import Evaluator
from smkd.engine.launch import check_folder
from smkd.engine.train import Run

ALONE = {"devices": 1, "num_nodes": 1, "shard": "none"}
"""Settings of a run on one device."""
STEPS = 3
MOST_ON_CPU = 8
"""Images of a timed step on a CPU, where more are hardly faster."""


@opened_once()
def dry_run(config: RunConfig, evaluator: Evaluator) -> list[str]:
    """Lines on a run: its length, where it starts, and its time and memory by three timed steps on one device here.

    Args:
        config: of the run; several devices are taken to be as fast as one each.
        evaluator: its validation is checked, too.

    Raises:
        SmkdError: what would stop the run at its start.
    """
    check_folder(config)
    line, left = _length(config, evaluator)
    device, processes = pick_device(config.accelerator), config.devices * config.num_nodes
    found = measure_steps(loading.changed(config, {**ALONE, **_one_pass(config, device.type)}), STEPS)
    hours = left * config.batch_size / (processes * found.images_per_second) / 3600
    return [
        line,
        f"{_short(found.gflop_per_image)} GFLOP an image, "
        f"{_short(left * config.batch_size * found.gflop_per_image / 1e6)} PFLOP in all",
        _timed(found, processes),
        f"{left:,} steps take about {f'{60 * hours:.1f} minutes' if hours < 1 else f'{hours:,.1f} hours'}, without "
        "validation; nothing was written",
    ]


def _length(config: RunConfig, evaluator: Evaluator) -> tuple[str, int]:
    """A line on what the run is, and the steps that are left; its networks are gone before others are measured."""
    alone = loading.changed(config, {**ALONE, "accumulate": config.passes})
    run = Run(alone, evaluator, pick_device(config.accelerator), run_folder.run_path(config))
    steps = run.sampler.steps
    start = "random weights" if config.starts_random else config.init
    if run.resumed is not None:
        start = f"{run.resumed.path}, step {run.step}"
    line = (
        f"{len(run.images):,} images of {len(run.images.class_names)} classes; {steps:,} steps of {config.batch_size} "
        f"images an epoch, {config.epochs:,} epochs; from {start}"
    )
    return line, config.epochs * steps - run.step


def _one_pass(config: RunConfig, kind: str) -> dict[str, Any]:
    """Settings of one pass of one device; on a CPU of few images."""
    size = config.batch_size // config.passes
    if kind == "cpu":
        size = min(size, MOST_ON_CPU)
    found: dict[str, Any] = {"batch_size": size, "accumulate": 1}
    if (sampler := config.data.sampler) is not None:
        of_class = min(sampler.per_class, size)
        found |= {"batch_size": size - size % of_class,
                  "data": {"sampler": {"classes": size // of_class, "per_class": of_class}}}  # fmt: skip
    return found


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _timed(found: Bench, processes: int) -> str:
    more = f" on each of {processes} devices" if processes > 1 else ""
    return (
        f"{found.images_per_second:,.1f} images/s{more} by {STEPS} steps of {found.batch_size} images, {found.data}; "
        f"{found.peak_memory_gb:.1f} GB ({found.device}, {found.precision})"
    )
