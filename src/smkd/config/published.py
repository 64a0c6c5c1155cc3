"""Architectures of the published backbones by name (`smkd.weights.catalogue`), for runs that start from one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from smkd.config.run_config import RunConfig
from smkd.config.schema import ModelConfig

SIDES = (("global_views", "size"), ("local_views", "size"), ("validation", "crop"), ("evaluation", "crop"))
"""Sides in pixels that are whole numbers of patches."""


def _all() -> Iterator[tuple[str, ModelConfig]]:
    sizes = ("small", "base", "large")
    for size in sizes:
        yield f"dinov2-{size}", ModelConfig(size=size, patch_size=14, image_size=518, layer_scale=1.0)
    for size in sizes:
        yield (
            f"dinov2-{size}-registers",
            ModelConfig(size=size, patch_size=14, image_size=518, layer_scale=1.0, register_tokens=4),
        )
    yield "dino-vits16", ModelConfig(size="small")
    yield "dino-vitb16", ModelConfig(size="base")
    for data in ("mini-imagenet", "tiered-imagenet", "cifar-fs", "fc100"):
        yield f"smkd-{data}", ModelConfig(size="small")
    small, base, large = (ModelConfig(size=size, layer_scale=1.0, register_tokens=4, rotary=True) for size in sizes)
    yield "dinov3-vits16", small
    yield "dinov3-vits16plus", small.model_copy(update={"swiglu": True})
    yield "dinov3-vitb16", base
    yield "dinov3-vitl16", large
    yield (
        "dinov3-vith16plus",
        large.model_copy(update={"embed_dim": 1280, "depth": 32, "num_heads": 20, "swiglu": True}),
    )


ARCHITECTURES = dict(_all())


def settings_of_start(values: Mapping[str, Any], given: Set[str]) -> dict[str, dict[str, Any]]:
    """Settings that a run takes from the published backbone that its `init` names; none where it names none.

    Args:
        values: all settings of the run, unchecked.
        given: dotted keys of what the user gave, which stays as it is.

    Returns:
        By group and key, those that change: the architecture, and sides of images and views in whole patches.
    """
    model = ARCHITECTURES.get(str(values.get("init")))
    if model is None:
        return {}
    wanted = {("model", key): value for key, value in model.model_dump(exclude={"drop_path"}).items()}
    for group, key in SIDES:
        side = _value(values, group, key)
        if isinstance(side, int):
            wanted[group, key] = max(model.patch_size, side - side % model.patch_size)
    changed: dict[str, dict[str, Any]] = {}
    for (group, key), value in wanted.items():
        if value != _value(values, group, key) and f"{group}.{key}" not in given:
            changed.setdefault(group, {})[key] = value
    return changed


def _value(values: Mapping[str, Any], group: str, key: str) -> Any:
    """What is set, or the default."""
    found = values.get(group)
    default = getattr(RunConfig.model_fields[group].default, key)
    return found.get(key, default) if isinstance(found, Mapping) else default
