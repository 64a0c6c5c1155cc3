"""`smkd fit`, `predict`, `index` and `search` as a user meets them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from classify_data import blobs, tiny_checkpoint
from conftest import MakeFolder
from made_images import photographs
from smkd.classify import FewShotClassifier
from smkd.cli import classify as verbs
from smkd.errors import SmkdError
from smkd.fewshot.candidates import numbered, written

app = typer.Typer()
for verb in (verbs.fit, verbs.predict, verbs.index, verbs.search):
    app.command(verb.__name__)(verb)


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def done(*words: str | Path) -> list[str]:
    result = run(*words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout.splitlines()


def refused(*words: str | Path) -> str:
    result = run(*words)
    assert isinstance(result.exception, SmkdError), (result.output, result.exception)
    message = str(result.exception)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verbs")
    photographs(folder / "support", (5, 6, 7))
    photographs(folder / "rest", (4, 4, 4, 4), skip=7)
    tiny_checkpoint(folder / "net.pt")
    done("fit", folder / "support", "-o", folder / "clf.smkd", "--backbone", folder / "net.pt")
    return folder


def test_fit_says_what_it_reads_of_the_backbone(place: Path, tmp_path: Path) -> None:
    words = ("fit", place / "support", "--backbone", place / "net.pt", "--json", tmp_path / "a.json")
    for given, line in (
        ((), "(chosen by cross-validation)"), (("--features", "own"), "2:cls+weighted_mean (what its run says)"),
        (("--features", "1+2:cls"), "features: 1+2:cls"),
    ):  # fmt: skip
        lines = done(*words, *given, "-o", tmp_path / "a.smkd")
        assert line in lines[2]
        kept = FewShotClassifier.load(tmp_path / "a.smkd")
        assert kept.reading == (given[1] if given else "auto")
        assert kept.encoder_ is not None
        which = written(numbered(kept.encoder_.config.features, 2))
        assert json.loads((tmp_path / "a.json").read_text())["features"] == which
        assert lines[2].startswith(f"features: {which}")
    photographs(tmp_path / "one", (1, 1))
    lines = done("fit", tmp_path / "one", *words[2:], "-o", tmp_path / "a.smkd")
    assert lines[2] == "features: 2:cls+weighted_mean (what its run says: auto needs a class with two images to choose)"
    assert "--features 3x" in refused(*words, "--features", "3x", "-o", tmp_path / "b.smkd")
    assert "no block 3" in refused(*words, "--features", "3", "-o", tmp_path / "b.smkd")
    assert not (tmp_path / "b.smkd").exists()


def test_fit_says_what_it_learned(place: Path, tmp_path: Path) -> None:
    words = ("-o", tmp_path / "a.smkd", "--backbone", "pixels", "--json", tmp_path / "a.json")
    lines = done("fit", place / "support", *words)
    assert lines[0].startswith("classes: 3 (")
    assert lines[1] == "images: 18, 5 to 7 per class"
    assert "(chosen by cross-validation)" in lines[2]
    left = FewShotClassifier.load(tmp_path / "a.smkd").left_out_
    low, high = left.interval
    assert lines[3] == (
        f"leave-one-out accuracy: {100 * left.mean:.1f} %, the mean over 3 classes, of 18 images "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f})"
    )
    shares = [[int(word) for word in line.split(": ")[1].split(" of ")] for line in lines[4:7]]
    assert sorted(images for _, images in shares) == [5, 6, 7]
    assert sum(right for right, _ in shares) == left.right
    assert left.mean == pytest.approx(sum(right / images for right, images in shares) / 3)
    assert [line.split(":")[0] for line in lines[7:10]] == ["--reject 0.3", "--reject 0.5", "--reject 0.7"]
    assert lines[10] == f"written: {tmp_path / 'a.smkd'}"
    written = json.loads((tmp_path / "a.json").read_text())
    assert sorted(written["classes"].values()) == [5, 6, 7]
    assert [each["right"] for each in written["left_out"]["classes"]] == [each.right for each in left.by_class]
    assert written["left_out"]["interval"] == [low, high]
    assert written["left_out"]["reject"][1] == {"threshold": 0.5, "kept": left.kept(0.5), "caught": left.caught(0.5)}
    some = photographs(tmp_path / "some", (2, 1, 3))
    lines = done("fit", some, "-o", tmp_path / "b.smkd", "--backbone", "pixels")
    assert "the mean over 2 classes, of 5 images" in lines[3]
    assert lines[6] == f"  not left out, as they have one image: {sorted(each.name for each in some.iterdir())[1]}"
    few = photographs(tmp_path / "few", (1, 1, 1))
    lines = done("fit", few, "-o", tmp_path / "b.smkd", "--backbone", "pixels")
    assert lines[2] == "head: prototype (auto needs 5 images of every class to choose)"
    assert "no class has two images" in lines[3]
    assert "two or more images" in refused("predict", tmp_path / "b.smkd", few, "--reject", "0.5")
    assert len(done("predict", tmp_path / "b.smkd", few)) == 3


def test_predict_writes_what_python_says(place: Path, tmp_path: Path) -> None:
    words = ("--top", "2", "--csv", tmp_path / "p.csv", "--json", tmp_path / "p.json")
    lines = done("predict", place / "clf.smkd", place / "rest", *map(str, words))
    paths = sorted((place / "rest").rglob("*.png"))
    classifier = FewShotClassifier.load(place / "clf.smkd")
    chances, answers = classifier.predict_proba(paths), classifier.predict(paths)
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    images = json.loads((tmp_path / "p.json").read_text())["images"]
    assert len(lines) == len(rows) == len(images) == 16
    for path, chance, answer, line, row, image in zip(paths, chances, answers, lines, rows, images, strict=True):
        assert line.startswith(f"{path}: {answer} {chance.max():.2f}, ")
        assert (row["image"], row["answer"], row["class_1"]) == (str(path), answer, answer)
        assert image["classes"][0] == {"class": answer, "probability": round(float(chance.max()), 4)}
        assert float(row["known"]) == image["known"]
        assert len(image["classes"]) == 2


def test_rejected_images_are_none_of_these(place: Path) -> None:
    lines = done("predict", place / "clf.smkd", place / "rest", "--reject", "1")
    assert all(": none of these (known 0." in line for line in lines)
    assert not any("none of these" in line for line in done("predict", place / "clf.smkd", place / "rest"))


def test_an_unreadable_image_is_named_and_left_out(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "rest", tmp_path / "rest")
    bad = sorted((tmp_path / "rest").rglob("*.png"))[3]
    bad.write_bytes(bad.read_bytes()[:80])
    result = run("predict", place / "clf.smkd", tmp_path / "rest", "--json", tmp_path / "p.json")
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 15
    assert f"cannot read image '{bad}'" in result.stderr
    assert "1 unreadable images left out" in result.stderr
    assert json.loads((tmp_path / "p.json").read_text())["unreadable"] == [str(bad)]
    assert str(bad) in refused("predict", place / "clf.smkd", bad)
    # a support image counts: nothing is written without it
    assert str(bad) in refused("fit", tmp_path / "rest", "-o", tmp_path / "x.smkd", "--backbone", "pixels")
    assert not (tmp_path / "x.smkd").exists()


def test_index_and_search(place: Path, tmp_path: Path) -> None:
    lines = done("index", place / "support", "-o", tmp_path / "i.smkd", "--backbone", place / "net.pt")
    assert lines == [f"{tmp_path / 'i.smkd'}: 18 images, features of 64 numbers"]
    image = sorted((place / "support").rglob("*.png"))[4]
    lines = done("search", tmp_path / "i.smkd", image, "--top", "3")
    assert len(lines) == 3
    assert lines[0] == f" 1.0000  {image}"
    assert "`smkd fit`" in refused("predict", tmp_path / "i.smkd", image)
    assert "`smkd index`" in refused("search", place / "clf.smkd", image)


def test_wrong_folders(place: Path, tmp_path: Path, make_folder: MakeFolder) -> None:
    tree = make_folder(classes=2, images=2)
    out = ("-o", tmp_path / "x.smkd", "--backbone", "pixels")
    assert "does not exist" in refused("fit", tmp_path / "none", *out)
    assert f"give one of them, such as {tree / 'train'}" in refused("fit", tree, *out)
    assert done("fit", tree / "train", *out)[-1] == f"written: {tmp_path / 'x.smkd'}"
    (tree / "train" / "empty").mkdir()
    assert "class folder" in refused("fit", tree / "train", *out)
    one = photographs(tmp_path / "one", (3,))
    assert "holds one class" in refused("fit", one, *out)
    assert "holds no images" in refused("fit", next(one.iterdir()), *out)
    assert "did you mean 'knn'" in refused("fit", place / "support", *out, "--head", "kn")
    assert "does not exist" in refused("fit", place / "support", "-o", tmp_path / "y", "--backbone", tmp_path / "n.pt")
    assert "does not exist" in refused("predict", place / "clf.smkd", tmp_path / "none.png")
    assert "holds no images" in refused("predict", place / "clf.smkd", tree / "train" / "empty")
    assert "does not exist" in refused("predict", tmp_path / "none.smkd", one)
    assert "--csv: cannot write" in refused("predict", place / "clf.smkd", one, "--csv", tmp_path)
    FewShotClassifier().fit(*blobs((2, 2))).save(tmp_path / "f.smkd")
    assert "no backbone" in refused("predict", tmp_path / "f.smkd", one)
