"""Files as other projects write them: the same random ViT under each project's own names and shapes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smkd.config.schema import HeadConfig
from smkd.models.head import ProjectionHead
from smkd.models.vit import VisionTransformer

State = dict[str, Tensor]
SIDE, PATCH, DIM, DEPTH = 32, 8, 64, 2


def vit(**changes: Any) -> VisionTransformer:
    """A small ViT with every weight random, and one head, as 64 channels have."""
    torch.manual_seed(0)
    values = {"image_size": SIDE, "patch_size": PATCH, "embed_dim": DIM, "depth": DEPTH, "num_heads": 1}
    model = VisionTransformer(**{**values, **changes})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def weights(model: torch.nn.Module) -> State:
    return dict(model.state_dict())


def head(num_prototypes: int = 32, patch: int | None = None) -> State:
    torch.manual_seed(1)
    config = HeadConfig(num_prototypes=num_prototypes, num_patch_prototypes=patch, hidden_dim=48, bottleneck_dim=16)
    return weights(ProjectionHead(DIM, config))


def prefixed(start: str, state: State) -> State:
    return {start + name: value for name, value in state.items()}


def training_file(student: State, teacher: State, heads: State, **more: Any) -> dict[str, Any]:
    """What main_smkd.py, iBOT and DINO save: DDP around the student only, settings as a Namespace."""
    # with a shared head both layers are in the file under their own names
    second = {n.replace("last_layer.", "last_layer2."): v for n, v in heads.items() if n.startswith("last_layer.")}
    heads = {**second, **heads} if "ibot_loss" in more else heads
    return {
        "student": prefixed("module.backbone.", student) | prefixed("module.head.", heads),
        "teacher": prefixed("backbone.", teacher) | prefixed("head.", heads),
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 5e-4}]},
        "epoch": 7, "fp16_scaler": {"scale": 65536.0},
        "args": argparse.Namespace(arch="vit_small", lr=5e-4, global_crops_scale=(0.25, 1.0), gpu=0), **more,
    }  # fmt: skip


def smkd(model: VisionTransformer, heads: State) -> dict[str, Any]:
    """The mask token is called masked_embed, has two axes, and is in the student's network only."""
    state = weights(model)
    masked = {"masked_embed": torch.full((1, DIM), 0.5)}
    centres = {"center": torch.full((1, 32), 0.25), "center2": torch.full((1, 1, 32), 0.75)}
    return training_file({**state, **masked}, state, heads, ibot_loss=centres)


def mae(model: VisionTransformer) -> dict[str, Any]:
    decoder = {
        "mask_token": torch.zeros(1, 1, 24), "decoder_pos_embed": torch.zeros(1, 17, 24),
        "decoder_embed.weight": torch.zeros(24, DIM), "decoder_blocks.0.norm1.weight": torch.ones(24),
        "decoder_norm.weight": torch.ones(24), "decoder_pred.weight": torch.zeros(192, 24),
    }  # fmt: skip
    return {"model": {**weights(model), **decoder}, "epoch": 799, "args": argparse.Namespace(model="mae_vit")}


def timm(model: VisionTransformer) -> State:
    return {**weights(model), "head.weight": torch.zeros(5, DIM), "head.bias": torch.zeros(5)}


def timm_registers(model: VisionTransformer) -> State:
    """[CLS] carries its own position, so the stored ones are for the patches only."""
    state = weights(model)
    positions = state.pop("pos_embed")
    return {**state, "cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}


def dinov2(model: VisionTransformer, *, chunked: bool = False) -> State:
    state = weights(model)
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
    if chunked:
        state = {re.sub(r"^blocks\.(\d+)\.", r"blocks.0.\1.", name): value for name, value in state.items()}
    return {**state, "mask_token": torch.full((1, DIM), 0.5)}


def dinov3(model: VisionTransformer) -> State:
    """facebookresearch's; what the keys' bias says does not count, a mask says so."""
    state = weights(model)
    state["storage_tokens"] = state.pop("reg_token")
    for number in range(DEPTH):
        name = f"blocks.{number}.attn.qkv.bias"
        state[name], mask = state[name].clone(), torch.ones(3 * DIM)
        state[name][DIM : 2 * DIM], mask[DIM : 2 * DIM] = 7.0, 0.0
        state[f"{name}_mask"] = mask
    return {**state, "mask_token": torch.zeros(1, DIM), "rope_embed.periods": torch.ones(DIM // 4)}


def timm_dinov3(model: VisionTransformer, *, biases: bool) -> State:
    found: State = {}
    for name, value in weights(model).items():
        name = re.sub(r"\.ls([12])\.gamma", r".gamma_\1", name)
        if name.endswith("qkv.bias"):
            if biases:
                found[name.replace("qkv.bias", "q_bias")], _, found[name.replace("qkv.bias", "v_bias")] = value.chunk(3)
        else:
            found[name] = value
    return found


def transformers_dinov3(model: VisionTransformer) -> State:
    rules = (
        (r"^(cls_token|reg_token)$", r"embeddings.\1"), (r"\.reg_token", ".register_tokens"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings"), (r"^blocks\.", "layer."),
        (r"\.attn\.proj", ".attention.o_proj"), (r"\.ls([12])\.gamma", r".layer_scale\1.lambda1"),
        (r"\.fc1", ".up_proj"), (r"\.fc2", ".down_proj"),
    )  # fmt: skip
    found: State = {}
    for name, value in weights(model).items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        if ".attn.qkv" not in name:
            found[name] = value
            continue
        for part, piece in zip("qkv", value.chunk(3), strict=True):
            if (part, name[-4:]) != ("k", "bias"):
                found[name.replace(".attn.qkv", f".attention.{part}_proj")] = piece
    return found


_TRANSFORMERS = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^mask_token$", "embeddings.mask_token"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attn\.proj", ".attention.output.dense"),
    (r"\.ls([12])\.gamma", r".layer_scale\1.lambda1"),
)
_VIT_ONLY = (
    (r"\.norm1", ".layernorm_before"), (r"\.norm2", ".layernorm_after"),
    (r"\.mlp\.fc1", ".intermediate.dense"), (r"\.mlp\.fc2", ".output.dense"),
)  # fmt: skip


def transformers(model: VisionTransformer, *, kind: str, start: str = "") -> State:
    """kind: 'vit', 'dinov2', or 'new' for the names of version 5 (`layers`, `q_proj`)."""
    found: State = {}
    rules = _TRANSFORMERS + (() if kind == "dinov2" else _VIT_ONLY if kind == "vit" else _VIT_ONLY[:2])
    for name, value in weights(model).items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        if ".attn.qkv" not in name:
            found[start + name] = value
            continue
        for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
            found[start + name.replace(".attn.qkv", f".attention.attention.{part}")] = piece
    if kind != "new":
        return found
    new_names = (("attention.attention.query", "attention.q_proj"), ("attention.attention.key", "attention.k_proj"),
                 ("attention.attention.value", "attention.v_proj"), ("attention.output.dense", "attention.o_proj"),
                 ("encoder.layer.", "layers."))  # fmt: skip
    for old, new in new_names:
        found = {name.replace(old, new): value for name, value in found.items()}
    return found


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path
