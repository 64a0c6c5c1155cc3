"""ViTs with gated MLPs (SwiGLU) and other widths: against a slow computation, and out of each project's names."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import foreign_files as files
from foreign_files import State
from smkd import api
from smkd.engine import checkpoint
from smkd.errors import CheckpointError
from smkd.models.block import SwiGlu
from smkd.models.vit import VisionTransformer
from smkd.weights.architecture import read_architecture
from smkd.weights.load import imported

HIDDEN = 136
STORED = files.vit(swiglu=True, mlp_dim=HIDDEN, layer_scale=1.0)
ROTARY = files.vit(swiglu=True, mlp_dim=HIDDEN, layer_scale=1.0, register_tokens=4, rotary=True)
for _name, _value in ROTARY.named_parameters():
    if _name.endswith("qkv.bias"):
        _value[files.DIM : 2 * files.DIM] = 0  # keys have none in DINOv3


def test_swiglu_against_plain_loops() -> None:
    torch.manual_seed(0)
    mlp = SwiGlu(3, 4).double().requires_grad_(False)
    x = torch.randn(5, 3, dtype=torch.float64)
    (first, bias), (second, last) = ((layer.weight, layer.bias) for layer in (mlp.fc1, mlp.fc2))
    for row, image in enumerate(x):
        hidden = []
        for i in range(4):
            gate, value = (float(first[j] @ image + bias[j]) for j in (i, 4 + i))
            hidden.append(gate / (1 + math.exp(-gate)) * value)
        for out in range(3):
            expected = sum(float(second[out, i]) * hidden[i] for i in range(4)) + float(last[out])
            assert float(mlp(x)[row, out]) == pytest.approx(expected, abs=1e-12)


def named(state: State, fc1: str | tuple[str, str], fc2: str) -> State:
    """The first layer's matrix under one name, or its gate and value under two; and the second layer's."""
    found: State = {}
    for name, value in state.items():
        if ".mlp.fc2." in name or ".down_proj." in name:
            found[name.replace("fc2", fc2).replace("down_proj", fc2)] = value
        elif ".mlp.fc1." in name or ".up_proj." in name:
            parts: tuple[tuple[str, Tensor], ...] = ((str(fc1), value),)
            if isinstance(fc1, tuple):
                parts = tuple(zip(fc1, value.chunk(2), strict=True))
            found |= {name.replace("fc1", new).replace("up_proj", new): part for new, part in parts}
        else:
            found[name] = value
    return found


LAYOUTS: dict[str, tuple[VisionTransformer, Callable[[], State]]] = {
    "facebookresearch dinov2": (STORED, lambda: named(files.dinov2(STORED), "w12", "w3")),
    "timm dinov2": (STORED, lambda: files.timm(STORED)),
    "transformers dinov2": (
        STORED, lambda: named(files.transformers(STORED, kind="dinov2"), "weights_in", "weights_out")
    ),
    "facebookresearch dinov3": (ROTARY, lambda: named(files.dinov3(ROTARY), ("w1", "w2"), "w3")),
    "timm dinov3": (ROTARY, lambda: named(files.timm_dinov3(ROTARY, biases=True), ("fc1_g", "fc1_x"), "fc2")),
    "transformers dinov3": (
        ROTARY, lambda: named(files.transformers_dinov3(ROTARY), ("gate_proj", "up_proj"), "down_proj")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path: Path, name: str) -> None:
    network, layout = LAYOUTS[name]
    back = api.load(files.saved(layout(), tmp_path / "weights.pth"))
    images = torch.randn(2, 3, 32, 32)
    for one, two in zip(back(images, attention=True), network(images, attention=True), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_what_is_said_of_them() -> None:
    base = api.resolve("debug-pretrain")
    lines = imported(files.weights(STORED), "f", base)["imported"]
    assert f"LayerScale, SwiGLU, MLPs of {HIDDEN};" in lines[1]
    lines = imported(files.weights(files.vit(mlp_dim=100)), "f", base)["imported"]
    assert "patches of 8, MLPs of 100;" in lines[1]


@pytest.mark.slow
def test_they_start_a_run(tmp_path: Path) -> None:
    path = files.saved(files.timm(STORED), tmp_path / "weights.pth")
    words = ["data.limit_per_class=4", "validation.every=0", "epochs=1", "optim.lr=1e-12", "optim.lr_end=0",
             "optim.teacher_momentum=1.0", "model.embed_dim=64", "model.num_heads=1", f"init={path}",
             f"out={tmp_path / 'a'}"]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"set model\.layer_scale=1\.0 model\.mlp_dim=136 model\.swiglu=true$"):
        api.pretrain(api.resolve("debug-pretrain", words))
    words += ["model.layer_scale=1.0", "model.mlp_dim=136", "model.swiglu=true"]
    teacher = checkpoint.load_checkpoint(
        api.pretrain(api.resolve("debug-pretrain", words)) / "checkpoints" / "last.pt"
    )["teacher"]
    torch.testing.assert_close(
        teacher["backbone.blocks.1.mlp.fc1.weight"], STORED.state_dict()["blocks.1.mlp.fc1.weight"]
    )


@pytest.mark.parametrize("part", ["w1", "w2"])
def test_a_missing_half_is_named(tmp_path: Path, part: str) -> None:
    state = named(files.dinov3(ROTARY), ("w1", "w2"), "w3")
    del state[f"blocks.1.mlp.{part}.weight"]
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.(fc1|gate_proj)\.weight"):
        api.load(files.saved(state, tmp_path / "weights.pth"))


def test_heads_of_the_largest() -> None:
    """DINOv3's 7B has heads of 128 channels; nothing else in its weights says so."""
    shapes = {"patch_embed.proj.weight": (4096, 3, 16, 16), "cls_token": (1, 1, 4096), "pos_embed": (1, 5, 4096),
              "blocks.0.mlp.fc1.weight": (16384, 4096), "blocks.0.mlp.fc2.weight": (4096, 8192)}  # fmt: skip
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    architecture, _ = read_architecture(weights, "f", heads=None, rotary_side=None)
    assert (architecture.num_heads, architecture.mlp_dim, architecture.swiglu) == (32, 8192, True)
