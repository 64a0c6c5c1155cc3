"""A network is made once on each road, and never to find out what it would be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import foreign_files as files
import smkd
from classify_data import tiny_checkpoint
from export_runs import KINDS, run_folder
from made_images import photographs
from smkd import api
from smkd.cli import app
from smkd.config.schema import ModelConfig
from smkd.models.vit import VisionTransformer
from smkd.weights.architecture import weight_shapes


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[VisionTransformer]:
    """The networks that were made since."""
    found: list[VisionTransformer] = []
    original = VisionTransformer.__init__

    def counted(self: VisionTransformer, **options: object) -> None:
        found.append(self)
        original(self, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(VisionTransformer, "__init__", counted)
    return found


def smkd_cli(*words: str | Path) -> None:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs in `support`, a run, a checkpoint, foreign weights, an export and a file of each kind."""
    folder = tmp_path_factory.mktemp("once")
    photographs(folder / "support", (5, 4, 6))
    tiny_checkpoint(folder / "net.pt")
    run_folder(folder / "run", files.vit())
    files.saved(files.timm(files.vit()), folder / "vit.pth")
    smkd.export(folder / "run", "safetensors", folder / "vit.safetensors")
    smkd.export(folder / "run", "timm", folder / "vit-timm")
    smkd_cli("fit", folder / "support", "-o", folder / "clf.smkd", "--backbone", folder / "net.pt")
    smkd_cli("index", folder / "support", "-o", folder / "i.smkd", "--backbone", folder / "net.pt")
    return folder


@pytest.mark.parametrize("source", ["net.pt", "run", "vit.pth", "vit.safetensors", "vit-timm"])
@pytest.mark.parametrize("road", ["load", "fit", "index", "eval", "export"])
def test_from_weights(place: Path, tmp_path: Path, made: list[VisionTransformer], road: str, source: str) -> None:
    where = place / source
    if road == "load":
        smkd.load(where)
    elif road in ("fit", "index"):
        smkd_cli(road, place / "support", "-o", tmp_path / "x.smkd", "--backbone", where)
    elif road == "eval":
        recipe = "debug-pretrain" if source == "vit.pth" else None  # the others have settings of their own
        api.open_features(where, recipe=recipe, changes={"data": {"dataset": "patterns"}}).features()
    elif road == "export":
        smkd.export(where, "safetensors", tmp_path / "x.safetensors")
    assert len(made) == 1


@pytest.mark.parametrize("source", ["vit.pth", "vit.safetensors", "vit-timm"])
def test_from_pretrained(place: Path, made: list[VisionTransformer], source: str) -> None:
    backbone = smkd.from_pretrained(place / source)
    assert made == [backbone]


def test_from_files(place: Path, tmp_path: Path, made: list[VisionTransformer]) -> None:
    smkd_cli("predict", place / "clf.smkd", place / "support")
    assert len(made) == 1
    made.clear()
    smkd_cli("search", place / "i.smkd", next((place / "support").rglob("*.png")))
    assert len(made) == 1


def test_adapting(place: Path, tmp_path: Path, made: list[VisionTransformer]) -> None:
    """The one whose features are chosen, student and teacher, then what is measured before and after."""
    smkd.adapt(place / "support", tmp_path / "run", place / "vit.pth", ["epochs=1", "optim.warmup_epochs=0"])
    assert len(made) == 5


def test_a_network_is_not_drawn_to_be_replaced(place: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    smkd.load(place / "net.pt")
    assert torch.rand(1) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_known_without_a_network(kind: str) -> None:
    network = files.vit(**KINDS[kind])
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items() if name != "mask_token"}
    assert weight_shapes(network.config) == expected
    assert list(weight_shapes(network.config)) == list(expected)


@pytest.mark.parametrize("size", ["debug", "tiny", "large"])
def test_shapes_of_named_sizes(size: str) -> None:
    config = ModelConfig.model_validate({"size": size, "patch_size": 8, "image_size": 40})
    with torch.device("meta"):
        network = VisionTransformer.from_config(config)
    assert weight_shapes(config) == {name: tuple(value.shape) for name, value in network.state_dict().items()}
