"""Make a checkpoint of smkd from the weights of another project, with a report of what was done to them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from smkd import __version__
from smkd.config import loading
from smkd.config.run_config import RunConfig
from smkd.config.schema import HeadConfig, ModelConfig
from smkd.errors import CheckpointError
from smkd.files import listed
from smkd.models.vit import resized_positions
from smkd.weights import recognise, smkd_file
from smkd.weights.architecture import (
    Architecture,
    check_shapes,
    fresh_weights,
    head_config,
    read_architecture,
    size_of,
    weight_shapes,
    with_positions_of_cls,
)
from smkd.weights.attention_heads import check_heads, heads_of
from smkd.weights.recognise import Foreign, ForeignNetwork
from smkd.weights.rename import BACKBONE, HEAD, State, with_prefix, without_prefix

FOREIGN_RECIPE = "folder-pretrain"
"""Settings of weights that bring none, such as the image size and the normalisation (ImageNet's)."""
NetworkName = Literal["teacher", "student"]
MARK = "imported"
"""Key of a checkpoint that was made here; its value is the report, one line each."""
EXPORTED = "exported"
"""Key of a checkpoint that was made of a file of `smkd export`; its value is what the file says of itself."""


def imported(
    content: Mapping[str, Any], file: str, base: RunConfig | None, *, network: NetworkName | None = None,
    heads: int | None = None, beside: Path | None = None, allow_missing: Collection[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """A checkpoint of ours with the weights of another project's file.

    Args:
        content: what the file holds (`smkd.weights.read.read_weights`).
        file: what messages call it.
        base: settings of everything that weights do not decide, such as the data; None, and not looked at, for a
            file of `smkd export`, which brings them.
        network: which of a file's two goes into both of ours; none keeps both as they are.
        heads: number of attention heads, where the user says it (`smkd.weights.attention_heads`).
        beside: path of the file, beside which a `config.json` may say the number of heads.
        allow_missing: names of backbone weights that may be missing and then stay as training begins.

    Raises:
        CheckpointError: no ViT, one of another kind, or weights that are missing, unknown or of another shape.
    """
    foreign = recognise.recognise_layout(content, file)
    if smkd_file.KEY in content:
        base = smkd_file.backbone_info(content[smkd_file.KEY], file).config
        own = Architecture.of(base.model).num_heads
        check_heads(heads, own, file)
        heads = own
    assert base is not None
    chosen = _chosen(foreign, network, file)
    if smkd_file.KEY in content:
        # names alone do not tell it
        chosen = {name: replace(found, rotary=base.model.rotary) for name, found in chosen.items()}
    report = [f"{file}: {foreign.layout}"]
    models, backbones = {}, {}
    for name, found in chosen.items():
        models[name], backbones[name], lines = _backbone(found, file, base.model, heads, beside, allow_missing)
        report += [line for line in lines if line not in report]
    if models["student"] != models["teacher"]:
        raise CheckpointError(f"'{file}': student and teacher are ViTs of different sizes; choose one of them")
    config, fitted = _fitted(base, models["teacher"])
    head, lines = _head(chosen, len(backbones["teacher"]["norm.weight"]), base.head, bool(foreign.centres))
    report += lines + _left_out(chosen["teacher"], foreign.unused) + fitted
    config = config.model_copy(update={"head": head or base.head})
    student = backbones["student"]
    if "mask_token" not in student:
        student["mask_token"] = torch.zeros(1, 1, student["cls_token"].shape[-1])
        report.append("new: the student's mask token (zeros)")
    backbones["teacher"].pop("mask_token", None)
    states = {
        name: with_prefix(backbones[name], BACKBONE) | (with_prefix(chosen[name].head, HEAD) if head else {})
        for name in ("student", "teacher")
    }
    return {
        **states, "objective": foreign.centres if head else {}, "optimizer": {}, "scaler": {}, "epoch": 0,
        "step": 0, "best": -math.inf, "config": config.model_dump(mode="json"), "classes": [],
        "version": __version__, MARK: report,
        **({EXPORTED: content[smkd_file.KEY]} if smkd_file.KEY in content else {}),
    }  # fmt: skip


def without_later_blocks(state: dict[str, Any], model: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """A checkpoint without the blocks behind those that a run has, where it asks for fewer by `model.depth`.

    Returns:
        The checkpoint, and a line where blocks were left out.
    """
    config, depth = state.get("config"), model.depth
    if config is None or depth is None:
        return state, []
    given = loading.check(config).model
    own = Architecture.of(given)
    if depth >= own.depth:
        return state, []
    gone = tuple(f"{BACKBONE}blocks.{number}." for number in range(depth, own.depth))
    kept = {
        name: {key: value for key, value in state[name].items() if not key.startswith(gone)}
        for name in ("student", "teacher")
    }
    cut = given.model_copy(update={"depth": depth, "embed_dim": own.embed_dim, "num_heads": own.num_heads})
    left_out = f"block {own.depth}" if own.depth == depth + 1 else f"blocks {depth + 1} to {own.depth}"
    line = f"left out: {left_out} of the backbone (model.depth={depth})"
    return {**state, **kept, "config": {**config, "model": cut.model_dump(mode="json")}}, [line]


def fit_to_run(state: dict[str, Any], config: RunConfig, own: Mapping[str, State]) -> tuple[dict[str, Any], list[str]]:
    """An imported checkpoint made to start a run: stored positions for its image side, and no head that does not fit.

    Args:
        state: what `imported` made.
        config: of the run.
        own: the run's weights of 'student', 'teacher' and 'objective'.

    Returns:
        The checkpoint, and lines that say what was changed.

    Raises:
        CheckpointError: the run's backbone is another one; names the settings that make it this one.
    """
    given = loading.check(state["config"]).model
    mine, theirs = Architecture.of(config.model), Architecture.of(given)
    if mine != theirs:
        raise CheckpointError(
            f"the imported weights are a ViT of {theirs}; this run's has {mine}; set {theirs.settings(mine)}"
        )
    lines = []
    state = {**state, **{name: dict(state[name]) for name in own}}
    key = f"{BACKBONE}pos_embed"
    for name in ("student", "teacher"):
        if key in own[name] and state[name][key].shape != own[name][key].shape:
            grid = math.isqrt(own[name][key].shape[1] - 1)
            old = math.isqrt(state[name][key].shape[1] - 1)
            state[name][key] = resized_positions(state[name][key], grid, grid)
            lines.append(f"position embedding interpolated from {old} x {old} to {grid} x {grid} patches")
    heads = {name: _shapes(without_prefix(state[name], HEAD)) for name in ("student", "teacher")}
    if any(shapes != _shapes(without_prefix(own[name], HEAD)) for name, shapes in heads.items()):
        if any(heads.values()):
            lines.append("the imported head does not fit this run's and is left out; it starts afresh")
        for name in heads:
            state[name] = {key: value for key, value in state[name].items() if not key.startswith(HEAD)}
        state["objective"] = {}
    centres = {key: state["objective"].get(key, value) for key, value in own["objective"].items()}
    state["objective"] = {
        key: value if value.shape == own["objective"][key].shape else own["objective"][key]
        for key, value in centres.items()
    }
    return state, list(dict.fromkeys(lines))


def _chosen(foreign: Foreign, network: NetworkName | None, file: str) -> dict[str, ForeignNetwork]:
    found = foreign.networks
    if network is not None:
        if network not in found and "model" not in found:
            raise CheckpointError(f"'{file}' has no {network}, only a {next(iter(found))}")
        found = {network: found.get(network) or found["model"]}
    only = next(iter(found.values()))
    return {name: found.get(name, only) for name in ("student", "teacher")}


def _backbone(
    network: ForeignNetwork, file: str, base: ModelConfig, heads: int | None, beside: Path | None,
    allow_missing: Collection[str],
) -> tuple[ModelConfig, State, list[str]]:  # fmt: skip
    weights = dict(network.backbone)
    dim, depth = size_of(weights, file)
    count, source = heads_of(dim, depth, rotary=network.rotary, base=base, weights=beside, given=heads, file=file)
    architecture, side = read_architecture(weights, file, count, base.image_size if network.rotary else None)
    model = architecture.configured(base, side)
    positions = "" if architecture.rotary else f"; positions for images of {side} pixels"
    lines = [f"ViT: {architecture}; number of heads {source}{positions}"]
    if not architecture.rotary and len(with_positions_of_cls(weights["pos_embed"])[0]) != len(weights["pos_embed"][0]):
        weights["pos_embed"] = with_positions_of_cls(weights["pos_embed"])
        lines.append("positions: [CLS] has none of its own (zeros)")
    if "mask_token" in weights and weights["mask_token"].shape != (1, 1, architecture.embed_dim):
        del weights["mask_token"]
        lines.append("left out: mask_token, of another size")
    expected = weight_shapes(model)
    qkv_biases = {name for name in expected if name.endswith(".attn.qkv.bias")}
    if not qkv_biases & weights.keys():
        weights |= {name: torch.zeros(expected[name]) for name in qkv_biases}
        lines.append("query, key and value have no biases in the file (zeros)")
    if unknown := sorted(set(allow_missing) - expected.keys()):
        raise CheckpointError(f"--allow-missing {unknown[0]}: the backbone has no such weight")
    check_shapes(weights, expected, file, allow_missing, hint="; --allow-missing NAME accepts one")
    absent = sorted(expected.keys() - weights.keys())
    if absent:
        fresh = fresh_weights(model, architecture.depth)
        weights |= {name: fresh[name].clone() for name in absent}
        lines.append(f"missing and allowed, as training begins: {', '.join(absent)}")
    matched = len(network.backbone)
    lines.append(f"backbone: {matched} weights matched, {len(network.renamed)} of the file's names changed")
    return model, weights, lines


def _head(
    chosen: Mapping[str, ForeignNetwork], dim: int, base: HeadConfig, has_centres: bool
) -> tuple[HeadConfig | None, list[str]]:
    """Configuration of the projection head on `dim` channels that is taken over, if one is, and a line about it."""
    student, teacher = chosen["student"].head, chosen["teacher"].head
    if not teacher:
        return None, []
    if _shapes(student) != _shapes(teacher):
        return None, ["head: left out, student and teacher have different ones"]
    found = head_config(teacher, dim, base)
    if found is None:
        return None, ["head: left out, its parts do not fit together"]
    return found, [f"head: {found.num_prototypes} prototypes" + (", with centres" if has_centres else "")]


def _fitted(base: RunConfig, model: ModelConfig) -> tuple[RunConfig, list[str]]:
    """The settings with this backbone; sides of images and views become whole patches."""
    patch = model.patch_size
    values = base.model_dump(mode="json") | {"model": model.model_dump(mode="json")}
    lines = []
    for group, key in (("global_views", "size"), ("local_views", "size"), ("validation", "crop"),
                       ("evaluation", "crop")):  # fmt: skip
        old = values[group][key]
        new = max(patch, old - old % patch)
        if new != old:
            values[group] = values[group] | {key: new}
            lines.append(f"{group}.{key}: {old} -> {new}, whole patches of {patch}")
    return loading.check(values), lines


def _left_out(network: ForeignNetwork, unused: tuple[str, ...]) -> list[str]:
    groups = Counter(name.removeprefix("module.").split(".")[0] for name in network.left_out)
    names = [*(f"{group} ({count})" for group, count in groups.items()), *unused]
    return [f"left out: {listed(names)}"] if names else []


def _shapes(weights: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}
