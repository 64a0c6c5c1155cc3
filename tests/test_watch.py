"""What a run says of itself: `smkd watch`, what to do next, and pictures among its logged numbers."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from command_line import refused, smkd
from smkd import api
from smkd.data.datasets import open_split
from smkd.engine.watch import BLOCKS, WIDTH, spark

WORDS = (
    "data.limit_per_class=4", "batch_size=64", "epochs=2", "validation.every=1", "validation.episodes=9",
    "validation.query=2", "validation.shots=[1]", "head.num_prototypes=16", "log_every=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a finished run, `first`, and what it printed."""
    folder = tmp_path_factory.mktemp("watch")
    done = smkd("pretrain", "debug-pretrain", "out=first", *WORDS, cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout)
    return folder


def test_a_curve_in_a_line() -> None:
    assert spark([1, 2, 3, 4, 5, 6, 7, 8]) == BLOCKS
    assert spark([3, 3]) == "▁▁"
    assert spark([5]) == "▁"
    rng = np.random.default_rng(0)
    values = rng.normal(size=95)
    bounds = [95 * place // WIDTH for place in range(WIDTH + 1)]
    means = np.array([values[a:b].mean() for a, b in itertools.pairwise(bounds)])
    levels = ((means - means.min()) / (means.max() - means.min()) * 8).astype(int).clip(max=7)
    assert spark(values.tolist()) == "".join(BLOCKS[level] for level in levels)


@pytest.mark.slow
def test_the_state_of_a_run(folder: Path) -> None:
    lines = smkd("watch", "first", cwd=folder).stdout.splitlines()
    records = [json.loads(line) for line in (folder / "first" / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    scores = [record for record in records if record["kind"] == "validation"]
    assert lines[0] == "first: debug-pretrain on patterns, complete"
    assert lines[1] == f"epoch 2 of 2, step {train[-1]['step']}, {train[-1]['images_per_second']:.0f} images/s"
    assert lines[2].split()[0] == "loss"
    assert lines[2].split()[-1] == f"{train[-1]['loss']:.4g}"
    assert lines[2].split()[1] == spark([record["loss"] for record in train])
    last = scores[-1]
    assert lines[-1] == (
        f"  epoch 2: accuracy {last['accuracy']:.2f}, 5-way 1-shot {last['5-way 1-shot']:.2f} ± "
        f"{last['5-way 1-shot ci95']:.2f}"
    )


@pytest.mark.slow
def test_the_time_that_is_left(folder: Path, tmp_path: Path) -> None:
    """Of a run that goes on: the images that are left, at its last speed."""
    import os
    import shutil
    import socket

    shutil.copytree(folder / "first", tmp_path / "on")
    (tmp_path / "on" / ".lock").write_text(f"{socket.gethostname()} {os.getpid()}")
    text = (tmp_path / "on" / "config.yaml").read_text()
    (tmp_path / "on" / "config.yaml").write_text(text.replace("\nepochs: 2", "\nepochs: 1000"))
    records = [json.loads(line) for line in (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["kind"] == "train":
            record["images_per_second"] = 64.0
    (tmp_path / "on" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    steps = max(record["step"] for record in records) // 2
    hours, rest = divmod(998 * steps, 3600)
    assert f"{hours}:{rest // 60:02}:{rest % 60:02} left" in smkd("watch", "on", cwd=tmp_path).stdout


@pytest.mark.slow
def test_a_run_ends_with_what_to_do_next(folder: Path) -> None:
    said = (folder / "said.txt").read_text().splitlines()
    assert said[said.index("run folder: first") + 1] == "next:"
    assert said[-4].startswith("  smkd distill debug-distill init=first ")
    assert any(re.search(r"ViT of 0\.0[1-9]\d? M parameters", line) for line in said)
    assert any("5-way 1-shot" in line and " ± " in line for line in said)


@pytest.mark.slow
def test_pictures_are_logged_unless_they_are_not_wanted(folder: Path) -> None:
    def pictures(run: str) -> dict[str, list[int]]:
        events = EventAccumulator(str(folder / run / "tensorboard"), size_guidance={"images": 0})
        events.Reload()
        return {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}

    steps = [record["step"] for record in map(json.loads, (folder / "first" / "metrics.jsonl").open())
             if record["kind"] == "validation"]  # fmt: skip
    expected = dict.fromkeys(("pictures/attention", "pictures/crops", "pictures/matches"), steps)
    assert pictures("first") == expected
    done = smkd("pretrain", "debug-pretrain", "out=plain", "validation.pictures=false", *WORDS, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert pictures("plain") == {}


@pytest.mark.slow
def test_no_picture_stops_a_run(tmp_path: Path) -> None:
    """Training images without classes; and an image that cannot be read, which the run is told to skip."""
    images = open_split(api.resolve("patterns-pretrain").data, "test")
    for row in range(0, len(images), 4):
        if images.labels[row] < 10:
            place = tmp_path / "photos" / images.class_names[images.labels[row]]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.load(row).permute(1, 2, 0).numpy()).save(place / f"{row:04}.png")
    shutil.copytree(tmp_path / "photos", tmp_path / "broken")
    album = tmp_path / "album"
    album.mkdir()
    for path in (tmp_path / "photos").rglob("*.png"):
        shutil.copy(path, album / path.name)
    for place in (tmp_path / "broken").iterdir():
        min(place.iterdir()).write_bytes(b"no image")
    few = ("epochs=1", "batch_size=16", "validation.every=1", "validation.episodes=5", "validation.query=2",
           "validation.shots=[1]", "validation.way=2", "validation.data=photos")  # fmt: skip
    for name, words in (
        ("one", ("data=album",)),
        ("two", ("data=broken", "data.split_by=images", "data.on_error=skip")),
        ("three", ("data=photos", "data.split_by=images", "data.on_error=skip", "validation.data=broken")),
    ):
        done = smkd("pretrain", "patterns-pretrain", *few, *words, f"out={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "epoch 1: validation accuracy" in done.stdout


@pytest.mark.slow
def test_weights_and_biases_get_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package: what it is given, and that its steps never go back, which W&B would drop."""
    logged: list[tuple[int, dict[str, Any]]] = []
    stand_in = ModuleType("wandb")
    run = SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append((-1, {}))
    )
    stand_in.init = lambda **_: run  # type: ignore[attr-defined]
    stand_in.Image = lambda picture: ("image", picture.size)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    done = smkd("pretrain", "debug-pretrain", "out=logged", "wandb=true", *WORDS, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert logged.pop() == (-1, {})
    steps = [step for step, _ in logged]
    assert steps == sorted(steps)
    given = {name for _, values in logged for name in values}
    assert {"train/loss", "validation/accuracy", "pictures/attention", "pictures/crops", "pictures/matches"} <= given


@pytest.mark.slow
def test_eval_says_which_checkpoint_it_took_and_prints_latex(folder: Path) -> None:
    few = ("--episodes", "20", "--shot", "1")
    lines = smkd("eval", "first", *few, "--latex", cwd=folder).stdout.splitlines()
    best = max((json.loads(line) for line in (folder / "first" / "metrics.jsonl").open() if '"validation"' in line),
               key=lambda record: record["accuracy"])  # fmt: skip
    assert lines[0] == f"first: first/checkpoints/best.pt, after epoch {best['epoch']}"
    assert lines[1] == r"\begin{tabular}{lrr}"
    assert lines[-3] == r"\end{tabular}"
    assert r"$\pm$" in lines[5]
    assert "two forms" in refused("eval", "first", *few, "--latex", "--markdown", cwd=folder)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    assert "'photos' is no run" in refused("watch", "photos", cwd=tmp_path)
    assert "'nothing' does not exist" in refused("watch", "nothing", cwd=tmp_path)


def test_flags_have_no_type_in_the_help() -> None:
    for words in ((), ("eval",), ("recipes", "show"), ("data", "prepare"), ("plot", "attention"), ("fit",)):
        done = smkd(*words, "-h")
        assert done.returncode == 0
        assert "bool" not in done.stdout
        assert "--help" in done.stdout
