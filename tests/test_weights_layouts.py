"""The same ViT written as each project writes it comes back with the same outputs."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import foreign_files as files
from golden_files import Golden, cases, load
from smkd import api
from smkd.config.run_config import RunConfig
from smkd.engine.restore import backbone_of, open_checkpoint
from smkd.models.vit import VisionTransformer
from smkd.weights.load import MARK, imported
from smkd.weights.read import read_weights

BASE = api.resolve("debug-pretrain")


def opened(path: Path, base: RunConfig = BASE, network: Any = "teacher") -> tuple[VisionTransformer, list[str]]:
    state, _ = open_checkpoint(path, base)
    return backbone_of(state, str(path), network)[0], state[MARK]


def same(model: VisionTransformer, other: VisionTransformer, side: int = files.SIDE) -> None:
    torch.manual_seed(2)
    images = torch.randn(2, 3, side, side)
    ours, theirs = model(images, attention=True), other(images, attention=True)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


MODEL = files.vit()
SCALED = files.vit(layer_scale=1.0, register_tokens=4)
PLAIN = {
    "smkd": (MODEL, files.smkd(MODEL, files.head())),
    "dino": (MODEL, files.training_file(files.weights(MODEL), files.weights(MODEL), files.head(),
                                        dino_loss={"center": torch.zeros(1, 32)})),
    "dino-backbone": (MODEL, files.weights(MODEL)),
    "data-parallel": (MODEL, {"state_dict": files.prefixed("module.", files.weights(MODEL))}),
    "mae": (MODEL, files.mae(MODEL)),
    "timm": (MODEL, files.timm(MODEL)),
    "timm-registers": (SCALED, files.timm_registers(SCALED)),
    "dinov2": (SCALED, files.dinov2(SCALED)),
    "dinov2-chunked": (SCALED, files.dinov2(SCALED, chunked=True)),
    "dinov2-teacher": (SCALED, {"teacher": files.prefixed("backbone.", files.dinov2(SCALED))
                                | files.prefixed("dino_head.", files.head())}),
    "transformers-vit": (MODEL, files.transformers(MODEL, kind="vit", start="vit.")),
    "transformers-new": (MODEL, files.transformers(MODEL, kind="new")),
    "transformers-dinov2": (SCALED, files.transformers(SCALED, kind="dinov2")),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_layout_gives_the_same_outputs(tmp_path: Path, name: str) -> None:
    model, content = PLAIN[name]
    back, report = opened(files.saved(content, tmp_path / "weights.pth"))
    same(back, model)
    assert "channels, 2 blocks, 1 heads, patches of 8" in "\n".join(report)


@pytest.mark.parametrize("name", ["timm", "dinov2", "transformers-vit"])
def test_safetensors_and_half_precision(tmp_path: Path, name: str) -> None:
    model, content = PLAIN[name]
    state = {key: value.contiguous() for key, value in content.items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    same(opened(tmp_path)[0], model)  # a folder as the Hub's
    safetensors.torch.save_file({key: value.half() for key, value in state.items()}, tmp_path / "half.safetensors")
    back, _ = opened(tmp_path / "half.safetensors")
    assert {value.dtype for value in back.state_dict().values()} == {torch.float32}


def test_patches_of_14_and_fitted_sizes(tmp_path: Path) -> None:
    model = files.vit(image_size=28, patch_size=14, layer_scale=1.0)
    base = api.resolve("folder-pretrain")
    back, report = opened(files.saved(files.dinov2(model), tmp_path / "a.pth"), base)
    same(back, model, 28)
    assert "evaluation.crop: 320 -> 308, whole patches of 14" in report
    assert "local_views.size: 96 -> 84, whole patches of 14" in report


def test_student_and_teacher_head_and_centres(tmp_path: Path) -> None:
    student, teacher = files.vit(), files.vit()
    for value in student.parameters():
        value.mul_(0.5)
    content = files.smkd(student, files.head())
    content["teacher"] |= files.prefixed("backbone.", files.weights(teacher))
    path = files.saved(content, tmp_path / "checkpoint0040.pth")
    same(opened(path)[0], teacher)
    state, _ = open_checkpoint(path, BASE)
    assert state["config"]["head"] | {"num_prototypes": 32, "hidden_dim": 48} == state["config"]["head"]
    assert state["config"]["head"]["num_patch_prototypes"] is None
    torch.testing.assert_close(state["teacher"]["head.mlp.2.weight"], files.head()["mlp.2.weight"])
    assert state["objective"]["cls_center"].eq(0.25).all()
    assert state["objective"]["patch_center"].eq(0.75).all()
    assert state["student"]["backbone.mask_token"].eq(0.5).all()
    assert "backbone.mask_token" not in state["teacher"]
    torch.testing.assert_close(state["student"]["backbone.norm.weight"], student.norm.weight)
    both = imported(content, "f", BASE, network="student")
    torch.testing.assert_close(both["teacher"]["backbone.norm.weight"], student.norm.weight)


def test_separate_patch_prototypes(tmp_path: Path) -> None:
    content = files.smkd(MODEL, files.head(patch=24))
    state, _ = open_checkpoint(files.saved(content, tmp_path / "a.pth"), BASE)
    assert state["config"]["head"]["num_patch_prototypes"] == 24
    assert state["teacher"]["head.last_layer2.weight_v"].shape == (24, 16)


def test_newer_weight_norm_names(tmp_path: Path) -> None:
    names = {"last_layer.weight_g": "last_layer.parametrizations.weight.original0",
             "last_layer.weight_v": "last_layer.parametrizations.weight.original1"}  # fmt: skip
    head = {names.get(name, name): value for name, value in files.head().items()}
    content = files.training_file(files.weights(MODEL), files.weights(MODEL), head)
    state, _ = open_checkpoint(files.saved(content, tmp_path / "a.pth"), BASE)
    torch.testing.assert_close(state["teacher"]["head.last_layer.weight_v"], files.head()["last_layer.weight_v"])


def test_head_with_norms_is_left_out_and_named(tmp_path: Path) -> None:
    head = files.head() | {"mlp.1.running_mean": torch.zeros(48)}
    content = files.training_file(files.weights(MODEL), files.weights(MODEL), head)
    back, report = opened(files.saved(content, tmp_path / "a.pth"))
    same(back, MODEL)
    assert "left out: head (9), optimizer, fp16_scaler" in report


def test_the_report_says_what_became_of_the_weights(tmp_path: Path) -> None:
    _, report = opened(files.saved(files.mae(MODEL), tmp_path / "mae.pth"))
    text = "\n".join(report)
    assert "mae.pth: MAE" in text
    assert "1 heads, patches of 8; number of heads a guess (channels / 64; --heads sets it)" in text
    assert "backbone: 30 weights matched, 0 of the file's names changed" in text
    assert "left out: decoder_pos_embed (1), decoder_embed (1), decoder_blocks (1)" in text
    assert "decoder_norm (1), decoder_pred (1) and 1 more" in text
    assert "new: the student's mask token" in text


def test_query_key_value_without_biases(tmp_path: Path) -> None:
    model = files.vit()
    for name, value in model.named_parameters():
        if name.endswith("qkv.bias"):
            value.zero_()
    state = {name: value for name, value in files.weights(model).items() if not name.endswith("qkv.bias")}
    back, report = opened(files.saved(state, tmp_path / "a.pth"))
    same(back, model)
    assert "query, key and value have no biases in the file (zeros)" in report


def test_heads_from_config_json(tmp_path: Path) -> None:
    model = files.vit(num_heads=4)
    files.saved(files.weights(model), tmp_path / "model.pth")
    (tmp_path / "config.json").write_text('{"architecture": "vit", "model_args": {"num_heads": 4}}')
    same(opened(tmp_path)[0], model)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    same(opened(tmp_path)[0], model)


@pytest.mark.parametrize("place", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numpy_numbers_in_the_settings(tmp_path: Path, place: bytes) -> None:
    """NumPy 1 and 2 name the maker of numbers differently."""
    args = argparse.Namespace(lr=np.float64(0.5), epochs=np.int64(3), use=np.bool_(True), w=np.float32(0.25))
    path = tmp_path / "a.pth"
    torch.save({"model": files.weights(MODEL), "args": args}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(re.sub(rb"numpy\._?core\.multiarray", place, path.read_bytes()))
    same(opened(path)[0], MODEL)
    assert vars(read_weights(path)["args"]) == {"lr": 0.5, "epochs": 3, "use": True, "w": 0.25}


def test_the_oldest_file_format(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(files.smkd(MODEL, files.head()), path, _use_new_zipfile_serialization=False)
    same(opened(path)[0], MODEL)


@pytest.mark.parametrize("path", cases("vit_plain*.npz") + cases("vit_masked*.npz"))
def test_golden_backbones(tmp_path: Path, path: Path) -> None:
    golden: Golden = load(path)
    content = {"student": files.prefixed("module.backbone.", golden.under("state"))}
    content["teacher"] = files.prefixed("backbone.", golden.under("state"))
    state = imported(content, "golden", BASE, heads=golden.options["num_heads"])
    model, _ = backbone_of(state, "golden", "student")
    for case in golden.matching(r"(.+)/x"):
        used = golden.options["masked_im_modeling"] and f"{case}/mask" in golden
        seen = model(golden.tensor(f"{case}/x"), golden.tensor(f"{case}/mask") if used else None)
        torch.testing.assert_close(
            torch.cat([seen.cls[:, None], seen.patches], 1), golden.tensor(f"{case}/tokens"), atol=2e-5, rtol=1e-4
        )


@pytest.mark.parametrize("path", cases("train_steps_*.npz"))
def test_golden_training_weights(path: Path) -> None:
    golden: Golden = load(path)
    content = {
        "student": files.prefixed("module.", golden.under("student_step3")),
        "teacher": golden.under("teacher_step3"),
        "ibot_loss": {"center": golden.tensor("center_end"), "center2": golden.tensor("center2_end")},
    }
    state = imported(content, "golden", BASE, heads=golden.options["heads"])
    for name, value in golden.under("student_step3").items():
        if "last_layer2" not in name and "masked_embed" not in name:
            torch.testing.assert_close(state["student"][name], value, rtol=0, atol=0)
    assert state["student"]["backbone.mask_token"].shape == (1, 1, golden.options["dim"])
    torch.testing.assert_close(state["objective"]["cls_center"], golden.tensor("center_end").flatten())
