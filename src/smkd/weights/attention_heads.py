"""The number of attention heads, which weights do not show: stated, that of a published ViT, or guessed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from smkd.config import foreign_text
from smkd.config.schema import ModelConfig
from smkd.errors import CheckpointError
from smkd.models.vit import SIZES

SETTINGS_FILE = "config.json"
HEAD_DIM = 64
"""Channels of an attention head in most ViTs."""


class Published(NamedTuple):
    """What is known of a published ViT.

    Attributes:
        name: as people call it.
        embed_dim, depth, num_heads: its sizes.
        rotary: whether its positions are; None where one of either kind has as many heads.
    """

    name: str
    embed_dim: int
    depth: int
    num_heads: int
    rotary: bool | None = None


PUBLISHED = (
    # the first of a width is taken where no depth fits
    Published("ViT-Ti", 192, 12, 3),
    Published("ViT-S", 384, 12, 6),
    Published("ViT-M", 512, 12, 8),
    Published("ViT-B", 768, 12, 12),
    Published("timm's first vit_small", 768, 8, 8),
    Published("ViT-L", 1024, 24, 16),
    Published("ViT-H", 1280, 32, 16, rotary=False),
    Published("DINOv3's ViT-H+", 1280, 32, 20, rotary=True),
    Published("ViT-g", 1408, 40, 16),
    Published("DINOv2's ViT-g", 1536, 40, 24),
    Published("ViT-G", 1664, 48, 16),
    Published("ViT-e", 1792, 56, 16),
    Published("MAE's ViT-2B", 2560, 24, 32),
    Published("DINOv3's ViT-7B", 4096, 40, 32, rotary=True),
    Published("MAE's ViT-6.5B", 4096, 32, 32),
)
"""ViTs of papers and of timm whose weights go by one of the layouts of docs/weights.md."""
TIMM = {
    "test_vit": (64, 2), "vit_wee": (256, 4), "vit_pwee": (256, 4), "vit_little": (320, 5), "vit_dlittle": (320, 5),
    "vit_tiny": (192, 3), "vit_small": (384, 6), "vit_medium": (512, 8), "vit_mediumd": (512, 8),
    "vit_betwixt": (640, 10), "vit_base": (768, 12), "vit_so150m": (896, 14), "vit_so150m2": (832, 13),
    "vit_large": (1024, 16), "vit_so400m": (1152, 16), "vit_huge": (1280, 16), "vit_huge_plus": (1280, 20),
    "vit_giant": (1408, 16), "vit_giant_dinov2": (1536, 24), "vit_gigantic": (1664, 16), "vit_7b": (4096, 32),
    "deit_tiny": (192, 3), "deit_small": (384, 6), "deit_base": (768, 12), "deit3_small": (384, 6),
    "deit3_medium": (512, 8), "deit3_base": (768, 12), "deit3_large": (1024, 16), "deit3_huge": (1280, 16),
}  # fmt: skip
"""Channels and heads by the name of timm's architecture, up to its patch side; DINOv2's giant is another."""
KEYS = ("num_attention_heads", "num_heads", "n_heads", "heads")
GROUPS = ("model_args", "vision_config", "backbone_config", "model", "config")
"""Where settings files keep the sizes of the ViT, besides at their top."""


class Heads(NamedTuple):
    """A number of heads, and how it is known, in words."""

    number: int
    source: str


def heads_of(
    dim: int, depth: int, *, rotary: bool, base: ModelConfig, weights: Path | None, given: int | None, file: str
) -> Heads:
    """Heads of a ViT, from the first that says so: the user, `config.json` beside its file, papers, channels / 64.

    Args:
        dim: channels.
        depth: blocks.
        rotary: whether positions are, as DINOv3's.
        base: settings; their own `num_heads`, or that of their size, counts for a ViT of their channels and blocks.
        weights: file of the weights, beside which `config.json` is looked for; none if there is no file.
        given: what the user says.
        file: what messages call the weights.

    Raises:
        CheckpointError: `config.json` is damaged or of another ViT, nothing tells, or the channels do not divide.
    """
    found = _first(dim, depth, rotary, base, weights, given, file)
    if dim % found.number:
        raise CheckpointError(f"'{file}': {dim} channels are not divisible by {found.number} heads ({found.source})")
    return found


def _first(
    dim: int, depth: int, rotary: bool, base: ModelConfig, weights: Path | None, given: int | None, file: str
) -> Heads:
    if given is not None:
        return Heads(given, "as given")
    own_dim, own_depth, own_heads = SIZES[base.size]
    fits = (base.embed_dim or own_dim, base.depth or own_depth) == (dim, depth)
    if base.num_heads is not None and fits:
        return Heads(base.num_heads, "model.num_heads of the settings")
    settings = None if weights is None else weights.with_name(SETTINGS_FILE)
    silent = ""
    if settings is not None and settings.exists():
        stated = _stated(settings, dim)
        if stated is not None:
            return Heads(stated, f"from {SETTINGS_FILE}")
        silent = f", as {SETTINGS_FILE} beside it says nothing of heads"
    if fits and (own_dim, own_depth) == (dim, depth):
        return Heads(own_heads, f"that of size {base.size}{silent}")
    known = known_heads(dim, depth, rotary, file)
    return Heads(known.number, known.source + silent)


def known_heads(dim: int, depth: int, rotary: bool, file: str) -> Heads:
    """Heads of the published ViT of this size; else a guess.

    Raises:
        CheckpointError: the channels are such that none is possible.
    """
    same = [each for each in PUBLISHED if each.embed_dim == dim]
    same.sort(key=lambda each: (each.rotary not in (None, rotary), each.depth != depth))
    if not same:
        if dim % HEAD_DIM:
            raise CheckpointError(f"'{file}': {dim} channels are no multiple of {HEAD_DIM}; give the number of --heads")
        return Heads(dim // HEAD_DIM, f"a guess (channels / {HEAD_DIM}; --heads sets it)")
    best = same[0]
    if best.depth == depth and best.rotary in (None, rotary):
        return Heads(best.num_heads, f"that of {best.name}")
    return Heads(best.num_heads, f"a guess (that of {best.name}, as wide; --heads sets it)")


def check_heads(given: int | None, own: int, file: str) -> None:
    """Refuse a number of heads for weights that bring theirs; raises `CheckpointError`."""
    if given is not None and given != own:
        raise CheckpointError(f"'{file}' is of smkd and has {own} heads, not {given}; leave --heads out")


def _stated(settings: Path, dim: int) -> int | None:
    """What `config.json` says; None if nothing.

    Raises:
        CheckpointError: it cannot be read, contradicts itself, or is that of another ViT.
    """
    remedy = "mend it, or give the number of --heads"
    try:
        values = foreign_text.read_json(settings)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise CheckpointError(f"cannot read '{settings}': {reason}; {remedy}") from error
    groups = {"": values} | {f"{name}.": values[name] for name in GROUPS if isinstance(values.get(name), dict)}
    for group, inner in groups.items():
        key = "hidden_size" if "hidden_size" in inner else "embed_dim"
        channels = inner.get(key)
        if isinstance(channels, int) and channels != dim and any(inner.get(key) is not None for key in KEYS):
            raise CheckpointError(
                f"'{settings}': {group}{key} is {channels}, but the weights have {dim} channels; {remedy}"
            )
    found = {
        f"{group}{key}": _count(inner[key], f"'{settings}': {group}{key}", remedy)
        for group, inner in groups.items()
        for key in KEYS
        if inner.get(key) is not None
    }
    if len(set(found.values())) > 1:
        said = ", ".join(f"{key} = {count}" for key, count in found.items())
        raise CheckpointError(f"'{settings}' contradicts itself: {said}; {remedy}")
    if found:
        return next(iter(found.values()))
    return _of_architecture(values, groups, settings, dim, remedy)


def _of_architecture(
    values: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]], settings: Path, dim: int, remedy: str
) -> int | None:
    """By the name of timm's architecture."""
    name = values.get("architecture") or values.get("arch") or values.get("model_name")
    match = (
        re.match(r"(\w+?)(?:_patch\d+\w*|_(?:little|reg|rope)\w*)?(?:\.|$)", name) if isinstance(name, str) else None
    )
    if match is None or not isinstance(name, str):
        return None
    family = match[1]
    if family == "vit_giant" and "dinov2" in name:
        family = "vit_giant_dinov2"
    if family not in TIMM:
        return None
    channels, heads = TIMM[family]
    if any("embed_dim" in inner for inner in groups.values()):
        # the name is only where its arguments start from
        return heads
    if channels != dim:
        raise CheckpointError(
            f"'{settings}' is of {name}, which has {channels} channels, but the weights have {dim}; {remedy}"
        )
    return heads


def _count(value: Any, where: str, remedy: str) -> int:
    """A whole number above 0, also one written as a text or with a point."""
    text = str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    match = re.fullmatch(r"([0-9]{1,6})(\.0+)?", text)
    if match is None or not int(match[1]):
        raise CheckpointError(f"{where} should be a number of heads, not {str(value)[:40]!r}; {remedy}")
    return int(match[1])
