"""A backbone as timm publishes one: `model.safetensors` and `config.json` in a folder.

`timm.create_model("local-dir:FOLDER", pretrained=True)`, or `hf-hub:owner/name` from the Hub, makes it again.
Names and settings: timm/models/_hub.py, vision_transformer.py and, for rotary positions, eva.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from smkd.data.datasets import configured_spec
from smkd.models.vit import SIZES
from smkd.publishing.backbone import PublishedBackbone, write_weights
from smkd.publishing.place import SETTINGS, WEIGHTS
from smkd.weights.architecture import Architecture
from smkd.weights.rename import State

NAMED = {"tiny", "small", "base", "large"}
"""Sizes of ours that timm has under the same names."""


def write_timm(release: PublishedBackbone, folder: Path) -> None:
    """Fill a folder."""
    folder.mkdir(exist_ok=True)
    write_weights(release, timm_weights(release), folder / WEIGHTS)
    (folder / SETTINGS).write_text(json.dumps(timm_settings(release), indent=2) + "\n", encoding="utf-8")


def timm_weights(release: PublishedBackbone) -> State:
    """Weights under timm's names."""
    weights = {name: value for name, value in release.backbone.state_dict().items() if name != "mask_token"}
    if release.config.model.rotary:
        weights = {re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name): value for name, value in weights.items()}
        return _with_split_gates(weights) if release.config.model.swiglu else weights
    if release.config.model.register_tokens:
        # with registers timm stores no position for [CLS]
        positions = weights["pos_embed"]
        weights |= {"cls_token": weights["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    return weights


def timm_settings(release: PublishedBackbone) -> dict[str, Any]:
    """What `config.json` holds: the architecture's name, what differs from it, and how images are prepared."""
    config, protocol = release.config, release.config.evaluation
    spec = configured_spec(config.data)
    architecture, arguments = _rotary(release) if config.model.rotary else _stored(release)
    side = config.model.image_size
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": release.backbone.embed_dim,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "smkd",
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": not config.model.rotary,
            "interpolation": "bicubic",
            "crop_pct": round(protocol.crop / protocol.resize, 4),
            "crop_mode": "center",
            "mean": list(spec.mean),
            "std": list(spec.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": release.about.license,
        },
    }


def _with_split_gates(weights: State) -> State:
    """Gate and value of an MLP apart."""
    split: State = {}
    for name, value in weights.items():
        if ".mlp.fc1." in name:
            split[name.replace(".fc1.", ".fc1_g.")], split[name.replace(".fc1.", ".fc1_x.")] = value.chunk(2)
        else:
            split[name] = value
    return split


def _sizes(release: PublishedBackbone) -> dict[str, Any]:
    model, architecture = release.config.model, Architecture.of(release.config.model)
    return {
        "img_size": model.image_size, "patch_size": model.patch_size, "embed_dim": architecture.embed_dim,
        "depth": architecture.depth, "num_heads": architecture.num_heads, "global_pool": "token",
        "init_values": 1.0 if architecture.layer_scale else None, **_mlp(architecture),
    }  # fmt: skip


def _mlp(architecture: Architecture) -> dict[str, Any]:
    """timm cuts dim * ratio down to a whole number; a half more is the same number for certain."""
    width = 2 * architecture.mlp_dim if architecture.swiglu and not architecture.rotary else architecture.mlp_dim
    usual = not architecture.swiglu and width == 4 * architecture.embed_dim
    return {} if usual else {"mlp_ratio": (width + 0.5) / architecture.embed_dim}


def _stored(release: PublishedBackbone) -> tuple[str, dict[str, Any]]:
    """timm's VisionTransformer."""
    model = release.config.model
    registers = {"reg_tokens": model.register_tokens, "no_embed_class": True} if model.register_tokens else {}
    arguments = _sizes(release) | registers
    if model.swiglu:
        # its MLPs are gated, which no argument in a file can say
        return "vit_giant_patch14_dinov2", arguments
    size = _size(release)
    dim, depth, heads = SIZES[size]
    usual = {"img_size": 224, "patch_size": 16, "embed_dim": dim, "depth": depth, "num_heads": heads,
             "global_pool": "token", "init_values": None}  # fmt: skip
    return f"vit_{size}_patch16_224", {key: value for key, value in arguments.items() if usual.get(key, "") != value}


def _rotary(release: PublishedBackbone) -> tuple[str, dict[str, Any]]:
    """timm's Eva, of which its DINOv3 are; here with a bias of keys too."""
    model = release.config.model
    parts = {"num_reg_tokens": model.register_tokens, "attn_type": "rope"}
    if model.swiglu:
        parts |= {"swiglu_mlp": True, "swiglu_align_to": 1}
    size = _size(release)
    # older versions have no tiny one
    name = "small" if size == "tiny" else size
    return f"vit_{name}_patch16_dinov3_qkvb", _sizes(release) | parts


def _size(release: PublishedBackbone) -> str:
    return release.config.model.size if release.config.model.size in NAMED else "small"
