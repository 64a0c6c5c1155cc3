"""A training run: from a resolved configuration to a folder with checkpoints and metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.progress import track

from smkd import __version__, distributed
from smkd.config.checks import check_durations
from smkd.config.run_config import RunConfig
from smkd.data.cache import CachedImages, cached
from smkd.data.datasets import configured_spec, describe, open_split
from smkd.data.images import Images, UnlabelledImages
from smkd.data.loader import Batch, batches, make_views, on_device, training_loader
from smkd.data.opened import opened_once
from smkd.data.sampler import EpochSampler
from smkd.device import autocast_type, keep_freed_memory, pick_device
from smkd.engine import checkpoint, run_folder
from smkd.engine.log import Bar, Meter, RunLog, console
from smkd.engine.optim import compile_backbones, rates_at
from smkd.engine.restore import open_checkpoint, restore
from smkd.engine.run_folder import Selection
from smkd.engine.step import Learner
from smkd.errors import ConfigError
from smkd.models.vit import VisionTransformer
from smkd.weights.load import MARK


class Evaluator(Protocol):
    """Measures a backbone on validation classes."""

    def check(self, config: RunConfig) -> None:
        """Fail early if the validation that the configuration asks for cannot be done."""

    def measure(self, backbone: VisionTransformer, config: RunConfig, device: torch.device) -> dict[str, float]:
        """Names and numbers; the first one selects the best checkpoint."""


@opened_once()
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
        # a function of its own, so that the networks are gone before the process group: their wrapper for several
        # devices would wait for a thread of the group that waits for it
        return _train(config, evaluator, device)
    finally:
        distributed.shutdown()


def _train(config: RunConfig, evaluator: Evaluator | None, device: torch.device) -> Path:
    run = Run(config, evaluator, device)
    if not run.complete:
        run.train()
    elif distributed.is_main():
        console.print(f"{run.out}: already complete ({run.epoch} epochs)", markup=False)
    return run.out


class Run:
    """What a run works with, and where it stands.

    Making one reads everything that training needs and writes nothing; raises as `train` does.

    Attributes:
        out: its folder.
        epoch: how many epochs are done.
        selection: the best validation so far.
    """

    def __init__(self, config: RunConfig, evaluator: Evaluator | None, device: torch.device) -> None:
        if distributed.world_size() != config.devices * config.num_nodes:
            raise ConfigError(
                f"devices={config.devices} x num_nodes={config.num_nodes} does not match the "
                f"{distributed.world_size()} processes that were started"
            )
        check_durations(config)
        self.config, self.evaluator, self.device = config, evaluator, device
        autocast = autocast_type(config.precision, device)
        if device.type == "cpu":
            keep_freed_memory()
        self.images = open_split(config.data, "train", labelled=config.needs_labels)
        self.spec = configured_spec(config.data)
        self.sampler = EpochSampler(
            self.images.labels, config.batch_size, config.seed, balanced=config.data.sampler,
            accumulate=config.accumulate, rank=distributed.rank(), world=distributed.world_size(),
        )  # fmt: skip
        self.validated = self._is_validated()
        if evaluator is not None and self.validated:
            evaluator.check(config)
        self.learner = Learner.create(config, len(self.images.class_names), device, autocast)
        self.out = run_folder.run_path(config)
        self.epoch, self.selection = 0, Selection(config.validation.patience)
        self._take_weights()

    def _is_validated(self) -> bool:
        """Whether accuracy is measured meanwhile; images without classes need others for that."""
        validation = self.config.validation
        unlabelled = isinstance(self.images, UnlabelledImages) and validation.data is None
        if validation.every and unlabelled and validation.patience:
            raise ConfigError(
                f"validation.patience={validation.patience} needs validation, and '{self.config.data.root}' has no "
                "classes to measure on; give validation.data=<labelled folder>"
            )
        return bool(validation.every) and not unlabelled

    def _take_weights(self) -> None:
        """From, in this order: this run's last checkpoint, `init`, chance; phase 2 leaves nothing to chance unasked."""
        self.resumed, self.notes = run_folder.resumable(self.config, self.out), list[str]()
        if self.resumed is not None:
            state = checkpoint.load_checkpoint(self.resumed)
            restore(self.learner, state, optimizer=True)
            self.epoch = int(state["epoch"])
            self.selection.best, self.selection.stale = float(state["best"]), int(state.get("stale", 0))
        elif self.config.init is None and self.config.phase == "distill":
            raise ConfigError(
                "phase 2 starts from trained weights: init=<run of phase 1, or weights of another project>; "
                "init=random if random ones are meant, from which its terms learn nothing"
            )
        elif self.config.init is not None and not self.config.starts_random:
            state, _ = open_checkpoint(self.config.init, self.config)
            changes = restore(self.learner, state, optimizer=self.config.init_optimizer)
            self.notes = [*state.get(MARK, []), *changes]

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.epoch >= self.config.epochs or self.selection.exhausted

    def train(self) -> None:
        """All epochs that are left."""
        config, steps = self.config, self.sampler.steps
        images = cached(self.images, config.data, "train", _progress)
        if config.overwrite:
            run_folder.remove(self.out)
        main = distributed.is_main()
        with closing(RunLog(self.out, config, self.device, step=self.epoch * steps, active=main)) as log:
            self._introduce(images, log)
            compile_backbones(self.learner.pair, config.compile, self.device, log.say)
            loader = training_loader(images, config, self.sampler, self.device)
            if config.validation.patience and self.resumed is None:
                self._close_epoch({}, log)
            with log.bar(config.phase, config.epochs * steps, self.epoch * steps) as bar:
                while self.epoch < config.epochs:
                    scores = self._train_epoch(loader, log, bar)
                    self.epoch += 1
                    self._close_epoch(scores, log)
                    # the first process alone knows the accuracies
                    if distributed.sum_int(int(main and self.selection.exhausted), self.device):
                        log.say(f"stopped: {self.selection.stale} validations without a gain")
                        break

    def _introduce(self, images: Images, log: RunLog) -> None:
        """What is trained on what, in a few lines."""
        config, backbone = self.config, self.learner.pair.student.backbone
        cache = [images.description] if isinstance(images, CachedImages) else []
        classes = f"of {len(self.images.class_names)} classes"
        validation = []
        if isinstance(self.images, UnlabelledImages):
            classes = "without classes"
            if config.validation.every and not self.validated:
                validation = ["validation is off: no classes; validation.data=<labelled folder> measures on others"]
        for line in (describe(config.data), *validation, *self.notes, *cache):
            log.say(line)
        millions = sum(p.numel() for p in backbone.parameters()) / 1e6
        autocast = self.learner.autocast
        precision = "float32" if autocast is None else str(autocast).removeprefix("torch.")
        start = f"from {'random weights' if config.starts_random else config.init}"
        if self.resumed is not None:
            start = f"resumed at epoch {self.epoch} from {self.resumed}"
        log.say(
            f"{config.recipe or config.phase}: {len(images)} images {classes}, "
            f"{self.sampler.steps} steps an epoch, {config.epochs} epochs; ViT of {millions:.1f} M parameters, "
            f"{self.device.type} {precision} x {distributed.world_size()}; {start}"
        )

    def _train_epoch(self, loader: Iterable[Any], log: RunLog, bar: Bar) -> dict[str, float]:
        """One epoch; its numbers."""
        started = time.perf_counter()
        steps = self.sampler.steps
        self.sampler.set_epoch(self.epoch)
        meter = Meter(log, self.config, self.epoch, steps, self.out)
        loaded = on_device(batches(loader), self.device)
        for step, passes in enumerate(_in_groups(loaded, self.config.accumulate), start=self.epoch * steps):
            meter.skipped += sum(batch.skipped for batch in passes)
            rates = rates_at(self.config, step, steps)
            _seed_device(self.config.seed, step)
            views = (make_views(batch, self.spec, self.device) for batch in passes)
            meter.record(step, self.learner.step(views, rates, passes), rates.lr)
            bar.advance(meter.note)
        return meter.close(time.perf_counter() - started)

    def _close_epoch(self, scores: dict[str, float], log: RunLog) -> None:
        """Validate if it is time, write the numbers, and save."""
        step = self.epoch * self.sampler.steps
        is_best = self.selection.take(self._validate(step, log))
        if scores:
            log.write("epoch", step, {"epoch": self.epoch, **scores})
        if distributed.is_main():
            state = {
                **self.learner.state(), "epoch": self.epoch, "step": step, "best": self.selection.best,
                "stale": self.selection.stale, "config": self.config.model_dump(mode="json"),
                "classes": self.images.class_names, "version": __version__,
            }  # fmt: skip
            run_folder.keep_checkpoint(state, self.out / "checkpoints", self.config, is_best=is_best)
        distributed.barrier()

    def _validate(self, step: int, log: RunLog) -> float | None:
        """Accuracy that selects the best checkpoint, when it is time to measure it."""
        every = self.config.validation.every
        if self.evaluator is None or not self.validated or (self.epoch % every and self.epoch != self.config.epochs):
            return None
        accuracy = None
        if distributed.is_main():
            teacher = self.learner.pair.teacher.eval()
            measured = self.evaluator.measure(teacher.backbone, self.config, self.device)
            teacher.train()
            log.write("validation", step, {"epoch": self.epoch, **measured})
            log.say(f"epoch {self.epoch}: validation " + ", ".join(f"{k} {v:.2f}" for k, v in measured.items()))
            accuracy = next(iter(measured.values()))
        distributed.barrier()
        return accuracy


def _in_groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """`size` batches at a time."""
    while group := list(islice(batches, size)):
        yield group


def _progress(chunks: Iterable[Any], title: str, total: int) -> Iterable[Any]:
    """A bar on the console while the cache is made; whichever process makes it."""
    return track(chunks, title, total, console=console, disable=not console.is_terminal, transient=True)


def _seed_device(seed: int, step: int) -> None:
    """Whatever draws on the device (stochastic depth) depends on seed, step and rank alone."""
    words = np.random.SeedSequence([seed, step, distributed.rank()]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0] >> np.uint64(1)))
