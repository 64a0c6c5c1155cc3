"""A training run: from a resolved configuration to a folder with checkpoints and metrics.

runs/<name>/config.yaml, command.txt, env.json, metrics.jsonl, tensorboard/, checkpoints/
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.progress import track

from smkd import __version__, distributed
from smkd.config import loading
from smkd.config.schema import RunConfig
from smkd.data.cache import CachedImages, cached
from smkd.data.datasets import DatasetSpec, Images, configured_spec, describe, open_split
from smkd.data.device_loader import training_loader
from smkd.data.loader import Batch, Views, batches, make_views
from smkd.data.prefetch import on_device
from smkd.data.sampler import EpochSampler
from smkd.engine import checkpoint
from smkd.engine.compiling import compile_backbones
from smkd.engine.device import autocast_type, keep_freed_memory, pick_device
from smkd.engine.meter import Meter
from smkd.engine.restore import open_checkpoint, restore
from smkd.engine.runlog import RunLog, console
from smkd.engine.schedules import rates_at
from smkd.engine.selection import Selection
from smkd.engine.step import Learner
from smkd.errors import ConfigError
from smkd.interop.load import MARK
from smkd.models.vit import VisionTransformer


class Evaluator(Protocol):
    """Measures a backbone on validation classes."""

    def check(self, config: RunConfig) -> None:
        """Fail early if the validation that the configuration asks for cannot be done."""

    def measure(self, backbone: VisionTransformer, config: RunConfig, device: torch.device) -> dict[str, float]:
        """Names and numbers; the first one selects the best checkpoint."""


def run_folder(config: RunConfig) -> Path:
    """Where a run lives."""
    return config.out or Path("runs") / (config.recipe or config.phase)


def train(config: RunConfig, evaluator: Evaluator | None = None) -> Path:
    """Train in this process (one of several under torchrun), or go on with an interrupted run.

    Args:
        config: resolved configuration.
        evaluator: measures the teacher on validation classes; none keeps no `best` checkpoint.

    Returns:
        The run folder.

    Raises:
        ConfigError, DataError, CheckpointError: see the message.
    """
    device = pick_device(config.accelerator)
    distributed.initialise(device)
    try:
        return _train(config, evaluator, device)
    finally:
        distributed.shutdown()


def _train(config: RunConfig, evaluator: Evaluator | None, device: torch.device) -> Path:
    if distributed.world_size() != config.devices * config.num_nodes:
        raise ConfigError(
            f"devices={config.devices} x num_nodes={config.num_nodes} does not match the "
            f"{distributed.world_size()} processes that were started"
        )
    autocast = autocast_type(config.precision, device)
    if device.type == "cpu":
        keep_freed_memory()
    images = open_split(config.data, "train")
    spec = configured_spec(config.data)
    sampler = EpochSampler(
        images.labels, config.batch_size, config.seed, balanced=config.data.sampler, accumulate=config.accumulate,
        rank=distributed.rank(), world=distributed.world_size(),
    )  # fmt: skip
    if evaluator is not None and config.validation.every:
        evaluator.check(config)
    learner = Learner.create(config, len(images.class_names), device, autocast)
    out = run_folder(config)

    # Where the weights come from, in this order: this run's last checkpoint, `init`, random.
    resumed = _resumable(config, out)
    notes: list[str] = []
    first_epoch, selection = 0, Selection(config.validation.patience)
    if resumed is not None:
        state = checkpoint.load(resumed)
        restore(learner, state, optimizer=True)
        first_epoch = int(state["epoch"])
        selection = Selection(config.validation.patience, float(state["best"]), int(state.get("stale", 0)))
    elif config.init is not None:
        state, _ = open_checkpoint(config.init, config)
        notes = [*state.get(MARK, []), *restore(learner, state, optimizer=config.init_optimizer)]
    if first_epoch >= config.epochs or selection.exhausted:
        if distributed.is_main():
            console.print(f"{out}: already complete ({first_epoch} epochs)", markup=False)
        return out
    images = cached(images, config.data, "train", _progress)
    if config.overwrite:
        _remove_run(out)

    log = RunLog(out, config, device, step=first_epoch * sampler.steps, active=distributed.is_main())
    try:
        log.say(describe(config.data))
        for line in notes:
            log.say(line)
        if isinstance(images, CachedImages):
            log.say(images.description)
        log.say(_headline(config, learner, images, sampler, first_epoch, resumed))
        compile_backbones(learner.pair, config.compile, device, log.say)
        loader = training_loader(images, config, sampler, device)
        steps = sampler.steps

        def close_epoch(done: int, scores: dict[str, float]) -> None:
            is_best = selection.take(_validate(config, evaluator, learner, device, log, done, done * steps))
            if scores:
                log.write("epoch", done * steps, {"epoch": done, **scores})
            if distributed.is_main():
                state = {
                    **learner.state(), "epoch": done, "step": done * steps, "best": selection.best,
                    "stale": selection.stale, "config": config.model_dump(mode="json"),
                    "classes": images.class_names, "version": __version__,
                }  # fmt: skip
                _save(state, out / "checkpoints", config, done, is_best=is_best)
            distributed.barrier()

        if selection.patience and resumed is None:
            close_epoch(0, {})
        with log.bar(config.phase, config.epochs * steps, first_epoch * steps) as bar:
            for epoch in range(first_epoch, config.epochs):
                sampler.set_epoch(epoch)
                started = time.perf_counter()
                meter = Meter(log, config, epoch, steps, out)
                passes = _views(on_device(batches(loader), device), spec, device, config.accumulate, meter)
                for step, views in enumerate(passes, start=epoch * steps):
                    rates = rates_at(config, step, steps)
                    _seed_device(config.seed, step)
                    meter.record(step, learner.step(views, rates), rates.lr)
                    bar.advance(meter.note)
                close_epoch(epoch + 1, meter.close(time.perf_counter() - started))
                # the first process alone knows the accuracies
                if distributed.sum_int(int(distributed.is_main() and selection.exhausted), device):
                    log.say(f"stopped: {selection.stale} validations without a gain")
                    break
    finally:
        log.close()
    return out


def _resumable(config: RunConfig, out: Path) -> Path | None:
    """Checkpoint to go on from; None for a new run. Refuses a folder that holds another run."""
    settings, last = out / "config.yaml", out / "checkpoints" / "last.pt"
    there = settings.exists()
    distributed.barrier()  # all processes look before the first one writes
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file, not a folder")
    if config.overwrite or not there:
        return None
    changes = loading.differences(loading.load(settings), config)
    if changes:
        raise ConfigError(
            f"'{out}' holds a run with another configuration ({'; '.join(changes[:3])}"
            f"{'; ...' if len(changes) > 3 else ''}); choose another out=, or overwrite=true"
        )
    if not config.resume:
        raise ConfigError(f"'{out}' already holds this run and resume=false; choose another out=, or overwrite=true")
    return last if last.is_file() else None


def _remove_run(out: Path) -> None:
    """Clear a run's folder, now that everything the new run needs has been read; no other folder is touched."""
    distributed.barrier()
    if distributed.is_main() and (out / "config.yaml").exists():
        shutil.rmtree(out)
    distributed.barrier()


def _progress(chunks: Iterable[Any], title: str, total: int) -> Iterable[Any]:
    """A bar on the console while the cache is made; whichever process makes it."""
    return track(chunks, title, total, console=console, disable=not console.is_terminal, transient=True)


def _views(
    loaded: Iterator[Any], spec: DatasetSpec, device: torch.device, accumulate: int, meter: Meter
) -> Iterator[Iterator[Views]]:
    """The passes of one step after another."""

    def passes(first: Batch) -> Iterator[Views]:
        batch: Batch = first
        for turn in range(accumulate):
            batch = first if turn == 0 else next(loaded)
            meter.skipped += batch.skipped
            yield make_views(batch, spec, device)

    for first in loaded:
        yield passes(first)


def _validate(
    config: RunConfig, evaluator: Evaluator | None, learner: Learner, device: torch.device, log: RunLog,
    epoch: int, step: int,
) -> float | None:  # fmt: skip
    """Accuracy that selects the best checkpoint, when it is time to measure it."""
    every = config.validation.every
    if evaluator is None or every == 0 or (epoch % every and epoch != config.epochs):
        return None
    accuracy = None
    if distributed.is_main():
        learner.pair.teacher.eval()
        measured = evaluator.measure(learner.pair.teacher.backbone, config, device)
        learner.pair.teacher.train()
        log.write("validation", step, {"epoch": epoch, **measured})
        log.say(f"epoch {epoch}: validation " + ", ".join(f"{k} {v:.2f}" for k, v in measured.items()))
        accuracy = next(iter(measured.values()))
    distributed.barrier()
    return accuracy


def _save(state: dict[str, Any], folder: Path, config: RunConfig, epoch: int, *, is_best: bool) -> None:
    last = folder / "last.pt"
    checkpoint.save(state, last)
    if is_best:
        checkpoint.link(last, "best.pt")
    if config.save_every and epoch % config.save_every == 0:
        checkpoint.link(last, f"step-{state['step']:08d}.pt")


def _seed_device(seed: int, step: int) -> None:
    """Whatever draws on the device (stochastic depth) depends on seed, step and rank alone."""
    words = np.random.SeedSequence([seed, step, distributed.rank()]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0] >> np.uint64(1)))


def _headline(
    config: RunConfig,
    learner: Learner,
    images: Images,
    sampler: EpochSampler,
    epoch: int,
    resumed: Path | None,
) -> str:
    backbone = learner.pair.student.backbone
    millions = sum(p.numel() for p in backbone.parameters()) / 1e6
    precision = "float32" if learner.autocast is None else str(learner.autocast).removeprefix("torch.")
    start = f"resumed at epoch {epoch} from {resumed}" if resumed else f"from {config.init or 'random weights'}"
    return (
        f"{config.recipe or config.phase}: {len(images)} images of {len(images.class_names)} classes, "
        f"{sampler.steps} steps an epoch, {config.epochs} epochs; ViT of {millions:.1f} M parameters, "
        f"{learner.device.type} {precision} x {distributed.world_size()}; {start}"
    )
