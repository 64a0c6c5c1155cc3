"""A data set is looked at once a run, whatever its form and however many parts of the run need it."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import foreign_files as files
import smkd
from image_forms import FORMS
from made_images import photographs
from smkd.cli import app
from smkd.config.schema import DataConfig
from smkd.data import images as images_file
from smkd.data import sources, tables
from smkd.data.datasets import open_split
from smkd.data.sources import once, opened_once
from smkd.engine.bench import measure_steps

RUN = ("epochs=2", "batch_size=8", "validation.every=1", "validation.way=2", "validation.shots=[1]",
       "validation.query=1", "validation.episodes=4", "data.dataset=folder")  # fmt: skip


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a root, a folder of class folders and a table were looked into."""
    found: Counter[str] = Counter()

    def count(place: Any, name: str) -> None:
        original = getattr(place, name)

        def counted(*args: Any, **options: Any) -> Any:
            found[f"{name} {args[0]}"] += 1
            return original(*args, **options)

        monkeypatch.setattr(place, name, counted)

    count(sources, "_look")
    count(images_file, "find_images")
    count(tables, "_rows")
    return found


@pytest.mark.parametrize("form", ["tree", "class folders", "table", "shards, .cls"])
def test_training(tmp_path: Path, looks: Counter[str], form: str) -> None:
    root = FORMS[form](tmp_path / "data")
    smkd.pretrain(smkd.resolve("debug-pretrain", [f"data={root}", f"out={tmp_path / 'run'}", *RUN]))
    assert looks[f"_look {root}"] == 1
    assert set(looks.values()) == {1}


@pytest.mark.parametrize("split_by", ["classes", "images"])
def test_adapting(tmp_path: Path, looks: Counter[str], split_by: str) -> None:
    root = FORMS["class folders"](tmp_path / "data")
    weights = files.saved(files.timm(files.vit()), tmp_path / "vit.pth")
    words = ["epochs=1", "optim.warmup_epochs=0", f"data.split_by={split_by}"]
    smkd.adapt(root, tmp_path / "run", weights, words)
    assert looks[f"_look {root}"] == 1
    assert set(looks.values()) == {1}


@pytest.mark.parametrize("form", ["tree", "table"])
def test_measuring_several_networks(tmp_path: Path, looks: Counter[str], form: str) -> None:
    root, run = FORMS[form](tmp_path / "data"), tmp_path / "run"
    smkd.pretrain(smkd.resolve("debug-pretrain", [f"data={root}", f"out={run}", *RUN]))
    looks.clear()
    words = ["eval", str(run), str(run / "checkpoints" / "last.pt"), "--way", "2", "--shot", "1", "--query", "1"]
    result = CliRunner().invoke(app, [*words, "--episodes", "4"])
    assert result.exit_code == 0, result.output
    assert looks[f"_look {root}"] == 1
    assert set(looks.values()) == {1}


def test_timing_steps(tmp_path: Path, looks: Counter[str]) -> None:
    root = FORMS["table"](tmp_path / "data")
    measure_steps(smkd.resolve("debug-pretrain", [f"data={root}", *RUN]), 1)
    assert set(looks.values()) == {1}


def test_verifying(tmp_path: Path, looks: Counter[str]) -> None:
    root = FORMS["class folders"](tmp_path / "data")
    result = CliRunner().invoke(app, ["data", "verify", str(root), "--sheets", str(tmp_path / "s"), "--processes", "1"])
    assert result.exit_code in (0, 1), result.output
    assert (tmp_path / "s" / "train.png").exists()
    assert looks[f"_look {root}"] == 1
    assert set(looks.values()) == {1}


def test_outside_a_run_every_call_looks_again(tmp_path: Path, looks: Counter[str]) -> None:
    root = photographs(tmp_path / "data", (4, 4, 4))
    config = DataConfig(root=root, split_by="images")
    before = len(open_split(config, "train").class_names)
    shutil.copytree(root / open_split(config, "train").class_names[0], root / "another")
    with opened_once():
        assert len(open_split(config, "train").class_names) == before + 1
        shutil.rmtree(root / "another")
        with opened_once():
            assert len(open_split(config, "val").class_names) == before + 1
    assert len(open_split(config, "train").class_names) == before
    assert looks[f"_look {root}"] == 4


def test_what_fails_is_tried_again() -> None:
    tries = iter([LookupError(), 5])

    def look() -> int:
        found = next(tries)
        if isinstance(found, LookupError):
            raise found
        return found

    with opened_once():
        with pytest.raises(LookupError):
            once("key", look)
        assert once("key", look) == once("key", look) == 5
