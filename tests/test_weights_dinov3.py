"""ViTs with rotary positions: against a slow computation, and out of the three layouts of DINOv3."""

from __future__ import annotations

import cmath
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import foreign_files as files
from smkd import api
from smkd.engine import checkpoint
from smkd.engine.restore import backbone_of, open_checkpoint
from smkd.errors import CheckpointError, ConfigError
from smkd.models.vit import VisionTransformer

KIND = {"rotary": True, "register_tokens": 4, "layer_scale": 1.0}
HEADS = 2


def model(**changes: Any) -> VisionTransformer:
    """Keys have no bias, as in DINOv3."""
    made = files.vit(**{**KIND, **changes})
    for name, value in made.named_parameters():
        if name.endswith("qkv.bias"):
            value[files.DIM : 2 * files.DIM] = 0
    return made


def slow_tokens(net: VisionTransformer, image: Tensor) -> Tensor:
    """All tokens of one image after the last norm, in float64 with a turn per pair of channels and plain sums."""
    weight = {name: value.double() for name, value in net.state_dict().items()}
    _, height, width = image.shape
    rows, columns, size = height // files.PATCH, width // files.PATCH, files.PATCH
    tokens = [weight["cls_token"][0, 0], *weight["reg_token"][0]]
    places: list[tuple[float, float] | None] = [None] * len(tokens)
    for row in range(rows):
        for column in range(columns):
            patch = image[:, row * size : (row + 1) * size, column * size : (column + 1) * size].double()
            kernel = weight["patch_embed.proj.weight"]
            tokens.append((kernel * patch).sum(dim=(1, 2, 3)) + weight["patch_embed.proj.bias"])
            places.append((2 * (row + 0.5) / rows - 1, 2 * (column + 0.5) / columns - 1))

    def norm(x: Tensor, name: str) -> Tensor:
        spread = ((x - x.mean()) ** 2).mean()
        return (x - x.mean()) / (spread + 1e-5).sqrt() * weight[f"{name}.weight"] + weight[f"{name}.bias"]

    def turned(x: Tensor, place: tuple[float, float] | None) -> Tensor:
        if place is None:
            return x
        half, result = len(x) // 2, x.clone()
        for i in range(half):
            axis, step = divmod(i, half // 2)
            angle = 2 * math.pi * place[axis] / 100 ** (step / (half // 2))
            pair = complex(x[i], x[i + half]) * cmath.exp(1j * angle)
            result[i], result[i + half] = pair.real, pair.imag
        return result

    def linear(x: Tensor, name: str) -> Tensor:
        return weight[f"{name}.weight"] @ x + weight[f"{name}.bias"]

    channels = files.DIM // HEADS
    for number in range(files.DEPTH):
        block = f"blocks.{number}"
        parts = [linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").split(files.DIM) for x in tokens]
        mixed = [torch.zeros(files.DIM, dtype=torch.float64) for _ in tokens]
        for head in range(HEADS):
            span = slice(head * channels, (head + 1) * channels)
            q = [turned(part[0][span], place) for part, place in zip(parts, places, strict=True)]
            k = [turned(part[1][span], place) for part, place in zip(parts, places, strict=True)]
            for i in range(len(tokens)):
                scores = torch.stack([q[i] @ key for key in k]) / math.sqrt(channels)
                mixed[i][span] = sum(w * p[2][span] for w, p in zip(scores.softmax(0), parts, strict=True))
        for i, x in enumerate(tokens):
            x = x + weight[f"{block}.ls1.gamma"] * linear(mixed[i], f"{block}.attn.proj")
            hidden = torch.nn.functional.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
            tokens[i] = x + weight[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
    return torch.stack([norm(x, "norm") for x in tokens])


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 40)])
def test_rotary_positions_against_plain_loops(height: int, width: int) -> None:
    net = model(num_heads=HEADS)
    for value in net.parameters():
        value.mul_(0.5)
    image = torch.randn(3, height, width, generator=torch.Generator().manual_seed(0))
    expected = slow_tokens(net, image).float()
    seen = net(image[None])
    torch.testing.assert_close(seen.cls[0], expected[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(seen.patches[0], expected[5:], atol=2e-5, rtol=1e-4)
    last = net.last_blocks(image[None], 1)[0]
    torch.testing.assert_close(last.patches, seen.patches)
    assert last.attention is not None
    torch.testing.assert_close(last.attention, net(image[None], attention=True).attention)


NET = model()
LAYOUTS = {
    "facebookresearch": files.dinov3(NET),
    "timm": files.timm_dinov3(NET, biases=True),
    "transformers": files.transformers_dinov3(NET),
}


def opened(path: Path) -> tuple[VisionTransformer, list[str]]:
    state, _ = open_checkpoint(path, api.resolve("debug-pretrain"))
    return backbone_of(state, str(path), "teacher")[0], state["imported"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path: Path, name: str) -> None:
    back, report = opened(files.saved(LAYOUTS[name], tmp_path / "dinov3.pth"))
    images = torch.randn(2, 3, 24, 40)
    for one, two in zip(back(images, attention=True), NET(images, attention=True), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    assert "LayerScale, rotary positions; number of heads" in "\n".join(report)


def test_without_biases(tmp_path: Path) -> None:
    net = model()
    for name, value in net.named_parameters():
        if name.endswith("qkv.bias"):
            value.zero_()
    back, _ = opened(files.saved(files.timm_dinov3(net, biases=False), tmp_path / "dinov3.pth"))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(back(images).cls, net(images).cls, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_it_starts_a_run(tmp_path: Path) -> None:
    path = files.saved(LAYOUTS["facebookresearch"], tmp_path / "dinov3.pth")
    words = ["data.limit_per_class=4", "validation.every=0", "epochs=1", "optim.lr=1e-12", "optim.lr_end=0",
             "optim.teacher_momentum=1.0", "model.embed_dim=64", "model.num_heads=1", f"init={path}"]  # fmt: skip
    with pytest.raises(
        CheckpointError, match=r"set model\.register_tokens=4 model\.layer_scale=1\.0 model\.rotary=true"
    ):
        api.pretrain(api.resolve("debug-pretrain", [*words, f"out={tmp_path / 'a'}"]))
    words += ["model.rotary=true", "model.register_tokens=4", "model.layer_scale=1"]
    run = api.pretrain(api.resolve("debug-pretrain", [*words, f"out={tmp_path / 'a'}"]))
    teacher = checkpoint.load_checkpoint(run / "checkpoints" / "last.pt")["teacher"]
    torch.testing.assert_close(
        teacher["backbone.blocks.0.attn.qkv.weight"], NET.state_dict()["blocks.0.attn.qkv.weight"]
    )
    assert "backbone.pos_embed" not in teacher
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(api.load(run)(images).cls, NET(images).cls)


def test_heads_that_cannot_turn() -> None:
    with pytest.raises(ConfigError, match=r"model\.rotary needs heads of a multiple of 4 channels, not of 6"):
        VisionTransformer(embed_dim=12, num_heads=2, depth=1, rotary=True)


@pytest.mark.parametrize("name", ["blocks.0.attn.v_bias", "blocks.1.attn.qkv.weight"])
def test_a_missing_part_is_named(tmp_path: Path, name: str) -> None:
    state = {key: value for key, value in LAYOUTS["timm"].items() if key != name}
    with pytest.raises(CheckpointError, match=r"blocks\.[01]\.attn\.(q_proj\.bias|qkv\.weight)"):
        opened(files.saved(state, tmp_path / "dinov3.pth"))
