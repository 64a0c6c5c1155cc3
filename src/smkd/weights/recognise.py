"""Recognising what a file holds: one network or a student and a teacher, and from which project."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smkd.errors import CheckpointError
from smkd.weights import smkd_file
from smkd.weights.architecture import check_finite, weight_fault
from smkd.weights.rename import State, backbone_weights, head_prefix, head_weights, is_backbone, prefixes

PAIR = ("student", "teacher")
CONTAINERS = ("model", "state_dict", "model_state_dict", "module", "net", "network", "encoder", "backbone", "model_ema")
"""Where files of one network keep its weights."""
LOSS_NAMES = ("ibot_loss", "dino_loss")
"""Where training files of SMKD, iBOT, DINO and HCTransformers keep their centres."""
ROTARY_MARKS = ("storage_tokens", "rope_embed", ".gamma_1", ".mlp.up_proj.")
"""What names of DINOv3 have in them: facebookresearch's, timm's, transformers'."""
SHOWN_NAMES = 5


@dataclass(frozen=True)
class ForeignNetwork:
    """One network of a file, under our names.

    Attributes:
        backbone: its ViT.
        head: its projection head; empty if it has none.
        renamed: names in the file that are called otherwise here.
        left_out: names in the file that are neither.
        rotary: whether the names are those of DINOv3, whose positions are not stored.
    """

    backbone: State
    head: State
    renamed: tuple[str, ...]
    left_out: tuple[str, ...]
    rotary: bool


@dataclass(frozen=True)
class Foreign:
    """What a file of another project holds.

    Attributes:
        layout: whose it is, in words.
        networks: 'student' and 'teacher', either of them, or 'model'.
        centres: 'cls_center' and 'patch_center' where the file has them.
        unused: names of the file's other parts, such as its optimiser.
    """

    layout: str
    networks: dict[str, ForeignNetwork]
    centres: State
    unused: tuple[str, ...]


def recognise_layout(content: Mapping[str, Any], file: str) -> Foreign:
    """The networks of a file.

    Args:
        content: what the file holds.
        file: what messages call it.

    Raises:
        CheckpointError: there is no ViT in it; names what it looks like, or its first keys.
    """
    places = [name for name in PAIR if _tensors(content.get(name))]
    found = {name: _tensors(content[name]) for name in places}
    if not found:
        places = [name for name in CONTAINERS if _tensors(content.get(name))][:1]
        found = {"model": _tensors(content[places[0]] if places else content)}
    networks = {name: _network(weights, file) for name, weights in found.items()}
    used = {*places, *LOSS_NAMES, "args", smkd_file.KEY}
    unused = (str(name) for name, value in content.items() if isinstance(value, Mapping) and name not in used)
    return Foreign(_layout(content, next(iter(found.values()))), networks, _centres(content, file), tuple(unused))


def options_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a training script kept beside the weights; empty if there are none."""
    options = content.get("args")
    if isinstance(options, argparse.Namespace):
        return dict(vars(options))
    return dict(options) if isinstance(options, dict) else {}


def _tensors(value: object) -> State:
    if not isinstance(value, Mapping):
        return {}
    return {str(name): item for name, item in value.items() if isinstance(item, Tensor)}


def _network(weights: State, file: str) -> ForeignNetwork:
    starts = prefixes(list(weights))
    if not starts:
        raise CheckpointError(_no_vit(weights, file))
    if len(starts) > 1:
        raise CheckpointError(f"'{file}' holds {len(starts)} ViTs in one list ({', '.join(starts)}); keep one of them")
    head_start = head_prefix(starts[0])
    head_parts = (f"{head_start}mlp", f"{head_start}last_layer")
    used = {
        name: value for name, value in weights.items() if is_backbone(name, starts[0]) or name.startswith(head_parts)
    }
    weights = weights | floats(used, file)
    backbone, renamed, other = backbone_weights(weights, starts[0])
    _check_attention(backbone, file)
    head = head_weights(weights, starts[0])
    kept = [name for name in other if not (head and name.startswith(head_start))]
    return ForeignNetwork(
        {name: _plain(name, value) for name, value in backbone.items()}, head, tuple(renamed), tuple(kept),
        rotary="pos_embed" not in backbone and any(mark in name for name in weights for mark in ROTARY_MARKS),
    )  # fmt: skip


def _check_attention(backbone: State, file: str) -> None:
    """Where query, key and value are kept apart, none is missing."""
    parts = {"q": "query", "k": "key", "v": "value"}
    for name in backbone:
        match = re.fullmatch(r"(blocks\.\d+\.attn)\.[qkv]_proj\.weight", name)
        for letter, word in parts.items() if match else ():
            if match and f"{match[1]}.{letter}_proj.weight" not in backbone:
                raise CheckpointError(f"'{file}' lacks the {word} weights of {match[1]}")


def floats(weights: State, file: str) -> State:
    """Weights in float32.

    Raises:
        CheckpointError: one is no plain tensor of floats (quantised, sparse, of whole numbers), empty, or not finite.
    """
    for name, value in weights.items():
        kind = weight_fault(value)
        if kind:
            raise CheckpointError(f"'{file}': {name} is {kind}")
        if not (value.ndim and value.numel()):
            raise CheckpointError(f"'{file}': {name} is {list(value.shape)}, which is no weight")
    plain = {name: value.detach().float() for name, value in weights.items()}
    check_finite(plain, file)
    return plain


def _plain(name: str, value: Tensor) -> Tensor:
    """Tokens as [1, tokens, dim]."""
    if name in ("cls_token", "mask_token", "reg_token", "pos_embed"):
        return value.reshape(1, -1, value.shape[-1])
    return value


def _no_vit(weights: State, file: str) -> str:
    names = list(weights)
    if any(re.search(r"(^|\.)layer[1-4]\.\d+\.conv\d\.weight$", name) for name in names):
        return f"'{file}' holds a ResNet ({', '.join(names[:SHOWN_NAMES])}, ...), not a Vision Transformer"
    if not names:
        return f"'{file}' holds no weights under a name that is known ({', '.join((*PAIR, *CONTAINERS))})"
    shown = ", ".join(names[:SHOWN_NAMES])
    return f"'{file}' holds no Vision Transformer that is known here; its weights begin with {shown}"


def _layout(content: Mapping[str, Any], weights: State) -> str:
    names = "\n".join(weights)
    known = {
        "an export of smkd": smkd_file.KEY in content,
        "a training file of SMKD or iBOT": "ibot_loss" in content or "masked_embed" in names,
        "a training file of DINO's kind": any(name in content for name in PAIR),
        "transformers": "embeddings.patch_embeddings" in names,
        "MAE": "decoder_embed" in names,
        "facebookresearch/dinov3": "storage_tokens" in names,
        "facebookresearch/dinov2": "register_tokens" in names or ("mask_token" in names and ".ls1." in names),
        "timm": True,
    }
    return next(name for name, holds in known.items() if holds)


def _centres(content: Mapping[str, Any], file: str) -> State:
    losses = next((found for name in LOSS_NAMES if (found := _tensors(content.get(name)))), {})
    named = {"cls_center": "center", "patch_center": "center2"}
    found = floats({theirs: losses[theirs] for theirs in named.values() if theirs in losses}, file)
    return {own: found[theirs].flatten() for own, theirs in named.items() if theirs in found}
