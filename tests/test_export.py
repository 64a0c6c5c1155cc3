"""Backbones as files for other libraries: the same outputs come back, and files say what is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor

import foreign_files as files
import smkd
from export_runs import KINDS, add_accuracies, run_folder
from smkd import api
from smkd.engine import checkpoint
from smkd.models.vit import VisionTransformer
from smkd.publishing.backbone import PublishedBackbone
from smkd.publishing.hub import HubBackbone
from smkd.publishing.timm import timm_settings
from smkd.weights.smkd_file import BackboneInfo

NETWORKS = {name: files.vit(**values) for name, values in KINDS.items()}


def tokens(network: VisionTransformer, side: int = files.SIDE) -> Tensor:
    """[CLS] and patch tokens of fixed images, [2, 1 + patches, dim]."""
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = network(images)
    return torch.cat([found.cls[:, None], found.patches], dim=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run_folder(tmp_path_factory.mktemp("runs") / "shapes", NETWORKS["plain"])
    add_accuracies(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["safetensors", "timm", "hub"])
def test_an_export_is_read_back(tmp_path: Path, kind: str, form: str) -> None:
    source = run_folder(tmp_path / "run", NETWORKS[kind])
    path = smkd.export(source, form, tmp_path / "out").path
    for back in (smkd.load(path), smkd.from_pretrained(path)):
        assert not back.training
        torch.testing.assert_close(tokens(back), tokens(NETWORKS[kind]), rtol=0, atol=1e-6)


def test_export_import_export_is_the_same(run: Path, tmp_path: Path) -> None:
    first = smkd.export(run, "safetensors", tmp_path / "first.safetensors").path
    again = smkd.export(first, "safetensors", tmp_path / "again.safetensors").path
    assert again.read_bytes() == first.read_bytes()
    through_hub = smkd.export(smkd.export(run, "hub", tmp_path / "hub").path, "safetensors", tmp_path / "third")
    assert through_hub.path.read_bytes() == first.read_bytes()


@pytest.mark.slow
def test_an_export_brings_the_settings_of_its_run(run: Path, tmp_path: Path) -> None:
    path = smkd.export(run, "safetensors", tmp_path / "a.safetensors").path
    # without a recipe, as a run
    mine, theirs = (api.open_features(where, changes={"evaluation": {"split": "val"}}) for where in (path, run))
    assert mine.about.parts == ("cls", "mean", "weighted_mean")
    torch.testing.assert_close(mine.features().values, theirs.features().values, rtol=0, atol=1e-6)
    words = ["data.limit_per_class=4", "validation.every=0", "epochs=1", "optim.lr=1e-12", "optim.lr_end=0",
             "optim.teacher_momentum=1.0", "model.embed_dim=64", "model.num_heads=1"]  # fmt: skip
    config = api.resolve("debug-distill", [*words, f"init={path}", f"out={tmp_path / 'next'}"])
    state = checkpoint.load_checkpoint(api.distill(config) / "checkpoints" / "last.pt")
    torch.testing.assert_close(state["teacher"]["backbone.pos_embed"], NETWORKS["plain"].pos_embed)


def test_the_student(run: Path, tmp_path: Path) -> None:
    path = smkd.export(run, "safetensors", tmp_path / "s.safetensors", network="student").path
    assert torch.equal(tokens(smkd.load(path)), tokens(smkd.load(run, "student")))
    assert not torch.equal(tokens(smkd.load(path)), tokens(smkd.load(run)))
    folder = smkd.export(run, "timm", tmp_path / "t", network="student").path
    assert torch.equal(tokens(smkd.load(folder)), tokens(smkd.load(run, "student")))


def test_another_image_size(run: Path, tmp_path: Path) -> None:
    exported = smkd.export(run, "timm", tmp_path / "t", image_size=48)
    settings = json.loads((exported.path / "config.json").read_text())
    assert settings["model_args"]["img_size"] == 48
    assert settings["pretrained_cfg"]["input_size"] == [3, 48, 48]
    back = smkd.load(exported.path)
    assert back.grid == 6
    torch.testing.assert_close(tokens(back, 48), tokens(NETWORKS["plain"], 48), rtol=0, atol=1e-6)
    assert exported.report == []


def test_a_size_that_evaluation_does_not_use_is_pointed_out(tmp_path: Path) -> None:
    source = run_folder(tmp_path / "run", NETWORKS["plain"], "evaluation.crop=40", "evaluation.resize=48")
    [line] = smkd.export(source, "timm", tmp_path / "t").report
    assert "positions are for images of 32 pixels, and `smkd eval` measures at 40: with --image-size 40" in line


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_has_the_shape_of_timm(tmp_path: Path, kind: str) -> None:
    source = run_folder(tmp_path / "run", NETWORKS[kind], "evaluation.crop=32", "evaluation.resize=40")
    folder = smkd.export(source, "timm", tmp_path / "t", license="mit").path
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    settings = json.loads((folder / "config.json").read_text())
    # what timm's save_config_for_hf writes, and its loader takes
    assert {"architecture", "num_classes", "num_features", "model_args", "pretrained_cfg"} <= settings.keys()
    assert settings["num_features"] == settings["model_args"]["embed_dim"] == files.DIM
    config = settings["pretrained_cfg"]
    assert config["crop_pct"] == 0.8
    assert (config["mean"], config["std"]) == ([0.5] * 3, [0.25] * 3)
    assert (config["first_conv"], config["classifier"], config["license"]) == ("patch_embed.proj", "head", "mit")
    rotary = KINDS[kind].get("rotary", False)
    assert settings["architecture"].endswith("dinov3_qkvb") == rotary
    assert config["fixed_input_size"] != rotary


def test_a_size_that_timm_has_needs_no_arguments(tmp_path: Path) -> None:
    network = VisionTransformer(embed_dim=192, num_heads=3, image_size=224, patch_size=16, depth=12)
    settings = timm_settings(
        PublishedBackbone(
            network,
            BackboneInfo(
                name="n",
                network="teacher",
                config=api.resolve(
                    "folder-pretrain", ["model.size=tiny", "evaluation.crop=224", "evaluation.resize=256"]
                ),
            ),
        )
    )
    assert (settings["architecture"], settings["model_args"]) == ("vit_tiny_patch16_224", {})
    assert settings["pretrained_cfg"]["crop_pct"] == 0.875


@pytest.mark.parametrize("kind", KINDS)
def test_timm_itself_takes_the_folder(tmp_path: Path, kind: str) -> None:
    timm = pytest.importorskip("timm")
    source = run_folder(tmp_path / "run", NETWORKS[kind])
    folder = smkd.export(source, "timm", tmp_path / "t").path
    settings = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    made = [timm.create_model(f"local-dir:{folder}", pretrained=True)]
    # words given to timm directly cannot say None, which turns LayerScale off
    if None not in settings["model_args"].values():
        pretrained = {**settings["pretrained_cfg"], "file": str(weights)}
        made += [
            timm.create_model(settings["architecture"], **settings["model_args"], **how)
            for how in (
                {"checkpoint_path": weights, "num_classes": 0},
                {"pretrained": True, "pretrained_cfg": pretrained},
            )
        ]
    ours = tokens(NETWORKS[kind])
    images = torch.randn(2, 3, files.SIDE, files.SIDE, generator=torch.Generator().manual_seed(0))
    for model in made:
        with torch.inference_mode():
            theirs, all_tokens = model.eval()(images), model.forward_features(images)
        torch.testing.assert_close(theirs, ours[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(all_tokens[:, -16:], ours[:, 1:], rtol=0, atol=1e-5)
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)(images).shape == (2, 7)
    assert timm.data.resolve_model_data_config(made[0])["mean"] == [0.5, 0.5, 0.5]


def test_the_card(run: Path, tmp_path: Path) -> None:
    folder = smkd.export(run, "hub", tmp_path / "hub", license="apache-2.0").path
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "smkd")
    assert card.data.model_name == "shapes"
    found = {(r.dataset_split, r.metric_name.split(":")[0]): r.metric_value for r in card.data.eval_results}
    # those of this checkpoint and of no other
    assert found == {("val", "5-way 1-shot"): 40.0, ("val", "5-way 5-shot"): 43.0, ("test", "5-way 1-shot"): 38.25}
    text = card.text
    assert "| patterns test | 5-way 1-shot | 38.25 ± 0.41 | prototype, 15 queries a class, 2000 episodes, " in text
    assert "| patterns val | 5-way 5-shot | 43.00 (no interval recorded) |" in text
    for part in ("smkd.from_pretrained(", "| recipe | debug-pretrain |", "phase 1", "lin2023smkd", "{iBOT}"):
        assert part in text
    assert "title     = {{iBOT}: Image {BERT} Pre-Training with Online Tokenizer}" in text
    # it survives the way through a file
    again = smkd.export(folder, "hub", tmp_path / "again").path
    assert (again / "README.md").read_text() == (folder / "README.md").read_text()


def test_the_card_of_other_projects_weights_claims_no_training(tmp_path: Path) -> None:
    path = files.saved(files.timm(NETWORKS["plain"]), tmp_path / "vit.pth")
    text = ModelCard.load(smkd.export(path, "hub", tmp_path / "hub").path / "README.md").text
    assert "Its weights are those of vit.pth (timm)" in text
    assert "## Training" not in text
    assert "None was recorded for these weights." in text


def test_no_path_of_this_machine_is_published(tmp_path: Path) -> None:
    words = (f"data.root={tmp_path}/photos", f"init={tmp_path}/other", f"out={tmp_path}/run", "data.dataset=folder")
    source = run_folder(tmp_path / "run", NETWORKS["plain"], *words)
    for form in ("safetensors", "timm", "hub"):
        path = smkd.export(source, form, tmp_path / form).path
        for file in [path] if path.is_file() else path.iterdir():
            assert str(tmp_path).encode() not in file.read_bytes(), file
    hub = run_folder(tmp_path / "hub-run", NETWORKS["plain"], "init=hf:org/name")
    assert "| started from | hf:org/name |" in (smkd.export(hub, "hub", tmp_path / "h").path / "README.md").read_text()


def test_push(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def create_repo(self: Any, repo_id: str, **options: Any) -> Any:
        calls.append((repo_id, options))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self: Any, *, repo_id: str, folder_path: str | Path, **options: Any) -> str:
        calls.append((repo_id, Path(folder_path)))
        assert sorted(f.name for f in Path(folder_path).iterdir()) == ["README.md", "config.json", "model.safetensors"]
        return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    written = smkd.export(run, "hub", tmp_path / "hub", repository="org/shapes")
    assert calls == [("org/shapes", {"exist_ok": True}), ("org/shapes", tmp_path / "hub")]
    assert written.report[-1] == "pushed: https://huggingface.co/org/shapes"
    card = (tmp_path / "hub" / "README.md").read_text()
    assert 'smkd.from_pretrained("org/shapes")' in card
    assert 'timm.create_model("hf-hub:org/shapes", pretrained=True)' in card
    # and by the mixin
    backbone = smkd.from_pretrained(tmp_path / "hub")
    assert backbone.push_to_hub("me/copy") == "https://huggingface.co/me/copy/commit/1"
    assert calls[-2][0] == "me/copy"


def test_the_mixin(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smkd.export(run, "hub", tmp_path / "hub")
    backbone = HubBackbone.from_pretrained(tmp_path / "hub")
    assert torch.equal(tokens(backbone), tokens(smkd.load(run)))
    with torch.no_grad():
        backbone.norm.weight.mul_(2)
    backbone.save_pretrained(tmp_path / "changed")
    assert torch.equal(tokens(smkd.load(tmp_path / "changed")), tokens(backbone))
    asked = []

    def download(*names: str, **options: Any) -> str:
        repository, name = names or (options["repo_id"], options["filename"])
        asked.append((repository, name, options.get("revision")))
        return str(tmp_path / "hub" / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    for back in (HubBackbone.from_pretrained("org/name", revision="v1"), smkd.from_pretrained("org/name", "v1")):
        assert torch.equal(tokens(back), tokens(smkd.load(run)))
    assert ("org/name", "model.safetensors", "v1") in asked
    assert torch.equal(tokens(smkd.load("hf:org/name")), tokens(smkd.load(run)))
