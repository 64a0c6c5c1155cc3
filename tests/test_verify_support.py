"""`smkd data verify --for fit` speaks of what `smkd fit` needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from smkd.cli import app
from smkd.data.verify_support import CHOICE
from smkd.errors import ConfigError


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Three classes of six images."""
    for label, name in enumerate(("bolt", "nut", "washer")):
        folder = tmp_path / "parts" / name
        folder.mkdir(parents=True)
        for number in range(6):
            pixels = np.random.default_rng((label, number)).integers(0, 255, (20, 24, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "parts"


def verified(parts: Path, *words: object) -> Result:
    command = ["data", "verify", parts, "--for", "fit", "--processes", 1, *words]
    return CliRunner().invoke(app, [str(word) for word in command])


def test_nothing_is_wrong(parts: Path) -> None:
    result = verified(parts)
    assert result.exit_code == 0
    assert result.output.splitlines()[0] == f"{parts}: 3 classes, 18 images, 6 to 6 per class"
    assert "problem" not in result.output
    assert "warning" not in result.output
    assert "split" not in result.output


def test_everything_is_wrong(parts: Path, tmp_path: Path) -> None:
    (parts / "bolt" / "0.png").write_bytes((parts / "bolt" / "0.png").read_bytes()[:200])
    shutil.copy(parts / "nut" / "1.png", parts / "bolt" / "copy.png")
    shutil.copy(parts / "nut" / "2.png", parts / "nut" / "again.png")
    for number in range(1, 6):
        (parts / "washer" / f"{number}.png").unlink()
    (parts / "screw").mkdir()
    for number in range(2):
        shutil.copy(parts / "nut" / f"{number + 3}.png", parts / "screw" / f"{number}.png")
        (parts / "nut" / f"{number + 3}.png").unlink()
    result = verified(parts, "--json", tmp_path / "r.json")
    assert result.exit_code == 1
    said = result.output
    assert "problem: 1 images cannot be read to their end, and fit stops at the first: remove them" in said
    assert "problem: 1 pictures are in more than one class: keep each in the one that it shows" in said
    assert "warning: one image of 1 classes, whose accuracy can therefore not be told: washer" in said
    assert "warning: fewer than 5 images of 1 classes, so that no head is chosen by cross-validation: screw (2)" in said
    assert "warning: 1 pictures occur more than once in a class" in said
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["classes"] == {"bolt": 6, "nut": 5, "screw": 2, "washer": 1}
    assert [[Path(name).name for name in group] for group in found["shared"]] == [["copy.png", "1.png"]]
    assert verified(parts, "--json", tmp_path / "r.json").exit_code == 1  # its own file may be replaced
    (parts / "washer" / "0.png").write_bytes(b"")
    assert "problem: no image can be read of 1 classes: washer" in verified(parts).output


def test_one_class(parts: Path) -> None:
    shutil.rmtree(parts / "nut")
    shutil.rmtree(parts / "washer")
    assert "problem: there is one class, bolt; a classifier needs at least two" in verified(parts).output


def test_what_belongs_to_training_is_refused(parts: Path) -> None:
    for words in (("--split-seed", 1), ("--dataset", "cifar-fs"), ("--sheets", parts.parent / "s")):
        result = verified(parts, *words)
        assert isinstance(result.exception, ConfigError)
        assert str(result.exception) == f"{words[0]} has no effect with --for fit; leave it out"


def test_a_choice_needs_as_many_images_as_the_classifier_says() -> None:
    from smkd.classify.left_out import SHOTS

    assert CHOICE == SHOTS
