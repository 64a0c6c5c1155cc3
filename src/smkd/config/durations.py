"""Settings that are counted in epochs, and what of them fits into a run."""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from smkd.config.schema import RunConfig
from smkd.errors import ConfigError


class Duration(NamedTuple):
    """One of them.

    Attributes:
        key: dotted key of the setting.
        epochs: its value.
        most: epochs that fit into the run: a warm-up reaches its end in it.
        short: what a longer one is shortened to.
    """

    key: str
    epochs: int
    most: int
    short: int


def durations(config: RunConfig) -> list[Duration]:
    """All durations that the run uses."""
    epochs, objective, start = config.epochs, config.objective, config.mask.start_epoch
    found = [
        Duration("optim.warmup_epochs", config.optim.warmup_epochs, epochs - 1, epochs // 2),
        Duration("optim.freeze_last_layer_epochs", config.optim.freeze_last_layer_epochs, epochs - 1, epochs // 2),
        Duration("mask.start_epoch", start, epochs - 1, epochs // 2),
    ]
    if objective.cls.weight > 0:
        warmup = objective.cls_temperature.warmup_epochs
        found.append(Duration("objective.cls_temperature.warmup_epochs", warmup, epochs, epochs))
    if objective.mim.weight > 0 or objective.patch.weight > 0:
        # it begins with the masks
        left, warmup = max(0, epochs - start), objective.patch_temperature.warmup_epochs
        found.append(Duration("objective.patch_temperature.warmup_epochs", warmup, left, left))
    return found


def shortened(config: RunConfig, typed: Set[str]) -> dict[str, tuple[int, int]]:
    """Durations of a recipe that are to be shortened to fit into the `epochs` that were typed.

    A warm-up of the learning rate, the frozen last layer and the time without masks get at most half of the run; the
    warm-up of a temperature may last as long as the run.

    Args:
        config: with the epochs that were typed.
        typed: dotted keys of what the user gave; these durations stay as they are.

    Returns:
        By key, the value as it was and as it shall be.
    """
    if "epochs" not in typed:
        return {}
    return {key: (epochs, short) for key, epochs, _, short in durations(config) if epochs > short and key not in typed}


def cut_differently(before: RunConfig, config: RunConfig) -> set[str]:
    """Durations of one recipe in which two configurations differ because of the `epochs` that they were cut to."""
    if before.epochs == config.epochs:
        return set()
    old, new = ({each.key: each for each in durations(of)} for of in (before, config))
    return {
        key for key in old.keys() & new.keys()
        if old[key].epochs != new[key].epochs and any(each.epochs == each.short for each in (old[key], new[key]))
    }  # fmt: skip


def check_durations(config: RunConfig) -> None:
    """Raise `ConfigError` naming the first duration that does not fit into the run."""
    for key, epochs, most, _ in durations(config):
        if epochs > most:
            raise ConfigError(f"{key}={epochs} does not fit into a run of epochs={config.epochs}; at most {most}")
