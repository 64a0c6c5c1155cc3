"""The number of attention heads, of which weights keep no trace: stated, known, or said to be a guess."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import foreign_files as files
from classify_data import tiny_checkpoint
from smkd import api
from smkd.classify import FewShotClassifier, open_encoder
from smkd.cli import classify, fewshot, training, weights
from smkd.engine.restore import open_checkpoint
from smkd.errors import CheckpointError, SmkdError
from smkd.publishing import write
from smkd.weights.architecture import read_architecture
from smkd.weights.attention_heads import TIMM, heads_of, known_heads

BASE = api.resolve("debug-pretrain")
WIDE = files.vit(embed_dim=128, num_heads=4)


def beside(folder: Path, settings: bytes | str | dict[str, Any]) -> Path:
    """Weights of 128 channels with 4 heads, and a config.json."""
    folder.mkdir(exist_ok=True)
    files.saved(files.weights(WIDE), folder / "model.pth")
    text = json.dumps(settings) if isinstance(settings, dict) else settings
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def said(folder: Path, heads: int | None = None) -> str:
    return str(open_checkpoint(folder, BASE, heads)[0]["imported"][1])


@pytest.mark.parametrize(
    ("dim", "depth", "rotary", "heads"),
    [
        (192, 12, False, 3), (384, 12, False, 6), (384, 12, True, 6), (768, 12, False, 12), (768, 8, False, 8),
        (1024, 24, True, 16), (1280, 32, False, 16), (1280, 32, True, 20), (1408, 40, False, 16),
        (1536, 40, False, 24), (1664, 48, False, 16), (2560, 24, False, 32), (4096, 40, True, 32),
    ],
)  # fmt: skip
def test_published_vits_have_their_heads(dim: int, depth: int, rotary: bool, heads: int) -> None:
    number, source = known_heads(dim, depth, rotary, "f")
    assert number == heads
    assert source.startswith("that of ")


def test_a_huge_vit_is_recognised_from_its_shapes() -> None:
    with torch.device("meta"):
        weights = files.weights(files.VisionTransformer(patch_size=14, embed_dim=1280, depth=32, num_heads=16))
    assert read_architecture(weights, "f", heads=None, rotary_side=None)[0].num_heads == 16


def test_a_guess_is_said_to_be_one(tmp_path: Path) -> None:
    path = files.saved(files.weights(files.vit()), tmp_path / "model.pth")
    assert "1 heads, patches of 8; number of heads a guess (channels / 64; --heads sets it)" in said(path)
    assert known_heads(1280, 30, False, "f") == (16, "a guess (that of ViT-H, as wide; --heads sets it)")


@pytest.mark.parametrize(
    "settings",
    [
        b'\xef\xbb\xbf{"num_attention_heads": 4}', '{"num_attention_heads": 4}'.encode("utf-16"),
        '{"num_heads": 4}'.encode("utf-16-be"), {"num_attention_heads": "4"}, {"num_heads": 4}, {"n_heads": 4.0},
        {"model_args": {"num_heads": 4}}, {"vision_config": {"num_attention_heads": 4, "hidden_size": 128}},
        {"architecture": "vit_base_patch16_224", "model_args": {"embed_dim": 128, "num_heads": 4}},
    ],
    ids=str,
)  # fmt: skip
def test_a_settings_file_in_any_form_is_read(tmp_path: Path, settings: Any) -> None:
    assert "4 heads, patches of 8; number of heads from config.json" in said(beside(tmp_path / "a", settings))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("{", "config.json': it is not valid JSON; mend it, or give the number of --heads"),
        (b"\xff\xfe\x00", "it is not valid JSON"), ("[1]", "it is not a JSON object"), ("[" * 10**5, "not valid JSON"),
        ({"num_heads": True}, "config.json': num_heads should be a number of heads, not 'True'"),
        ({"num_heads": 0}, "not '0'"), ({"num_heads": "four"}, "not 'four'"), ({"num_heads": [4]}, r"not '\[4\]'"),
        ({"num_heads": 4, "num_attention_heads": 8}, "contradicts itself: num_attention_heads = 8, num_heads = 4"),
        ({"hidden_size": 768, "num_attention_heads": 8}, "hidden_size is 768, but the weights have 128 channels"),
        ({"architecture": "vit_huge_patch14_224"}, "vit_huge_patch14_224, which has 1280 channels, but the weights"),
        ({"num_heads": 3}, r"128 channels are not divisible by 3 heads \(from config.json\)"),
    ],
    ids=str,
)  # fmt: skip
def test_a_settings_file_that_says_nothing_good_is_named(tmp_path: Path, settings: Any, says: str) -> None:
    folder = beside(tmp_path / "a", settings)
    with pytest.raises(CheckpointError, match=says):
        said(folder)
    assert "4 heads, patches of 8; number of heads as given" in said(folder, 4)


def test_a_settings_file_without_heads_is_mentioned(tmp_path: Path) -> None:
    line = said(beside(tmp_path / "a", {"name": "x"}))
    assert "2 heads, patches of 8; number of heads a guess" in line
    assert "as config.json beside it says nothing of heads" in line


def test_names_of_timm(tmp_path: Path) -> None:
    for name, (dim, heads) in {"test_vit": (64, 2), "vit_tiny": (192, 3), "deit3_small": (384, 6)}.items():
        assert TIMM[name] == (dim, heads)
        files.saved(files.weights(files.vit(embed_dim=dim, num_heads=heads)), tmp_path / "model.pth")
        (tmp_path / "config.json").write_text(json.dumps({"architecture": f"{name}_patch16_224.augreg_in1k"}))
        assert f"{heads} heads, patches of 8; number of heads from config.json" in said(tmp_path)


def test_heads_may_be_said_wherever_weights_are_taken(tmp_path: Path) -> None:
    path = files.saved(files.weights(WIDE), tmp_path / "model.pth")
    for commands in (
        fewshot.features, fewshot.evaluate, fewshot.compare, classify.fit, classify.index, classify.app, training.adapt,
        weights.export, weights.import_,
    ):  # fmt: skip
        app = typer.Typer()
        app.command()(commands)
        assert "--heads" in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    for network in (
        api.load(path, heads=8), write.from_pretrained(path, heads=8), open_encoder(path, heads=8).backbone,
    ):  # fmt: skip
        assert network is not None
        assert network.blocks[0].attn.num_heads == 8
    assert FewShotClassifier(path, heads=8).get_params()["heads"] == 8
    written = write.export(path, "safetensors", tmp_path / "a.safetensors", heads=8).path
    assert api.load(written).blocks[0].attn.num_heads == 8
    with pytest.raises(CheckpointError, match="is of smkd and has 8 heads, not 4; leave --heads out"):
        api.load(written, heads=4)
    with pytest.raises(SmkdError, match="is a feature file: --heads 4 cannot be changed"):
        api.open_features(tmp_path / "a.h5", heads=4)


def test_a_run_knows_its_heads(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "a.pt")
    assert open_checkpoint(path, heads=2)[1] == path
    with pytest.raises(CheckpointError, match="is of smkd and has 2 heads, not 4"):
        open_checkpoint(path, heads=4)


@pytest.mark.slow
def test_a_run_says_its_heads_by_its_settings(tmp_path: Path) -> None:
    path = files.saved(files.weights(WIDE), tmp_path / "model.pth")
    words = ("data.limit_per_class=4", "validation.every=0", "epochs=1", "optim.warmup_epochs=0", "accelerator=cpu",
             "model.embed_dim=128", "model.depth=2")  # fmt: skip
    run = api.pretrain(
        api.resolve("debug-pretrain", [f"out={tmp_path / 'a'}", f"init={path}", "model.num_heads=4", *words])
    )
    assert api.load(run).blocks[0].attn.num_heads == 4


def test_other_channels_than_those_of_the_size_have_other_heads() -> None:
    base = BASE.model.model_copy(update={"size": "small", "embed_dim": 768, "depth": 12})
    found = heads_of(768, 12, rotary=False, base=base, weights=None, given=None, file="f")
    assert found == (12, "that of ViT-B")
    base = base.model_copy(update={"num_heads": 6})
    assert heads_of(768, 12, rotary=False, base=base, weights=None, given=None, file="f").number == 6
