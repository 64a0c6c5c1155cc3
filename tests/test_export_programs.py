"""Backbones as programs: onnxruntime and a reloaded PyTorch program compute what PyTorch and `smkd features` do."""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import foreign_files as files
import smkd
from export_runs import ROTARY, run_folder
from smkd import api
from smkd.data.datasets import open_split
from smkd.errors import CheckpointError, ConfigError
from smkd.models.vit import VisionTransformer, resized_positions
from smkd.publishing import program
from smkd.publishing.feature_graph import AnySizeVisionTransformer, resampling
from smkd.publishing.place import Exported, check_free

pytestmark = pytest.mark.slow

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

KINDS = {"stored": files.vit(register_tokens=4, layer_scale=1.0), "rotary": files.vit(**ROTARY)}
SIZES = {False: [(32, 32)], True: [(32, 32), (40, 64), (16, 24)]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {kind: run_folder(folder / kind, network) for kind, network in KINDS.items()}


@pytest.fixture(scope="module")
def exported(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Programs, each made once: making one takes seconds."""

    @functools.cache
    def make(form: str, kind: str, dynamic: bool) -> Exported:
        folder = tmp_path_factory.mktemp("made")
        written = smkd.export(runs[kind], form, folder / "program", dynamic_size=dynamic)
        assert [file.name for file in folder.iterdir()] == ["program"]
        return written

    return make


def expected(network: VisionTransformer, images: Tensor) -> list[Tensor]:
    """By hand: the recipe's normalisation, and each part of each of the last two blocks with length 1."""
    with torch.inference_mode():
        blocks = network.last_blocks((images.float() / 255 - 0.5) / 0.25, 2)
    vectors: list[Tensor] = [tokens.cls for tokens in blocks]
    vectors += [tokens.patches.mean(dim=1) for tokens in blocks]
    for tokens in blocks:
        assert tokens.attention is not None
        weights = tokens.attention.mean(dim=1)[:, -tokens.patches.shape[1] :]
        vectors.append((weights[..., None] * tokens.patches).sum(dim=1) / weights.sum(dim=1, keepdim=True))
    features = torch.cat([vector / vector.norm(dim=1, keepdim=True) for vector in vectors], dim=1)
    return [features, blocks[-1].cls, blocks[-1].patches]


def close(outputs: Any, network: VisionTransformer, images: Tensor, tolerance: float) -> None:
    for mine, theirs in zip(outputs, expected(network, images), strict=True):
        torch.testing.assert_close(torch.as_tensor(mine), theirs, rtol=0, atol=tolerance)


def batches(dynamic: bool) -> list[Tensor]:
    noise = torch.Generator().manual_seed(5)
    return [
        torch.randint(256, (count, 3, *size), generator=noise, dtype=torch.uint8)
        for size in SIZES[dynamic]
        for count in (1, 3, 8)
    ]


@pytest.mark.parametrize(("kind", "dynamic"), [("stored", True), ("rotary", False)])
def test_onnx(exported: Callable[..., Exported], kind: str, dynamic: bool) -> None:
    written = exported("onnx", kind, dynamic)
    assert written.report[0].startswith("checked: onnxruntime and PyTorch differ by at most ")
    session = onnxruntime.InferenceSession(str(written.path))
    for images in batches(dynamic):
        close(session.run(None, {"images": images.numpy()}), KINDS[kind], images, 1e-4)
    model = onnx.load(written.path)
    sides = [dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert sides == (["batch", 3, "height", "width"] if dynamic else ["batch", 3, 32, 32])
    assert [output.name for output in model.graph.output] == ["features", "cls", "patch_tokens"]
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(notes["mean"]) == [0.5] * 3
    assert (notes["resize"], notes["crop"], notes["interpolation"]) == ("32", "32", "bicubic")
    assert "uint8 RGB" in notes["input"]


@pytest.mark.parametrize(("kind", "dynamic"), [("stored", False), ("rotary", True)])
def test_torch_export(exported: Callable[..., Exported], kind: str, dynamic: bool) -> None:
    written = exported("torch-export", kind, dynamic)
    assert "the reloaded program and PyTorch differ by at most" in written.report[0]
    notes = {"smkd.json": ""}
    program = torch.export.load(written.path, extra_files=notes).module()
    for images in batches(dynamic):
        close(program(images), KINDS[kind], images, 2e-6 if dynamic else 1e-6)
    assert json.loads(notes["smkd.json"])["crop"] == 32


def test_features_are_those_of_the_package(runs: dict[str, Path], exported: Callable[..., Exported]) -> None:
    path = exported("onnx", "stored", True).path
    opened = api.open_features(runs["stored"], changes={"evaluation": {"split": "val"}, "precision": "fp32"})
    images = open_split(api.resolve("debug-pretrain").data, "val")
    pixels = np.stack([images.load(index).numpy() for index in range(40)])
    features = onnxruntime.InferenceSession(str(path)).run(["features"], {"images": pixels})[0]
    np.testing.assert_allclose(features, opened.features().values[:40].numpy(), atol=1e-5)


def test_a_program_is_for_the_size_that_evaluation_uses(tmp_path: Path) -> None:
    source = run_folder(tmp_path / "run", KINDS["stored"], "evaluation.crop=40", "evaluation.resize=48")
    path = smkd.export(source, "torch-export", tmp_path / "a.pt2").path
    images = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    close(torch.export.load(path).module()(images), KINDS["stored"], images, 1e-6)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 17])
@pytest.mark.parametrize("native", [False, True])
def test_resampling_is_that_of_the_backbone(count: int, native: bool) -> None:
    """Against `interpolate`, one axis after the other."""
    torch.manual_seed(0)
    stored = torch.randn(1, 17, 5)
    weights = resampling(count, 4, torch.tensor(native))
    if native:
        assert torch.equal(weights[:4, :4], torch.eye(4)[:count])
        return
    grid = torch.einsum("ri,cj,ijd->rcd", weights, weights, stored[0, 1:].unflatten(0, (4, 4)))
    torch.testing.assert_close(grid.flatten(0, 1), resized_positions(stored, count, count)[0, 1:], atol=1e-5, rtol=0)


def test_any_size_has_the_positions_of_the_backbone() -> None:
    network = files.vit()
    twin = AnySizeVisionTransformer(image_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1)
    twin.load_state_dict(network.state_dict())
    # native; native in patches but not in pixels; as many patches in another shape
    for height, width in ((32, 32), (33, 33), (33, 32), (16, 64), (48, 24)):
        torch.testing.assert_close(twin.positions(height, width), network.positions(height, width), atol=3e-6, rtol=0)
    assert torch.equal(twin.positions(32, 32), network.pos_embed)
    assert not torch.equal(twin.positions(33, 32), network.pos_embed)


def test_a_program_that_is_off_is_refused(
    runs: dict[str, Path], exported: Callable[..., Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = exported("onnx", "stored", True).path.read_bytes()
    (tmp_path / "a.onnx").write_bytes(good)
    real = onnxruntime.InferenceSession.run

    def wrong(self: Any, *arguments: Any) -> Any:
        features, *others = real(self, *arguments)
        return [features + np.float32(3e-4), *others]

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", wrong)
    with pytest.raises(
        CheckpointError, match=r"--to onnx: onnxruntime differs from PyTorch by 3\.0e-04 \(at most 1e-04"
    ):
        smkd.export(runs["stored"], "onnx", tmp_path / "a.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]
    assert (tmp_path / "a.onnx").read_bytes() == good


def test_a_difference_that_is_no_number_is_refused() -> None:
    with pytest.raises(CheckpointError, match="the program differs from PyTorch by nan"):
        program.checked_line("onnx", float("nan"), 1.0, several_sizes=False, by="the program")


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_a_former_program_may_be_replaced_and_another_file_not(
    exported: Callable[..., Exported], tmp_path: Path, form: str
) -> None:
    free = functools.partial(check_free, is_folder=False, suffix="", overwrite=False)
    free(exported(form, "rotary", form != "onnx").path)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []), producer_name="pytorch"), tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "b", "w") as file:
        file.writestr("program/data.json", "{}")
    (tmp_path / "c").write_bytes(b"smkd export of a backbone: smkd.json")
    for path in tmp_path.iterdir():
        with pytest.raises(ConfigError, match=r"exists and is no former export; choose another, or add --overwrite"):
            free(path)
        check_free(path, is_folder=False, suffix="", overwrite=True)


def test_weights_beyond_what_one_file_holds(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "LIMIT", 1000)
    with pytest.raises(ConfigError, match="GB of weights, one ONNX file holds 2; use --to torch-export"):
        smkd.export(runs["stored"], "onnx", tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []
