"""Translate other projects' names of a ViT's weights into smkd's."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]
BACKBONE, HEAD = "backbone.", "head."
"""What the names of a network's weights begin with, in checkpoints and in files of this package."""

# timm's, facebookresearch's and transformers' old and new names; each rule sees what the ones before it made
_RULES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        # transformers
        (r"^embeddings\.", ""),
        (r"^position_embeddings$", "pos_embed"),
        (r"^patch_embeddings(\.projection)?\.", "patch_embed.proj."),
        (r"^(encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\2."),
        (r"\.attention\.(attention\.)?(query|q_proj)\.", ".attn.q_proj."),
        (r"\.attention\.(attention\.)?(key|k_proj)\.", ".attn.k_proj."),
        (r"\.attention\.(attention\.)?(value|v_proj)\.", ".attn.v_proj."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
        (r"\.mlp\.(up_proj|weights_in)\.", ".mlp.fc1."),
        (r"\.mlp\.(down_proj|weights_out)\.", ".mlp.fc2."),
        # gated MLPs: facebookresearch's in one or two matrices, timm's
        (r"\.mlp\.(w12|w2|fc1_x)\.", ".mlp.fc1."),
        (r"\.mlp\.(w1|fc1_g)\.", ".mlp.gate_proj."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
        # facebookresearch: blocks in chunks (the second number counts through), registers
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
        (r"^(register|storage)_tokens$", "reg_token"),
        # timm's DINOv3
        (r"\.gamma_([12])$", r".ls\1.gamma"),
        (r"\.attn\.([qv])_bias$", r".attn.\1_proj.bias"),
        # iBOT and SMKD
        (r"^masked_embed$", "mask_token"),
    )
)
_BACKBONE = re.compile(
    r"(blocks\.\d+|patch_embed|norm|norm_pre|cls_norm|embeddings)\.|(cls_token|pos_embed|reg_token|dist_token)$"
)
_PATCHES = re.compile(r"^(.*?)(patch_embed\.proj|embeddings\.patch_embeddings(?:\.projection)?)\.weight$")
_HEAD_RULES = (
    (re.compile(r"\.parametrizations\.weight\.original0$"), ".weight_g"),
    (re.compile(r"\.parametrizations\.weight\.original1$"), ".weight_v"),
    # a one-layer MLP is a bare linear layer there
    (re.compile(r"^mlp\.(weight|bias)$"), r"mlp.0.\1"),
)


def without_prefix(weights: Mapping[str, Tensor], prefix: str) -> State:
    """The weights whose names begin with a prefix, named without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def with_prefix(weights: Mapping[str, Tensor], prefix: str) -> State:
    """The weights with a prefix before their names."""
    return {f"{prefix}{name}": value for name, value in weights.items()}


def head_prefix(prefix: str) -> str:
    """What the names of a projection head begin with that lies beside the ViT below a prefix."""
    return f"{prefix.removesuffix(BACKBONE)}{HEAD}"


def prefixes(names: list[str]) -> list[str]:
    """What stands before the names of each ViT among these weights: '' or 'module.backbone.', for example."""
    return [match[1] for match in map(_PATCHES.match, names) if match]


def is_backbone(name: str, prefix: str) -> bool:
    """Whether a name is that of a weight of the ViT below a prefix."""
    own = _renamed(name.removeprefix(prefix), _RULES)
    return name.startswith(prefix) and (_BACKBONE.match(own) is not None or own == "mask_token")


def backbone_weights(weights: State, prefix: str) -> tuple[State, list[str], list[str]]:
    """Weights of the ViT below a prefix.

    Returns:
        Those weights under our names; which of the given names changed; the names that belong to no backbone.
    """
    found: State = {}
    renamed, other = [], []
    for name, value in weights.items():
        if not is_backbone(name, prefix):
            other.append(name)
            continue
        own = _renamed(name.removeprefix(prefix), _RULES)
        found[own] = value
        if own != name.removeprefix(prefix):
            renamed.append(name)
    # a decoder's mask token is not the backbone's
    if any(name.removeprefix(prefix).startswith("decoder") for name in other) and "mask_token" in found:
        del found["mask_token"]
        other.append(f"{prefix}mask_token")
    return _with_joined_gates(_with_joined_qkv(found)), renamed, other


def head_weights(weights: State, prefix: str) -> State:
    """Projection head beside the backbone, under our names; empty if there is none that we have the parts of."""
    own = without_prefix(weights, head_prefix(prefix))
    head = {_renamed(name, _HEAD_RULES): value for name, value in own.items()}
    parts = re.compile(r"mlp\.(0|[1-9][0-9]?)\.(weight|bias)|last_layer2?\.weight_[gv]")
    if not {"mlp.0.weight", "last_layer.weight_g", "last_layer.weight_v"} <= head.keys():
        return {}
    # not one with norms between the layers
    if not all(map(parts.fullmatch, head)) or any(
        value.ndim != (1 if "bias" in name else 2) for name, value in head.items()
    ):
        return {}
    # with a shared head the second layer is the first one again
    if all(torch.equal(head.get(f"last_layer2.weight_{x}", head[own]), head[own])
           for x in "gv" for own in [f"last_layer.weight_{x}"]):  # fmt: skip
        head = {name: value for name, value in head.items() if not name.startswith("last_layer2.")}
    return head


def _renamed(name: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, new in rules:
        name = pattern.sub(new, name)
    return name


def _with_joined_qkv(weights: State) -> State:
    """Query, key and value in one matrix, as in timm; a key without bias gets zeros."""
    joined = _with_plain_biases(weights)
    for name in weights:
        match = re.fullmatch(r"(blocks\.\d+\.attn)\.q_proj\.weight", name)
        if match is None:
            continue
        block = match[1]
        parts = [joined.get(f"{block}.{x}_proj.weight") for x in "qkv"]
        biases = [joined.get(f"{block}.{x}_proj.bias") for x in "qkv"]
        shape = weights[name].shape
        if any(part is None or part.shape != shape for part in parts):
            continue  # named later, as what ours has no place for
        if any(bias is not None and bias.shape != shape[:1] for bias in biases):
            continue
        joined = {
            name: value for name, value in joined.items() if not re.match(rf"{re.escape(block)}\.[qkv]_proj\.", name)
        }
        joined[f"{block}.qkv.weight"] = torch.cat([part for part in parts if part is not None])
        if any(bias is not None for bias in biases):
            zeros = weights[name].new_zeros(shape[0])
            joined[f"{block}.qkv.bias"] = torch.cat([zeros if bias is None else bias for bias in biases])
    return joined


def _with_joined_gates(weights: State) -> State:
    """Gate and value of a gated MLP in one matrix, the gate first."""
    joined = dict(weights)
    for name, gate in weights.items():
        value = weights.get(name.replace(".gate_proj.", ".fc1."))
        if ".mlp.gate_proj." in name and value is not None and value.shape == gate.shape:
            joined[name.replace(".gate_proj.", ".fc1.")] = torch.cat([joined.pop(name), value])
    return joined


def _with_plain_biases(weights: State) -> State:
    """Biases of the joined matrix, where DINOv3 masks them (facebookresearch) or has those of two parts (timm)."""
    plain = dict(weights)
    for name, value in weights.items():
        bias = weights.get(name.removesuffix("_mask"))
        if name.endswith(".attn.qkv.bias_mask") and bias is not None and bias.shape == value.shape:
            # the keys' bias does not count
            plain[name.removesuffix("_mask")] = torch.where(plain.pop(name) != 0, bias, 0)
        values = name.replace(".q_proj.bias", ".v_proj.bias")
        whole = name.replace(".q_proj.bias", ".qkv.weight")
        if name.endswith(".q_proj.bias") and whole in weights and values in weights:
            q, v = plain.pop(name), plain.pop(values)
            plain[name.replace(".q_proj.bias", ".qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return plain
