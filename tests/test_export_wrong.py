"""Wrong words, taken places, missing packages, damaged and hostile files: one line, and nothing half-written."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
import typer
from huggingface_hub.utils import HfHubHTTPError
from safetensors import safe_open
from typer.testing import CliRunner

import foreign_files as files
import smkd
from export_runs import run_folder
from smkd.cli import weights as verbs
from smkd.engine.restore import open_checkpoint
from smkd.errors import CheckpointError, ConfigError, SmkdError
from smkd.publishing.hub import push
from smkd.weights import smkd_file

app = typer.Typer()
app.command("export")(verbs.export)
NETWORK = files.vit()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("runs") / "shapes", NETWORK)


def refused(says: str, *words: str | Path) -> None:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(result.exception, SmkdError), result.output
    assert "\n" not in str(result.exception)
    with pytest.raises(SmkdError, match=says):
        raise result.exception


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--to", "onx"], r"--to onx: unknown form; did you mean 'onnx'\? \(known: timm, safetensors, onnx, torch-exp"),
        (["--to", "torchexport"], "did you mean 'torch-export'"),
        (["--to", "jpeg"], r"--to jpeg: unknown form \(known: timm"),
        (["--to", "timm", "--dynamic-size"], "--dynamic-size is for --to onnx and torch-export, not for timm"),
        (["--to", "timm", "--repo", "a/b"], "--repo is for --to hub, not for timm"),
        (["--to", "timm", "--image-size", "33"], "--image-size 33 is no whole number of patches of 8; use 32"),
        (["--to", "timm", "--image-size", "3"], "--image-size 3 is no whole number of patches of 8; use 8"),
        (["--to", "timm", "--recipe", "none"], "unknown recipe 'none'"),
    ],
)
def test_wrong_words(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str) -> None:
    monkeypatch.chdir(tmp_path)
    refused(says, run, *words)
    assert list(tmp_path.iterdir()) == []


def test_the_command_names_its_file_after_the_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for form, name in (("timm", "shapes-timm"), ("safetensors", "shapes.safetensors"), ("hub", "shapes-hub")):
        for where in (run, run / "checkpoints" / "best.pt"):
            result = CliRunner().invoke(app, [str(where), "--to", form])
            assert result.exit_code == 0, result.output
            assert result.output == f"written: {name}\n"
    path = files.saved(files.timm(NETWORK), tmp_path / "vit.pth")
    assert (
        CliRunner().invoke(app, [str(path), "--to", "safetensors", "--recipe", "debug-pretrain"]).output
        == "written: vit.safetensors\n"
    )


def test_places_that_are_taken(run: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    refused("-o '.*' is not empty and no former export; choose another, or add --overwrite", run, "--to", "timm", "-o",
            tmp_path)  # fmt: skip
    refused("is a file; this form is a folder", run, "--to", "hub", "-o", tmp_path / "notes.txt", "--overwrite")
    refused("exists and is no former export", run, "--to", "safetensors", "-o", tmp_path / "notes.txt")
    refused(r"is a folder; give a file, such as .*empty.model\.safetensors", run, "--to", "safetensors", "-o",
            tmp_path / "empty")  # fmt: skip
    files.saved(files.timm(NETWORK), tmp_path / "empty" / "model.safetensors")
    refused("is not empty and no former export", run, "--to", "timm", "-o", tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overwriting_leaves_other_files_of_a_folder(run: Path, tmp_path: Path) -> None:
    smkd.export(run, "hub", tmp_path)
    # a former export of another form: the card would be wrong
    smkd.export(run, "timm", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and no former export"):
        smkd.export(run, "hub", tmp_path)
    smkd.export(run, "hub", tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "notes.txt"
    ]  # fmt: skip


def test_a_failure_leaves_what_was_there(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = smkd.export(run, "safetensors", tmp_path / "a.safetensors").path
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for form, name in (("safetensors", "a.safetensors"), ("timm", "new"), ("hub", "new")):
        with pytest.raises(CheckpointError, match=f"cannot write '.*{name}': No space left on device"):
            smkd.export(run, form, tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_missing_packages(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    refused(r"--to onnx needs the extra: pip install 'smkd\[onnx\]'", run, "--to", "onnx", "-o", tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_sources_that_are_none(tmp_path: Path) -> None:
    refused("does not exist; expected a file, a folder", tmp_path / "none", "--to", "timm")
    (tmp_path / "empty").mkdir()
    refused("holds no checkpoint and no weights", tmp_path / "empty", "--to", "timm")
    resnet = {"conv1.weight": torch.zeros(8, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(8, 8, 3, 3)}
    refused("holds a ResNet", files.saved(resnet, tmp_path / "resnet.pth"), "--to", "timm")


def test_a_push_that_fails_keeps_the_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(self: Any, repo_id: str, **options: Any) -> None:
        raise ConnectionError("the network is down\nmore lines")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    refused("cannot push to 'org/name': the network is down; the folder is kept at '.*hub'$", run, "--to", "hub", "-o",
            tmp_path / "hub", "--repo", "org/name")  # fmt: skip
    assert (tmp_path / "hub" / "model.safetensors").is_file()


@pytest.mark.parametrize("error", [HfHubHTTPError.__bases__[0]("no way"), RuntimeError("no way"), OSError("no way")])
def test_what_the_hub_raises_is_a_line_and_a_mistake_of_ours_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise raised

    raised: Exception = error
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", failing)
    with pytest.raises(CheckpointError, match="cannot push to 'a/b': no way"):
        push(tmp_path, "a/b")
    raised = TypeError("ours")
    with pytest.raises(TypeError, match="ours"):
        push(tmp_path, "a/b")


def test_a_wrong_repository(run: Path, tmp_path: Path) -> None:
    refused("cannot push to 'a/b/c': Repo id must", run, "--to", "hub", "-o", tmp_path / "hub", "--repo", "a/b/c")


def with_header(path: Path, change: Any) -> Path:
    """The file with its header's JSON changed."""
    with safe_open(path, "pt") as file:
        values = json.loads(file.metadata()[smkd_file.KEY])
    changed = change(values)
    text = changed if isinstance(changed, str) else json.dumps(values)
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {smkd_file.KEY: text})
    return path


def put(*keys: str, value: Any) -> Any:
    def change(values: dict[str, Any]) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put("format", value=2), "is an export of format 2; this smkd reads 1"),
        (put("settings", value=None), "its header is damaged, or of another version of smkd"),
        (put("settings", "config", value={"phase": "x"}), r"its header is damaged.*config\.phase"),
        (put("settings", "config", "model", "novel", value=1), r"another version of smkd \(.*\): config\.model\.novel"),
        (put("settings", "scores", value=[[1, 2]]), "its header is damaged"),
        (put("settings", "scores", value=[["a", "b", None, "c", "d", "e"]]), "its header is damaged"),
        (put("settings", "config", "model", "num_heads", value=3), "64 channels are not divisible by 3 heads"),
        (put("settings", "config", "model", "rotary", value=True), "pos_embed"),
    ],
)
def test_headers_that_do_not_fit(run: Path, tmp_path: Path, change: Any, says: str) -> None:
    path = with_header(smkd.export(run, "safetensors", tmp_path / "a.safetensors").path, change)
    for opening in (smkd.load, smkd.from_pretrained, open_checkpoint):
        with pytest.raises(SmkdError, match=says) as caught:
            opening(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"kind": "classifier"}', "\x00"])
def test_headers_of_others_are_left_alone(run: Path, tmp_path: Path, text: str) -> None:
    """Such a file is like any other project's: read by its names, and it needs a recipe."""
    path = with_header(smkd.export(run, "safetensors", tmp_path / "a.safetensors").path, lambda values: text)
    assert torch.equal(smkd.load(path).pos_embed, NETWORK.pos_embed)
    with pytest.raises(CheckpointError, match="foreign weights need --recipe"):
        open_checkpoint(path)


def test_a_header_cannot_make_a_large_network(run: Path, tmp_path: Path) -> None:
    """What is built follows from the weights."""
    path = smkd.export(run, "safetensors", tmp_path / "a.safetensors").path
    for key in ("depth", "embed_dim", "mlp_dim", "image_size", "register_tokens"):
        with_header(path, put("settings", "config", "model", key, value=2**40))
    back = smkd.load(path)
    assert (len(back.blocks), back.embed_dim, back.grid) == (files.DEPTH, files.DIM, 4)


def test_a_missing_weight_is_named(run: Path, tmp_path: Path) -> None:
    path = smkd.export(run, "safetensors", tmp_path / "a.safetensors").path
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = safetensors.torch.load_file(path)
    del weights["blocks.1.mlp.fc2.bias"]
    safetensors.torch.save_file(weights, path, metadata)
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of the backbone: blocks\.1\.mlp\.fc2\.bias"):
        smkd.load(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="safetensors file is damaged or incomplete"):
        smkd.load(path)


def test_from_pretrained_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="'hf:not a name' is not of the form hf:owner/name"):
        smkd.from_pretrained("not a name")
    os.mkdir("empty")
    with pytest.raises(CheckpointError, match="holds no checkpoint and no weights"):
        smkd.from_pretrained("empty")
