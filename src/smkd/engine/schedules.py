"""Rates of a run as pure functions of the step or epoch, as DINO and the reference define them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from smkd.config.schema import RunConfig, TemperatureConfig


@dataclass(frozen=True)
class Rates:
    """What changes from step to step."""

    lr: float
    weight_decay: float
    teacher_momentum: float
    cls_temperature: float
    patch_temperature: float
    last_layer_frozen: bool


def line(start: float, end: float, points: int, index: int) -> float:
    """Point `index` of `points` evenly spaced ones from start to end, both included."""
    return start if points == 1 else start + (end - start) * index / (points - 1)


def cosine(start: float, end: float, steps: int, step: int, warmup_steps: int = 0) -> float:
    """Linear warm-up from 0 to `start`, then half a cosine towards `end`.

    The warm-up includes both its ends, so the first value is 0 and `start` comes twice; the cosine divides by its
    number of steps, so `end` is approached and not reached.
    """
    if step < warmup_steps:
        return line(0.0, start, warmup_steps, step)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def temperature(config: TemperatureConfig, epoch: int, hold_epochs: int = 0) -> float:
    """Teacher temperature of an epoch: `hold_epochs` at the start value, a linear warm-up, then the end value."""
    if epoch < hold_epochs:
        return config.start
    epoch -= hold_epochs
    return line(config.start, config.end, config.warmup_epochs, epoch) if epoch < config.warmup_epochs else config.end


def rates_at(config: RunConfig, step: int, steps_per_epoch: int) -> Rates:
    """All rates of an optimiser step, counted from 0 over the whole run."""
    optim, objective = config.optim, config.objective
    epoch, steps = step // steps_per_epoch, config.epochs * steps_per_epoch
    return Rates(
        lr=cosine(optim.lr, optim.lr_end, steps, step, optim.warmup_epochs * steps_per_epoch),
        weight_decay=cosine(optim.weight_decay, optim.weight_decay_end, steps, step),
        teacher_momentum=cosine(optim.teacher_momentum, optim.teacher_momentum_end, steps, step),
        cls_temperature=temperature(objective.cls_temperature, epoch),
        patch_temperature=temperature(objective.patch_temperature, epoch, config.mask.start_epoch),
        last_layer_frozen=epoch < optim.freeze_last_layer_epochs,
    )
