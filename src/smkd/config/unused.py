"""Settings that nothing reads in a combination: what is typed is used or refused."""

from __future__ import annotations

from collections.abc import Iterable

from smkd.config.schema import RunConfig
from smkd.errors import ConfigError


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
