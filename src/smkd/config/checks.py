"""Checks of a whole configuration: warm-ups must fit into the epochs, and typed settings must have an effect."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import NamedTuple

from smkd.config.run_config import RunConfig
from smkd.errors import ConfigError


class Duration(NamedTuple):
    """A setting that counts epochs.

    Attributes:
        key: dotted key of the setting.
        epochs: its value.
        most: the largest value with which it ends within the run.
        short: the value that a longer one is shortened to.
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
    """Durations of a recipe that must be shortened to fit into the typed `epochs`.

    A warm-up of the learning rate, the frozen last layer and the time without masks get at most half of the run; the
    warm-up of a temperature may last as long as the run.

    Args:
        config: settings with the typed epochs.
        typed: dotted keys that the user gave; these durations are not shortened.

    Returns:
        The old and the new value by key.
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


def check_used(config: RunConfig, typed: Iterable[str]) -> None:
    """Raise `ConfigError` for the first setting that has no effect.

    Args:
        config: all settings.
        typed: dotted keys of what the user gave.
    """
    unused = _unused(config)
    for key in typed:
        reason = unused.get(key)
        if reason is not None:
            raise ConfigError(f"{key} has no effect: {reason}; leave it out, or change that")


def _unused(config: RunConfig) -> dict[str, str]:
    """By dotted key, why nothing reads a setting."""
    data, objective, augment, patch = config.data, config.objective, config.augment, config.objective.patch
    patches = objective.mim.weight > 0 or patch.weight > 0
    views, blurs = config.global_views.count, (augment.blur_first_global, augment.blur_other_global, augment.blur_local)
    rules: list[tuple[bool, str, str]] = [
        (
            data.root is None, "there is no data=<your images>",
            "data.split_by data.split_seed data.split_file data.label_column data.cache data.cache_size data.cache_dir",
        ),
        (data.cache != "mmap", f"data.cache={data.cache} writes no file", "data.cache_dir"),
        (max(config.mask.ratio) == 0, "mask.ratio hides nothing", "mask.shape mask.start_epoch mask.ratio_jitter"),
        (
            max(config.mask.ratio) == 0 < objective.mim.weight, "mask.ratio hides nothing", "objective.mim.weight",
        ),
        (
            patch.weight == 0, "objective.patch.weight=0",
            "objective.patch.matching objective.patch.weighting objective.patch.same_image",
        ),
        (views < 2 and patch.weight > 0, "patches are matched across two global views", "objective.patch.weight"),
        (
            patch.matching == "reference", "objective.patch.matching=reference has its own pairs",
            "objective.patch.same_image",
        ),
        (
            objective.cls.weight == 0, "objective.cls.weight=0",
            "objective.cls.same_image objective.cls_center_momentum objective.cls_temperature.start "
            "objective.cls_temperature.end objective.cls_temperature.warmup_epochs",
        ),
        (
            not objective.labels, "objective.labels=false pairs the views of one image",
            "objective.cls.same_image objective.pairs",
        ),
        (
            objective.cls_temperature.warmup_epochs == 0, "objective.cls_temperature.warmup_epochs=0",
            "objective.cls_temperature.start",
        ),
        (
            # before the masks start, it is the temperature
            objective.patch_temperature.warmup_epochs == config.mask.start_epoch == 0,
            "objective.patch_temperature.warmup_epochs=0", "objective.patch_temperature.start",
        ),
        (
            not patches, "no term looks at patches (objective.mim.weight, objective.patch.weight)",
            "objective.patch_center_momentum objective.patch_temperature.start objective.patch_temperature.end "
            "objective.patch_temperature.warmup_epochs",
        ),
        (
            not patches and objective.cls.weight == 0, "no term compares student and teacher",
            "objective.student_temperature",
        ),
        (config.model.rotary, "model.rotary=true stores no positions and takes any size", "model.image_size"),
        (config.local_views.count == 0, "local_views.count=0", "local_views.size local_views.scale augment.blur_local"),
        (views < 2, f"global_views.count={views}", "augment.blur_other_global augment.solarize_other_global"),
        (
            augment.jitter == 0, "augment.jitter=0",
            "augment.brightness augment.contrast augment.saturation augment.hue",
        ),
        (max(blurs) == 0, "nothing is blurred", "augment.blur_radius"),
        (
            config.validation.every == 0, "validation.every=0",
            "validation.patience validation.way validation.shots validation.query validation.episodes validation.seed "
            "validation.query_dirichlet validation.head",
        ),
        (config.starts_random, "there is no init=<run>", "init_optimizer"),
        (not config.wandb, "wandb=false", "wandb_project"),
    ]  # fmt: skip
    return {key: reason for applies, reason, keys in rules if applies for key in keys.split()}
