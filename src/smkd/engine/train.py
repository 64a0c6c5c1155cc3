"""A training run: from a resolved configuration to a folder with checkpoints and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from smkd import __version__, distributed
from smkd.config.checks import check_durations
from smkd.config.run_config import RunConfig
from smkd.data import inspect
from smkd.data.cache import CachedImages, cached
from smkd.data.datasets import configured_spec, describe, open_split
from smkd.data.images import Images, UnlabelledImages
from smkd.data.loader import Batch, batches, make_views, on_device, training_loader
from smkd.data.sampler import EpochSampler
from smkd.data.sources import opened_once
from smkd.device import autocast_type, keep_freed_memory, pick_device
from smkd.engine import agreement, checkpoint, run_folder, shard
from smkd.engine.collapse import CollapseWatch
from smkd.engine.evaluator import Evaluator, measure_together, scores_in_words
from smkd.engine.guard import Guard
from smkd.engine.log import Bar, RunLog, console
from smkd.engine.meter import Meter
from smkd.engine.optim import compile_backbones, rates_at, set_rates
from smkd.engine.restore import open_checkpoint, restore
from smkd.engine.run_folder import Selection
from smkd.engine.step import Learner
from smkd.engine.stopping import SAVE, Interrupted, Watch, stopped
from smkd.engine.writer import Writer
from smkd.errors import ConfigError, DataError, SmkdError, Stopped
from smkd.files import millions
from smkd.weights.load import MARK

ADVICE = "try resume_with=precision=fp32, a lower resume_with=optim.lr=..., or resume_with=head.fixed_norm=true"

HALVINGS = 16
"""So many steps in a row may halve the scale of float16's losses from its start, 2^16, to 1."""


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
    out = run_folder.run_path(config)
    with run_folder.only_writer(out):
        agreement.check_shared(out)
        run = Run(config, evaluator, device, out)
        if not run.complete:
            run.train()
        elif distributed.is_main():
            console.print(f"{out}: already complete ({run.epoch} epochs)")
    return out


class Run:
    """A training run and its state.

    The constructor reads everything that training needs and writes nothing. It raises as `train` does.

    Attributes:
        out: its folder.
        epoch: how many whole epochs are done.
        done: steps that are done of the epoch after those.
        logged: up to which step the records of an interrupted run count.
        selection: the best validation so far.
    """

    def __init__(self, config: RunConfig, evaluator: Evaluator | None, device: torch.device, out: Path) -> None:
        if distributed.world_size() != config.devices * config.num_nodes:
            raise ConfigError(
                f"devices={config.devices} x num_nodes={config.num_nodes} does not match the "
                f"{distributed.world_size()} processes that were started"
            )
        standing = run_folder.resumable(config, out)
        agreement.check_start(standing.found)
        self.typed, self.resumed, self.changes = standing.typed, standing.found, standing.changes
        config = standing.config
        self.notes = [
            *(f"changed: {change}" for change in standing.changes),
            *(f"as this run began: {change}" for change in standing.kept),
        ]
        check_durations(config)
        self.config, self.evaluator, self.device, self.out = config, evaluator, device, out
        autocast = autocast_type(config.precision, device)
        if device.type == "cpu":
            keep_freed_memory()
        self.images = open_split(config.data, "train", labelled=config.needs_labels)
        self.data = inspect.record_of(self.images) if distributed.is_main() else None
        self.spec = configured_spec(config.data)
        self.sampler = EpochSampler(
            self.images.labels, config.batch_size, config.seed, balanced=config.data.sampler,
            accumulate=config.accumulate, rank=distributed.rank(), world=distributed.world_size(),
        )  # fmt: skip
        self.validated = self._is_validated()
        if evaluator is not None and self.validated:
            evaluator.check(config)
        self.learner = Learner.create(config, len(self.images.class_names), device, autocast)
        self.epoch = self.done = self.logged = 0
        self.selection = Selection(config.validation.patience)
        halvings = HALVINGS if self.learner.scaler.is_enabled() else 0
        self.guard = Guard(
            config.guard.max_skips + halvings, _images_of(self.images.labels, config, self.sampler.steps)
        )
        self.watch = Watch(config.save_minutes, config.max_hours)
        self.collapse = CollapseWatch(config)
        self.writer = Writer()
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
        """Load the first of: this run's last checkpoint, `init`, random weights (phase 2: only with `init=random`)."""
        if self.resumed is not None:
            state = self.resumed.state
            self._compare_data(state)
            restore(self.learner, state, optimizer=True)
            self.epoch, self.done = int(state["epoch"]), int(state.get("step_in_epoch", 0))
            self.logged = int(state["step"])
            if guards := state.get("guards"):
                self.guard.resume(guards[distributed.rank() % len(guards)], self.device)
            self.collapse.rows = dict(state.get("collapse", {}))
            if self.logged != self.step:  # an epoch has another length now, so this one begins anew
                self.logged -= self.done
                self.done = 0
                self.guard.pending.clear()
            if self.step:  # as the step before left them, for a save without another step
                set_rates(self.learner.optimizer, rates_at(self.config, self.step - 1, self.sampler.steps))
            self.selection.best, self.selection.stale = float(state["best"]), int(state.get("stale", 0))
            self.selection.step = int(state.get("best_step", -1))
        elif self.config.init is None and self.config.phase == "distill":
            raise ConfigError(
                "phase 2 starts from trained weights: init=<run of phase 1, or weights of another project>; "
                "init=random if random ones are meant, from which its terms learn nothing"
            )
        elif self.config.starts_random:
            if (given := self.config.model.train_blocks) != "all":
                raise ConfigError(f"model.train_blocks={given} would leave random weights as they are; give init=<run>")
        else:
            assert self.config.init is not None
            state, _ = open_checkpoint(self.config.init, self.config)
            changes = restore(self.learner, state, optimizer=self.config.init_optimizer)
            self.notes += [*state.get(MARK, []), *changes]

    def _compare_data(self, state: dict[str, Any]) -> None:
        """Notice that the training images are not those of before.

        Raises:
            DataError: they are not, and `data.changed` does not accept it, or the supervised term has other classes.
        """
        if self.data is None:  # the first process compares
            return
        if "data" in state:
            changes = inspect.record_differences(state["data"], self.data)
        else:  # a checkpoint of an older version knows its classes
            changes = [] if state["classes"] == self.images.class_names else ["the classes are others"]
        if not changes:
            return
        what = f"the training images have changed since this run began: {'; '.join(changes)}"
        if self.config.data.changed == "refuse":
            raise DataError(f"{what}; data.changed=accept goes on with them")
        if self.config.objective.supervised.weight > 0 and len(state["classes"]) != len(self.images.class_names):
            raise DataError(f"{what}; the classifier of objective.supervised has other classes: start a run with init=")
        self.changes.append(f"data: {'; '.join(changes)}")
        self.notes.append(what)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.epoch >= self.config.epochs or self.selection.exhausted

    def train(self) -> None:
        """All epochs that are left."""
        config, steps = self.config, self.sampler.steps
        images = cached(self.images, config.data, "train", _progress)
        if config.overwrite and self.resumed is None:
            run_folder.remove(self.out)
        main = distributed.is_main()
        if main:
            self.notes += run_folder.tidy(self.out, self.resumed, self.selection)
        log = RunLog(
            self.out, self.typed, self.device, step=self.logged, epoch=self.epoch, changes=self.changes, active=main
        )
        with self.watch, log, self.writer:
            self._introduce(images, log)
            compile_backbones(self.learner.pair, config.compile, self.device, log.say)
            loader = training_loader(images, config, self.sampler, self.device)
            if config.validation.patience and self.resumed is None:
                self._close_epoch(None, log)
            with log.bar(config.phase, config.epochs * steps, self.step) as bar:
                while self.epoch < config.epochs:
                    meter = self._train_epoch(loader, log, bar)
                    self._close_epoch(meter, log)
                    # the first process alone knows the accuracies
                    if distributed.largest(int(main and self.selection.exhausted)):
                        log.say(f"stopped: {self.selection.stale} validations without a gain")
                        break
                    if self.epoch < config.epochs and (asked := self.watch.asked()) > SAVE:
                        raise self._stopped(asked)
            self._settle()

    @property
    def step(self) -> int:
        """Optimiser steps that are done."""
        return self.epoch * self.sampler.steps + self.done

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
        size, autocast = millions(sum(p.numel() for p in backbone.parameters())), self.learner.autocast
        precision = "float32" if autocast is None else str(autocast).removeprefix("torch.")
        start = f"from {'random weights' if config.starts_random else config.init}"
        if self.resumed is not None:
            within = f", step {self.done}" if self.done else ""
            start = f"resumed at epoch {self.epoch}{within} from {self.resumed.path}"
        log.say(
            f"{config.recipe or config.phase}: {len(images)} images {classes}, "
            f"{self.sampler.steps} steps an epoch, {config.epochs} epochs; ViT of {size} parameters, "
            f"{self.device.type} {precision} x {distributed.world_size()}; {start}"
        )

    def _train_epoch(self, loader: Iterable[Any], log: RunLog, bar: Bar) -> Meter:
        """What is left of an epoch; its numbers."""
        steps = self.sampler.steps
        meter = Meter(log, self.config, self.epoch, steps, self.guard, self.collapse)
        if self.done and self.resumed is not None:
            meter.resume(self.resumed.state["meters"], self.device)
        self.resumed = None  # the memory is needed no longer
        self.sampler.set_epoch(self.epoch, start=self.done)
        loaded = on_device(batches(loader), self.device)
        for passes in _in_groups(loaded, self.config.accumulate):
            meter.skipped += sum(batch.skipped for batch in passes)
            rates = rates_at(self.config, self.step, steps)
            _seed_device(self.config.seed, self.step)
            views = (make_views(batch, self.spec, self.device) for batch in passes)
            meter.record(self.step, self.learner.step(views, rates, passes), rates.lr)
            self.done += 1
            bar.advance(meter.note)
            self.writer.check()
            if self.guard.exhausted:
                self._save(meter)
                self._settle()
                raise SmkdError(
                    f"{self.guard.max_skips} steps in a row had no finite loss or gradient and were skipped, up to "
                    f"step {self.step}, which is saved (the images: 'skipped' in '{self.out / 'metrics.jsonl'}'); "
                    f"{ADVICE}"
                )
            if asked := self.watch.asked():
                self._save(meter)
                if asked > SAVE:
                    raise self._stopped(asked)
        return meter

    def _close_epoch(self, meter: Meter | None, log: RunLog) -> None:
        """Validate if it is time, write the numbers, and save; without a meter, of the weights before training."""
        after = self.epoch + (meter is not None)
        scores = {} if meter is None else meter.close()
        try:
            accuracy = self._validate(after, log)
        except Interrupted:
            if meter is not None:
                self._save(meter)
            raise self._stopped(self.watch.asked()) from None
        is_best = self.selection.take(accuracy, self.step)
        if scores:
            log.write("epoch", self.step, {"epoch": after, **scores})
        self.epoch, self.done = after, 0
        self._save(None, is_best=is_best)

    def _save(self, meter: Meter | None, *, is_best: bool = False) -> None:
        """Begin to write a checkpoint, within an epoch if there is a meter."""
        meters = [] if meter is None else distributed.gather_object(meter.state())
        guards = distributed.gather_object(self.guard.state())
        learned = self.learner.state()
        if distributed.is_main():
            if broken := checkpoint.first_not_finite(learned):
                raise SmkdError(
                    f"{broken} is no longer finite at step {self.step} and is not saved; the same command goes on from "
                    f"the last checkpoint in '{self.out}'; {ADVICE}"
                )
            state = {
                **learned, "epoch": self.epoch, "step_in_epoch": self.done, "step": self.step,
                "meters": meters, "guards": guards, "collapse": self.collapse.rows,
                "best": self.selection.best, "stale": self.selection.stale,
                "best_step": self.selection.step, "config": self.config.model_dump(mode="json"),
                "classes": self.images.class_names, "data": self.data,
                "version": __version__,
            }  # fmt: skip
            keep = partial(
                run_folder.keep_checkpoint, folder=self.out / "checkpoints", config=self.config, is_best=is_best
            )
            self.writer.write(state, keep)
        self.watch.saved()

    def _settle(self) -> None:
        """Wait, in all processes, until the last checkpoint is written."""
        self.writer.wait()
        distributed.barrier()

    def _stopped(self, code: int) -> Stopped:
        self._settle()
        return stopped(code, f"step {self.step} of {self.config.epochs * self.sampler.steps}")

    def _validate(self, epoch: int, log: RunLog) -> float | None:
        """Accuracy that selects the best checkpoint, when it is time to measure it.

        Raises:
            Interrupted: on all processes, if a signal cut it short.
        """
        every = self.config.validation.every
        if self.evaluator is None or not self.validated or (epoch % every and epoch != self.config.epochs):
            return None
        teacher = self.learner.pair.teacher.eval()
        backbone = shard.whole_backbone(teacher.backbone, self.device)
        measured = measure_together(self.evaluator, backbone, self.config, self.device, self.watch)
        teacher.train()
        if measured is None:
            return None
        log.write("validation", self.step, {"epoch": epoch, **measured})
        log.say(f"epoch {epoch}: validation {scores_in_words(measured)}")
        if log.active and self.config.validation.pictures:
            log.show(self.evaluator.pictures(backbone, self.config, self.device), self.step)
        return next(iter(measured.values()))


def _in_groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """`size` batches at a time."""
    while group := list(islice(batches, size)):
        yield group


def _progress(chunks: Iterable[Any], title: str, total: int) -> Iterable[Any]:
    """A bar on the console while the cache is made; whichever process makes it."""
    return track(chunks, title, total, console=console, disable=not console.is_terminal, transient=True)


def _images_of(labels: NDArray[np.int64], config: RunConfig, steps: int) -> Callable[[int], list[int]]:
    """From a step to the numbers of its images, over all processes. It holds no run, which would hold it in turn."""

    def numbers(step: int) -> list[int]:
        epoch, within = divmod(step, steps)
        whole = EpochSampler(labels, config.batch_size, config.seed, balanced=config.data.sampler)
        whole.set_epoch(epoch, start=within)
        return [item[1] for item in next(iter(whole))]

    return numbers


def _seed_device(seed: int, step: int) -> None:
    """Whatever draws on the device (stochastic depth) depends on seed, step and rank alone."""
    words = np.random.SeedSequence([seed, step, distributed.rank()]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0] >> np.uint64(1)))
