"""`smkd features`, `eval` and `compare` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from command_line import refused, smkd

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run `run`, its features `run.h5` and those of plain colours `pixels.h5`."""
    folder = tmp_path_factory.mktemp("fewshot")
    words = ("pretrain", "debug-pretrain", "epochs=1", "data.limit_per_class=6", "validation.every=0", "out=run")
    for done in (
        smkd(*words, "batch_size=32", cwd=folder),
        smkd("features", "run", "-o", "run.h5", cwd=folder),
        smkd("features", "pixels", "--recipe", "debug-pretrain", "-o", "pixels.h5", cwd=folder),
    ):
        assert done.returncode == 0, done.stderr
    return folder


def test_features_are_in_the_published_layout_with_their_origin(folder: Path) -> None:
    with h5py.File(folder / "run.h5") as file:
        rows, dim = file["all_feats"].shape
        assert file["all_labels"].shape == (rows,)
        assert file["count"][()].tolist() == [rows]
        assert (file.attrs["dataset"], file.attrs["split"]) == ("patterns", "test")
        assert file.attrs["transform"].startswith("resize ")
        assert len(file.attrs["checkpoint_sha256"]) == 64
        assert len(file.attrs["class_names"]) == 20
    words = ("features", "run", "--blocks", "2", "--part", "cls", "--split", "val", "--network", "student")
    done = smkd(*words, "--precision", "bf16", "-o", "other.h5", cwd=folder)
    assert done.returncode == 0, done.stderr
    with h5py.File(folder / "other.h5") as file:
        assert file["all_feats"].shape[1] == dim  # 2 blocks x 1 part instead of 1 x 2
        assert list(file.attrs["parts"]) == ["cls"]
        assert file.attrs["split"] == "val"
        assert file.attrs["blocks"].tolist() == [1, 2]


def test_a_file_gives_the_numbers_of_its_checkpoint(folder: Path) -> None:
    words = ("--shot", "1", "--shot", "5", "--query", "15", "--episodes", "50", "--head", "prototype", "--head", "tim")
    done = smkd("eval", "run", "run.h5", *words, "--json", "both.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "both.json").read_text())["results"]
    assert [r["source"] for r in results] == ["run"] * 4 + ["run.h5"] * 4
    assert [r["mean"] for r in results[:4]] == [r["mean"] for r in results[4:]]
    assert [r["transductive"] for r in results[:4]] == [False, False, True, True]
    assert done.stdout.count("5-way tim (transductive)") == 2
    assert done.stdout.count("patterns, test classes, 15 queries a class, 50 episodes, seed 0, resize") == 1


def test_protocols_and_markdown(folder: Path) -> None:
    words = ("eval", "run.h5", "--protocol", "fair600", "--shot", "1", "--way", "3", "--way", "5", "--reference-knn")
    done = smkd(*words, "--head", "knn", "--markdown", "--json", "r.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows[0] == "| source | head | 1-shot |"
    assert rows[1] == "| --- | ---: | ---: |"
    assert [row.split(" | ")[1] for row in rows[2:]] == [
        "3-way knn", "5-way knn", "3-way knn:reference=true", "5-way knn:reference=true",
    ]  # fmt: skip
    results = json.loads((folder / "r.json").read_text())["results"]
    assert all((r["query"], r["episodes"]) == (15, 600) for r in results)
    # every vote of the published count is for the first way
    assert results[3]["mean"] == pytest.approx(20, abs=0.5)
    assert results[1]["mean"] > 25


def test_joined_features_and_base_features(folder: Path) -> None:
    done = smkd("eval", "run.h5", "pixels.h5", "--concat", "--episodes", "30", cwd=folder)
    assert "run.h5 + pixels.h5" in done.stdout, done.stderr
    assert smkd("features", "run", "--split", "train", "-o", "base.h5", cwd=folder).returncode == 0
    done = smkd("eval", "run.h5", "--base", "base.h5", "--head", "simpleshot:transform=cl2n", "--episodes", "30",
                cwd=folder)  # fmt: skip
    assert "simpleshot:transform=cl2n" in done.stdout, done.stderr


def test_pictures_and_a_page(folder: Path) -> None:
    words = ("eval", "run.h5", "--shot", "1", "--shot", "3", "--episodes", "40", "--figures", "pictures")
    done = smkd(*words, "--figure-format", "svg", "--report", "page.html", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (folder / "pictures").iterdir()) == ["accuracy.svg", "confusion.svg", "episodes.svg"]
    page = (folder / "page.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 3
    assert "40 episodes" in page


def test_the_page_shows_what_was_changed_in_a_run(folder: Path) -> None:
    words = ("eval", "run", "--shot", "1", "--episodes", "40", "--report", "changed.html")
    assert smkd(*words, cwd=folder).returncode == 0
    assert "Changes since the start" not in (folder / "changed.html").read_text()
    lines = ['{"step": 6, "changes": ["resume_with: optim.lr=1e-5", "epochs: 2 -> 3"]}', "{cut", '{"step": 9}']
    history = folder / "run" / "history.jsonl"
    history.write_text("\n".join(lines))
    try:
        assert smkd(*words, cwd=folder).returncode == 0
    finally:
        history.unlink()
    page = (folder / "changed.html").read_text()
    assert "Changes since the start" in page
    for change in ("resume_with: optim.lr=1e-5", "epochs: 2 -&gt; 3"):
        assert f"<td>run</td><td>6</td><td>{change}</td>" in page


def test_comparison(folder: Path) -> None:
    done = smkd("compare", "run.h5", "pixels.h5", "--query", "15", "--episodes", "100", "--json", "c.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "c.json").read_text())
    assert (found["first"], found["second"]) == ("run.h5", "pixels.h5")
    assert [c["shot"] for c in found["comparisons"]] == [1, 5]
    assert done.stdout.count("5-way 1-shot: ") == 1
    done = smkd("compare", "run.h5", "--head", "prototype", "--head", "ridge", "--shot", "5", "--query", "15",
                "--episodes", "100", "--markdown", cwd=folder)  # fmt: skip
    assert "|  | prototype | ridge | difference | better in | equal in |" in done.stdout, done.stderr
    assert "5-way 5-shot: " in done.stdout


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["eval", "run.h5", "--way", "21"], ["way=21", "only 20 classes"]),
        (["eval", "run.h5", "--shot", "90", "--query", "15"], ["class '", "images, but shot=90 and query=15"]),
        (["eval", "run.h5", "--query", "some"], ["query=some"]),
        (["eval", "run.h5", "--head", "protoype"], ["head 'protoype' is unknown; did you mean 'prototype'?"]),
        (["eval", "run.h5", "--head", "simpleshot:transform=cl2n"], ["cl2n needs the features", "--base"]),
        (["eval", "run.h5", "--split", "val"], ["'run.h5' holds features of test classes, not of val"]),
        (["eval", "run.h5", "--resize", "40"], ["'run.h5' is a feature file", "resize=40"]),
        (["eval", "nowhere.h5"], ["'nowhere.h5' does not exist"]),
        (["eval", "cut.h5"], ["cut.h5", "cut short"]),
        (["eval", "other-layout.h5"], ["it holds weights; expected all_feats, all_labels, count"]),
        (["eval", "nan.h5"], ["2 of 40 rows are NaN or infinite (rows 3, 17"]),
        (["eval", "run.h5", "short.h5", "--concat"], ["not features of the same images"]),
        (["eval", "run.h5", "--json", "no/folder.json"], ["--json: cannot write 'no/folder.json'"]),
        (["compare", "run.h5"], ["compare takes two sources, or one source and two heads, not 1 and 0"]),
        (["compare", "run.h5", "short.h5"], ["not features of the same images"]),
        (["features", "run.h5", "-o", "again.h5"], ["'run.h5' is a feature file already"]),
        (["features", "nowhere", "-o", "x.h5"], ["'nowhere' does not exist"]),
    ],
)
def test_wrong_input_is_one_line(folder: Path, words: list[str], parts: list[str]) -> None:
    make_wrong_files(folder)
    line = refused(*words, cwd=folder)
    for part in parts:
        assert part in line


def make_wrong_files(folder: Path) -> None:
    (folder / "cut.h5").write_bytes((folder / "run.h5").read_bytes()[:-5000])
    with h5py.File(folder / "other-layout.h5", "w") as file:
        file["weights"] = np.zeros(3)
    for name, rows in (("nan.h5", 40), ("short.h5", 30)):
        values = np.random.default_rng(0).normal(size=(rows, 8)).astype(np.float32)
        if name == "nan.h5":
            values[[3, 17]] = np.nan
        with h5py.File(folder / name, "w") as file:
            file["all_feats"], file["all_labels"], file["count"] = values, np.arange(rows) % 5, [rows]
