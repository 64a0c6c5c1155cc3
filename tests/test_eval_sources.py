"""What `eval`, `compare` and `features` say of their sources: splits, classes that are too small, data that moved."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from classify_data import tiny_checkpoint, tiny_network
from conftest import MakeFolder
from smkd import api, fewshot
from smkd.cli import app
from smkd.config import loading
from smkd.config.loading import resolve
from smkd.engine import checkpoint
from smkd.errors import SmkdError
from smkd.fewshot.validation import FewShotValidation

FEW = ("--way", "3", "--query", "4", "--episodes", "5", "--shot", "1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def done(*words: str | Path) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def refused(*words: str | Path) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(result.exception, SmkdError), (result.output, result.exception)
    return str(result.exception)


def feature_file(path: Path, sizes: list[int], split: str = "") -> Path:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    with h5py.File(path, "w") as file:
        file["all_feats"] = np.random.default_rng(0).normal(size=(len(labels), 8)).astype(np.float32)
        file["all_labels"], file["count"] = labels, [len(labels)]
        if split:
            file.attrs["split"] = split
    return path


def results(path: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(Path(path).read_text())["results"]
    return found


@pytest.mark.slow
def test_every_source_is_measured_on_the_split_that_is_asked_for(folder: Path) -> None:
    for split in ("val", "train"):
        feature_file(folder / f"{split}.h5", [9] * 4, split)
    tiny_checkpoint(folder / "net.pt")
    done("eval", "val.h5", "net.pt", "val.h5", "net.pt", *FEW, "--split", "val", "--json", "r.json")
    assert [result["split"] for result in results("r.json")] == ["val"] * 4
    means = [result["mean"] for result in results("r.json")]
    assert means[:2] == means[2:]
    done("eval", "net.pt", *FEW, "--split", "test", "--json", "r.json")
    assert results("r.json")[0]["mean"] != means[1]
    for words in (
        ("eval", "val.h5", "train.h5"),
        ("eval", "val.h5", "net.pt", "train.h5"),
        ("compare", "val.h5", "train.h5"),
    ):
        assert "'train.h5' holds features of train classes, not of val" in refused(*words, "--split", "val", *FEW)


def test_what_is_asked_of_one_source_is_asked_of_the_next(folder: Path) -> None:
    changes = {"evaluation": {"split": "val", "resize": None}, "data": {"root": None}}
    for _ in range(2):
        opened = api.open_features(feature_file(folder / "a.h5", [3, 3], "val"), changes=changes)
        assert opened.protocol.split == "val"
    assert changes == {"evaluation": {"split": "val", "resize": None}, "data": {"root": None}}
    with pytest.raises(SmkdError, match=r"evaluation\.resize=40 cannot be changed"):
        api.open_features(folder / "a.h5", changes={"evaluation": {"split": "val", "resize": 40}})


def test_classes_that_are_too_small_fall_out_and_are_named(folder: Path) -> None:
    feature_file(folder / "u.h5", [30, 4, 40, 25, 9, 30])
    words = ("--way", "3", "--query", "15", "--episodes", "20", "--json", "u.json", "--shot", "1", "--shot", "5")
    said = done("eval", "u.h5", *words, "--split", "val")
    for needed, shot in ((16, 1), (20, 5)):
        assert (
            f"u.h5: 2 of 6 classes fall out, as shot={shot} and query=15 need {needed} images of a class: "
            "'class 1' (4), 'class 4' (9)"
        ) in said
    assert all("'class 1' (4)" in str(result["without"]) for result in results("u.json"))
    assert [result["split"] for result in results("u.json")] == ["val", "val"]  # the file itself does not say
    said = done("compare", "u.h5", "--head", "knn", "--head", "ridge", *words)
    assert said.count("2 of 6 classes fall out") == 2
    line = refused("eval", "u.h5", "--way", "5", "--query", "15")
    assert "class 'class 1' of the test split has 4 images" in line
    assert "4 classes have so many, and way=5; set query=8" in line
    assert "fall out" not in done("eval", "u.h5", *FEW, "--query", "3")


def test_python_warns_of_classes_that_are_too_small() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(["ant", "bee", "cat", "dog"], [20, 20, 3, 20])
    features = rng.normal(size=(63, 4))
    with pytest.warns(UserWarning, match=r"1 of 4 classes fall out.* 'cat' \(3\)"):
        result = fewshot.evaluate(features, labels, way=3, query=5, episodes=20)
    assert result.class_names == ["ant", "bee", "dog"]
    rest = labels != "cat"
    assert fewshot.evaluate(features[rest], labels[rest], way=3, query=5, episodes=20).mean == result.mean


def test_validation_says_which_classes_fall_out(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    photos = make_folder(classes=4, images=6)
    for file in sorted((photos / "val" / "val-2").iterdir())[2:]:
        file.unlink()
    words = [f"data={photos}", "validation.way=3", "validation.shots=[1]", "validation.query=4"]
    FewShotValidation().check(resolve("folder-pretrain", words))
    assert "validation: 1 of 4 classes fall out" in capsys.readouterr().out
    with pytest.raises(SmkdError, match="class 'val-2' of the val split has 2 images"):
        FewShotValidation().check(resolve("folder-pretrain", [*words, "validation.way=4"]))


def test_features_name_the_classes_of_which_no_image_can_be_read(folder: Path, make_folder: MakeFolder) -> None:
    photos = make_folder(classes=3, images=3)
    for file in (photos / "test" / "test-1").iterdir():
        file.write_bytes(file.read_bytes()[:60])
    words = ("features", "pixels", "--data", photos, "-o", "p.h5", "--recipe")
    assert "data.on_error=skip" in refused(*words, "folder-pretrain")
    (folder / "skips.yaml").write_text("extends: folder-pretrain\ndata: {on_error: skip}\n")
    said = done(*words, "skips.yaml")
    assert "p.h5: 6 features of 768 numbers, 2 classes" in said
    assert "1 classes fall out, as none of their images can be read: test-1" in said
    said = done("eval", "p.h5", "--way", "2", "--query", "1", "--shot", "1", "--episodes", "3")
    assert "'test-1' (0)" in said


def test_a_run_whose_data_moved_says_how_to_find_them(folder: Path, make_folder: MakeFolder) -> None:
    make_folder(classes=5, images=6).rename(folder / "moved")
    weights = {f"backbone.{name}": value for name, value in tiny_network().state_dict().items()}
    words = ["data.dataset=folder", "data=photos", "accelerator=cpu", "evaluation.resize=32", "evaluation.crop=32"]
    config = resolve("debug-pretrain", words).model_dump(mode="json")
    checkpoint.save_checkpoint({"teacher": weights, "config": config}, folder / "net.pt")
    for verb in (("eval", "net.pt"), ("features", "net.pt", "-o", "x.h5"), ("compare", "net.pt", "net.pt")):
        line = refused(*verb)
        assert f"'net.pt' has its images in 'photos', which does not exist in '{folder}'" in line
        assert line.endswith("say where they are: --data FOLDER")
    done("eval", "net.pt", "--data", "moved", *FEW)
    assert "--data FOLDER" in refused("eval", "net.pt", "--data", "nowhere")
    assert "--data FOLDER" in refused("eval", "pixels", "--recipe", "folder-pretrain")


def test_the_same_folder_by_another_path_is_the_same(folder: Path) -> None:
    (folder / "photos").mkdir()
    (folder / "link").symlink_to("photos")
    (folder / "start.pt").touch()
    words = ["data=photos", "data.split_file=photos/split.csv", "init=start.pt"]
    first = resolve("folder-distill", words)
    for root in (folder / "photos", "./photos", "photos/../photos/", "link", folder / "link"):
        given = [f"data={root}", f"data.split_file={root}/split.csv", f"init={folder / 'start.pt'}"]
        assert loading.differences(first, resolve("folder-distill", given)) == []
    (folder / "other").mkdir()
    other = resolve("folder-distill", ["data=other", *words[1:]])
    assert loading.differences(first, other, free=True) == ["data.root: photos -> other"]
