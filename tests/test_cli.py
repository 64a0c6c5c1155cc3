"""The command line as a user meets it, wrong input above all."""

from __future__ import annotations

import gc
import json
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import typer

from command_line import refused, smkd, smkd_process
from smkd.cli import VERBS, app
from smkd.errors import ConfigError

DEBUG = ("debug-pretrain", "epochs=1", "data.limit_per_class=6", "validation.every=0", "batch_size=32")


def test_a_command_within_a_process_leaves_its_garbage_collection_alone() -> None:
    before = gc.get_freeze_count()
    assert smkd("recipes").returncode == 0
    assert gc.get_freeze_count() == before


@pytest.mark.slow
def test_help_answers_at_once() -> None:
    done = smkd_process("--help")
    assert done.returncode == 0
    assert all(
        verb in done.stdout for verb in ("pretrain", "distill", "features", "eval", "compare", "demo", "recipes")
    )
    # not the clock but the cause: these take seconds to import
    code = (
        "import sys, smkd, smkd.cli; sys.exit(bool({'torch', 'matplotlib', 'pydantic', 'sklearn'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("smkd.load", {"rich", "httpx", "httpx2", "h5py", "PIL", "sklearn", "torch._dynamo"}),
        ("import smkd.classify.classifier", {"httpx", "httpx2", "sklearn", "scipy", "pandas", "torch._dynamo"}),
    ],
)
def test_what_loads_slowly_is_loaded_where_it_is_needed(code: str, unwanted: set[str]) -> None:
    code = f"import smkd, sys; {code}; print(*({unwanted} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "\n"


def test_version() -> None:
    assert smkd("--version").stdout.strip() == metadata.version("smkd")


def test_recipes_are_listed_and_shown() -> None:
    listed = smkd("recipes").stdout
    assert "mini-imagenet-distill" in listed
    assert "extends: mini-imagenet-pretrain" in smkd("recipes", "show", "mini-imagenet-distill").stdout
    assert "num_prototypes: 8192" in smkd("recipes", "show", "mini-imagenet-distill", "--resolved").stdout


@pytest.mark.slow
def test_a_run_and_its_evaluation(tmp_path: Path) -> None:
    done = smkd_process("pretrain", *DEBUG, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "run folder: runs/debug-pretrain" in done.stdout
    again = smkd("pretrain", *DEBUG, cwd=tmp_path)
    assert "already complete" in again.stdout
    words = ("eval", "runs/debug-pretrain", "--shot", "2", "--query", "all", "--episodes", "30", "--json", "r.json")
    measured = smkd(*words, cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    assert "2-shot" in measured.stdout
    assert "5-way prototype" in measured.stdout
    assert "patterns, test classes, all other images, 30 episodes, seed 0" in measured.stdout
    result = json.loads((tmp_path / "r.json").read_text())["results"][0]
    assert (result["shot"], result["query"], result["episodes"], result["split"]) == (2, "all", 30, "test")
    assert f"{result['mean']:.2f} ± {result['ci95']:.2f}" in measured.stdout


def test_floors_need_a_recipe(tmp_path: Path) -> None:
    assert "--recipe" in refused("eval", "pixels")
    done = smkd("eval", "random", "--recipe", "debug-pretrain", "--episodes", "20")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["pretrain", "debug-pretrian"], ["unknown recipe 'debug-pretrian'", "'debug-pretrain'"]),
        (["pretrain", "debug-pretrain", "optim.lrr=1"], ["unknown key 'optim.lrr'", "'optim.lr'"]),
        (["pretrain", "debug-pretrain", "epochs=many"], ["epochs=many", "integer"]),
        (["pretrain", "debug-pretrain", "global_views.size=4"], ["global_views.size=4", "smaller than one patch"]),
        (["pretrain", "debug-pretrain", "local_views.size=20"], ["local_views.size=20", "patch_size=8"]),
        (["pretrain", "folder-pretrain"], ["data="]),
        (["pretrain", "folder-pretrain", "data=nowhere"], ["'nowhere' does not exist"]),
        (["pretrain", "debug-pretrain", "data.dataset=pattern"], ["data.dataset=pattern", "'patterns'"]),
        (["pretrain", "debug-pretrain", "batch_size=9999"], ["batch_size=9999", "1280 images"]),
        (["pretrain", "debug-pretrain", "precision=fp16", "accelerator=cpu"], ["precision=fp16", "CUDA"]),
        (["eval", "nowhere"], ["'nowhere' does not exist"]),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, words: list[str], parts: list[str]) -> None:
    line = refused(*words, cwd=tmp_path)
    for part in parts:
        assert part in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_missing_device_is_named(tmp_path: Path) -> None:
    assert "accelerator=cuda: there is no such device here" in refused(
        "pretrain", "debug-pretrain", "accelerator=cuda", cwd=tmp_path
    )


def test_wrong_folders_are_named(tmp_path: Path, make_folder) -> None:
    root = make_folder(classes=6, images=4)
    words = ("pretrain", "debug-pretrain", "data.dataset=folder", "batch_size=8", "out=run")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert "holds no images" in refused(*words, "data=empty", cwd=tmp_path)
    (tmp_path / "half" / "train" / "cats").mkdir(parents=True)
    assert "holds no images" in refused(*words, "data=half", cwd=tmp_path)
    (root / "train" / "train-0").rename(tmp_path / "aside")
    (root / "train" / "train-0").mkdir()
    assert "train-0' holds no images" in refused(*words, f"data={root}", cwd=tmp_path)


def test_classes_too_small_for_the_protocol_are_named_before_training(tmp_path: Path, make_folder) -> None:
    root = make_folder(classes=6, images=12)
    for label in ("val-3", "val-4"):
        for image in sorted((root / "val" / label).iterdir())[8:]:
            image.unlink()
    words = ("pretrain", "debug-pretrain", "data.dataset=folder", f"data={root}", "batch_size=8", "out=run",
             "data.limit_per_class=null")  # fmt: skip
    line = refused(*words, cwd=tmp_path)
    assert "class 'val-3' of the val split has 8 images, but shot=1 and query=10 need at least 11" in line
    assert "4 classes have so many, and way=5; set validation.query=7, or train without measuring" in line


@pytest.mark.slow
@pytest.mark.parametrize("where", [("num_workers=2",), ("devices=2", "accelerator=cpu", "num_workers=0")])
def test_a_corrupt_image_is_one_line_from_any_process(tmp_path: Path, make_folder, where: tuple[str, ...]) -> None:
    root = make_folder(classes=6, images=4)
    broken = root / "train" / "train-2" / "001.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    words = ("pretrain", "debug-pretrain", "data.dataset=folder", f"data={root}", "batch_size=8", "validation.every=0")
    done = smkd_process(*words, *where, f"out={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"smkd: cannot read image '{broken}'" in done.stderr
    assert "data.on_error=skip" in done.stderr


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ConfigError, match="unknown recipe"):  # and the interpreter prints it
        smkd("pretrain", "nothing", "--debug")


@pytest.mark.parametrize(("name", "example"), [(name, example) for name, _, example in VERBS])
def test_every_verb_has_help_and_an_example_that_it_takes(name: str, example: str) -> None:
    verb = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    verb.make_context(name, shlex.split(example))  # parses the words, runs nothing
    shown = smkd(name, "-h").stdout
    assert f"Example: smkd {name} {example}".rstrip() in " ".join(shown.split())
    assert shown == smkd(name, "--help").stdout
    arguments = re.findall(r"\{(.*?)\}", shown.split("Usage:")[1].split("\n\n")[0])
    assert all(each == each.upper() for each in arguments)
