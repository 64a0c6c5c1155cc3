"""Every wrong file ends in one line that says what is wrong; nothing in a file is ever executed."""

from __future__ import annotations

import argparse
import copy
import os
import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import foreign_files as files
from smkd import api
from smkd.engine.restore import open_checkpoint
from smkd.errors import CheckpointError
from smkd.weights.load import imported

BASE = api.resolve("debug-pretrain")
MODEL = files.vit()


def refused(content: Any, tmp_path: Path, says: str) -> None:
    path = content if isinstance(content, Path) else files.saved(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint(path, BASE)
    assert "\n" not in str(caught.value)


class Hostile:
    """Unpickling it would run a command."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize("old", [False, True])
def test_code_in_the_pickle_is_refused_and_named(tmp_path: Path, old: bool) -> None:
    trace = tmp_path / "executed"
    path = tmp_path / "evil.pth"
    content = {"model": files.weights(MODEL), "x": Hostile(os.system, f"touch {trace}")}
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    refused(path, tmp_path, r"cannot read '.*evil\.pth': its pickle wants to load posix\.system.*nothing of it was")
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        api.load(path)
    assert not trace.exists()


@pytest.mark.parametrize("call", [eval, exec, getattr, __import__])
def test_other_calls_are_refused(tmp_path: Path, call: Any) -> None:
    trace = tmp_path / "executed"
    refused({"x": Hostile(call, f"open({str(trace)!r}, 'w')")}, tmp_path, f"wants to load {call.__name__},")
    assert not trace.exists()


def test_calls_hidden_in_what_is_allowed_are_refused(tmp_path: Path) -> None:
    settings = argparse.Namespace(x=Hostile(os.system, f"touch {tmp_path / 'executed'}"))
    refused({"model": files.weights(MODEL), "args": settings}, tmp_path, r"posix\.system")
    assert not (tmp_path / "executed").exists()


def test_an_unknown_class_is_named(tmp_path: Path) -> None:
    refused({"model": files.weights(MODEL), "x": Path("a")}, tmp_path, r"wants to load pathlib\.\w*Path")
    refused(MODEL, tmp_path, r"wants to load smkd\.models\.vit\.VisionTransformer")


def test_a_plain_pickle_and_texts(tmp_path: Path) -> None:
    plain = tmp_path / "a.pkl"
    plain.write_bytes(pickle.dumps({"a": Counter("ab"), "b": Hostile(os.system, "true")}))
    refused(plain, tmp_path, "cannot read '.*a.pkl'")
    for text, says in (
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page, not weights"),
        (b"\n <html>", "a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "a Git LFS pointer"),
        (b"\x1f\x8b\x08aaaaaaaaaaaaaaaaaaaa", "gzip"),
        (b"hello, world, this is no file of weights at all", "damaged, or not a file of PyTorch"),
        (os.urandom(5000), "damaged, or not a file of PyTorch"),
    ):
        plain.write_bytes(text)
        refused(plain, tmp_path, says)
    refused([torch.ones(2)], tmp_path, "holds a list, not a dictionary")


def test_cut_short_at_any_place(tmp_path: Path) -> None:
    whole = files.saved(files.smkd(MODEL, files.head()), tmp_path / "whole.pth").read_bytes()
    cut = tmp_path / "cut.pth"
    for share in (0.001, 0.1, 0.5, 0.9, 0.999):
        cut.write_bytes(whole[: int(len(whole) * share)])
        refused(cut, tmp_path, r"cannot read '.*cut\.pth': .*(damaged|empty)")
    safetensors.torch.save_file(files.weights(MODEL), tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in (12, 100, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        refused(cut, tmp_path, "safetensors file is damaged or incomplete")


@pytest.mark.parametrize("name", ["norm.weight", "blocks.1.attn.proj.bias", "patch_embed.proj.bias", "pos_embed"])
def test_a_missing_weight_is_named(tmp_path: Path, name: str) -> None:
    state = files.weights(MODEL)
    del state[name]
    refused(state, tmp_path, rf"lacks .*{name}")


def test_blocks_that_cannot_be_counted(tmp_path: Path) -> None:
    state = files.weights(MODEL)
    none = {name: value for name, value in state.items() if not name.startswith("blocks.")}
    refused(none, tmp_path, "lacks blocks: it has 0")
    refused({**state, "blocks.99999999.norm1.weight": torch.ones(64)}, tmp_path, "it has 3, numbered up to 99999999")


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_a_missing_part_of_the_attention_is_named(tmp_path: Path, part: str) -> None:
    state = files.transformers(MODEL, kind="vit")
    del state[f"encoder.layer.1.attention.attention.{part}.weight"]
    refused(state, tmp_path, rf"lacks the {part} weights of blocks\.1\.attn")


def test_a_missing_block_counts_its_weights(tmp_path: Path) -> None:
    state = {name: value for name, value in files.weights(MODEL).items() if not name.startswith("blocks.0.")}
    refused(state, tmp_path, r"lacks 12 weights of the backbone: blocks\.0\.attn\.proj\.bias.* and 7 more")


def test_a_missing_weight_may_be_allowed_by_name() -> None:
    state = files.weights(MODEL)
    del state["norm.weight"]
    made = imported(state, "f", BASE, allow_missing=["norm.weight"])
    assert made["teacher"]["backbone.norm.weight"].eq(1).all()
    assert "missing and allowed, as training begins: norm.weight" in made["imported"]
    del state["norm.bias"]
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of the backbone: norm\.bias;"):
        imported(state, "f", BASE, allow_missing=["norm.weight"])
    with pytest.raises(CheckpointError, match=r"--allow-missing norm\.scale: the backbone has no such weight"):
        imported(state, "f", BASE, allow_missing=["norm.scale"])


def test_weights_of_the_backbone_without_a_place_are_named(tmp_path: Path) -> None:
    more = {"blocks.0.attn.q_norm.weight": torch.ones(64), "norm_pre.weight": torch.ones(64)}
    refused(
        {**files.weights(MODEL), **more}, tmp_path, r"also has 2 weights .* blocks\.0\.attn\.q_norm\.weight, norm_p"
    )


def test_other_shapes_are_named(tmp_path: Path) -> None:
    state = files.weights(MODEL)
    wide = {**state, "blocks.1.mlp.fc1.weight": torch.zeros(512, 64)}
    refused(wide, tmp_path, r"blocks\.1\.mlp\.fc1\.weight is \[512, 64\], ours is \[256, 64\]")
    grey = {**state, "patch_embed.proj.weight": torch.zeros(64, 1, 8, 8)}
    refused(grey, tmp_path, r"patch_embed\.proj\.weight is \[64, 1, 8, 8\]; only square patches of three colours")
    oblong = {**state, "pos_embed": torch.zeros(1, 1 + 12, 64)}
    refused(oblong, tmp_path, "13 positions are no square of patches")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pos_embed": None, "reg_token": torch.zeros(1, 4, 64)}, "lacks pos_embed"),
        ({"pos_embed": None, "blocks.0.attn.relative_position_bias_table": torch.zeros(4, 1)}, "relative positions"),
        ({"cls_token": None}, r"no \[CLS\] token"),
        ({"dist_token": torch.zeros(1, 1, 64)}, "a distillation token"),
    ],
)
def test_other_kinds_of_vit_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    state = {**files.weights(MODEL), **changes}
    refused({name: value for name, value in state.items() if value is not None}, tmp_path, says)


def test_other_networks_are_refused(tmp_path: Path) -> None:
    resnet = {"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.weight": torch.ones(64),
              "layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3), "fc.weight": torch.zeros(5, 64)}  # fmt: skip
    refused(
        {"state_dict": files.prefixed("module.", resnet)}, tmp_path, r"holds a ResNet \(module\.conv1\.weight, .*not"
    )
    unknown = {f"layer_{number}.kernel": torch.zeros(2) for number in range(9)}
    refused(unknown, tmp_path, r"no Vision Transformer .* begin with layer_0\.kernel, .*, layer_4\.kernel$")
    refused({"epoch": 3, "weights": [1, 2]}, tmp_path, r"no weights under a name that is known \(student, teacher, mod")
    two = files.prefixed("image.", files.weights(MODEL)) | files.prefixed("other.", files.weights(MODEL))
    refused(two, tmp_path, r"holds 2 ViTs in one list \(image\., other\.\)")


def test_a_number_of_heads_that_cannot_be_known(tmp_path: Path) -> None:
    refused(
        files.weights(files.vit(embed_dim=48)), tmp_path, "48 channels are no multiple of 64; give the number of --h"
    )
    with pytest.raises(CheckpointError, match="64 channels are not divisible by 3 heads"):
        imported(files.weights(MODEL), "f", BASE, heads=3)


def test_missing_files_and_networks(tmp_path: Path) -> None:
    refused(tmp_path / "none.pth", tmp_path, "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "holds no checkpoint and no weights")
    with pytest.raises(CheckpointError, match="has no student, only a teacher"):
        imported({"teacher": files.weights(MODEL)}, "f", BASE, network="student")


def test_student_and_teacher_of_different_sizes() -> None:
    pair = {"student": files.weights(MODEL), "teacher": files.weights(files.vit(depth=3))}
    with pytest.raises(CheckpointError, match="student and teacher are ViTs of different sizes"):
        imported(pair, "f", BASE)
    assert imported(pair, "f", BASE, network="teacher")["config"]["model"]["depth"] == 3


def test_damage_of_any_kind_ends_in_one_line() -> None:
    """Weights dropped, doubled, emptied, reshaped or renamed: read as they are, or refused in one line."""
    rng = random.Random(0)
    sources = [
        files.smkd(MODEL, files.head()), files.mae(MODEL), files.transformers(MODEL, kind="vit"),
        files.dinov2(files.vit(layer_scale=1.0, register_tokens=4)),
    ]  # fmt: skip
    read, lines = 0, []
    for _ in range(150):
        content = copy.copy(rng.choice(sources))
        inner = rng.choice([key for key in ("student", "teacher", "model") if key in content] or [""])
        state = dict(content[inner] if inner else content)
        for name in rng.sample(sorted(state), rng.choice([1, 1, 3])):
            value = state[name]
            twice = torch.cat([value, value])
            damaged = [
                None,
                value[:0],
                value.sum(),
                value[:1],
                value.flatten(),
                value[None],
                twice,
                value.long(),
                "text",
            ]
            state[rng.choice([name, name, name + "x"])] = rng.choice(damaged)
            if rng.random() < 0.3:
                del state[name]
        content = {**content, inner: state} if inner else state
        try:
            imported(content, "f", BASE)
            read += 1
        except CheckpointError as error:
            lines.append(str(error))
    assert read > 0
    assert lines
    assert not any("\n" in line for line in lines)
