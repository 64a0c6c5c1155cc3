"""A run notices at the next start that its training images are others, says what changed, and goes on if told to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from smkd import api
from smkd.engine import checkpoint
from smkd.engine.stopping import Watch
from smkd.errors import DataError, Stopped

pytestmark = pytest.mark.slow


def run(root: Path, out: Path, *words: str) -> Path:
    words = (f"data={root}", "data.dataset=folder", f"out={out}", "validation.every=0", "batch_size=16", *words)
    return api.pretrain(api.resolve("debug-pretrain", words))


def new_class(train: Path) -> None:
    shutil.copytree(train / "train-0", train / "train-9")


def lost_class(train: Path) -> None:
    shutil.rmtree(train / "train-1")


def renamed_class(train: Path) -> None:
    (train / "train-1").rename(train / "other")


def new_image(train: Path) -> None:
    shutil.copyfile(train / "train-2" / "000.jpg", train / "train-2" / "999.jpg")


def lost_image(train: Path) -> None:
    (train / "train-2" / "000.jpg").unlink()


def other_image(train: Path) -> None:
    Image.new("RGB", (40, 36)).save(train / "train-2" / "000.jpg")


def moved_image(train: Path) -> None:
    (train / "train-2" / "000.jpg").rename(train / "train-2" / "0000.jpg")


CHANGES: dict[Callable[[Path], None], str] = {
    new_class: r"1 classes are new \(train-9\)",
    lost_class: r"1 classes are gone \(train-1\)",
    renamed_class: r"1 classes are gone \(train-1\); 1 classes are new \(other\)",
    new_image: r"1 classes have another number of images \('train-2' 12 -> 13\)",
    lost_image: r"1 classes have another number of images \('train-2' 12 -> 11\)",
    other_image: "as many images as before, but with other names or sizes",
    moved_image: "as many images as before, but with other names or sizes",
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("begun") / "run"


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_told_and_can_be_accepted(
    change: Callable[[Path], None], begun: Path, make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    root, out = make_folder(), tmp_path / "run"
    if not begun.exists():
        run(root, begun, "epochs=1")
    shutil.copytree(begun, out)
    moved = tmp_path / "elsewhere"
    change(root / "train")
    root.rename(moved)
    before = (out / "metrics.jsonl").read_text()
    with pytest.raises(DataError, match=rf"changed since this run began: {CHANGES[change]}; data\.changed=accept"):
        run(moved, out, "epochs=2")
    assert (out / "metrics.jsonl").read_text() == before
    run(moved, out, "epochs=2", "data.changed=accept")
    assert (out / "metrics.jsonl").read_text().startswith(before)
    epochs = [
        json.loads(line)["epoch"] for line in (out / "metrics.jsonl").read_text().splitlines() if '"epoch":' in line
    ]
    assert epochs == [1, 2]
    assert any("data: " in line for line in (out / "history.jsonl").read_text().splitlines())
    # and is what the run has from now on
    assert checkpoint.load_checkpoint(out / "checkpoints" / "last.pt")["epoch"] == 2
    run(moved, out, "epochs=3")


def test_moved_data_are_the_same(begun: Path, make_folder: Callable[..., Path], tmp_path: Path) -> None:
    root, out = make_folder(), tmp_path / "run"
    if not begun.exists():
        run(root, begun, "epochs=1")
    shutil.copytree(begun, out)
    run(root.rename(tmp_path / "elsewhere"), out, "epochs=2")
    assert checkpoint.load_checkpoint(out / "checkpoints" / "last.pt")["epoch"] == 2


def test_an_epoch_of_another_length_begins_anew(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = make_folder(), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "asked", lambda watch: 75 if watch.saved_at and taken(out) == 6 else 0)
        with pytest.raises(Stopped):
            run(root, out, "epochs=3", "log_every=1")
    assert checkpoint.load_checkpoint(out / "checkpoints" / "last.pt")["step_in_epoch"] == 2
    lost_class(root / "train")
    run(root, out, "epochs=3", "log_every=1", "data.changed=accept")
    lines = list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))
    # four steps an epoch before, three after: the second epoch's steps follow those of two such epochs
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 9]
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [1, 2, 3]


def taken(out: Path) -> int:
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    return sum(json.loads(line)["kind"] == "train" for line in lines)
