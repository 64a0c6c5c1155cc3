"""`smkd add`: more images and classes for a classifier, the same as one `smkd fit` on everything."""

from __future__ import annotations

import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from classify_data import blobs, tiny_checkpoint
from command_line import refused, smkd
from made_images import photographs
from smkd.classify import FewShotClassifier
from smkd.classify.added import images_by_class, own_labels
from smkd.errors import DataError

pytestmark = pytest.mark.slow

NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of two classes, a folder of a third one, and one with all images of the three."""
    folder = tmp_path_factory.mktemp("add")
    for name, found in zip(NAMES, sorted(photographs(folder / "made", (6, 7, 5)).iterdir()), strict=True):
        found.rename(folder / name)
        shutil.copytree(folder / name, folder / "all" / name)
    for name in ("ant", "bee"):
        shutil.copytree(folder / name, folder / "two" / name)
    # the last two of a class come later
    for path in sorted((folder / "two" / "bee").iterdir())[-2:]:
        path.unlink()
    tiny_checkpoint(folder / "net.pt")
    smkd("fit", folder / "two", "-o", folder / "two.smkd", "--backbone", folder / "net.pt", "--features", "own")
    return folder


@pytest.mark.parametrize("head", ["auto", "prototype", "knn", "ridge"])
def test_adding_is_fitting_on_the_union(place: Path, tmp_path: Path, head: str) -> None:
    words = ("--backbone", place / "net.pt", "--features", "own", "--head", head, "-o")
    smkd("fit", place / "two", *words, tmp_path / "two.smkd")
    before = (tmp_path / "two.smkd").read_bytes()
    smkd("add", tmp_path / "two.smkd", place / "cat", "-o", tmp_path / "three.smkd")
    (tmp_path / "more").mkdir()
    shutil.copytree(place / "bee", tmp_path / "more" / "bee")
    smkd("add", tmp_path / "three.smkd", tmp_path / "more", "-o", tmp_path / "added.smkd")
    smkd("fit", place / "all", *words, tmp_path / "union.smkd")
    added, union = (FewShotClassifier.load(tmp_path / f"{name}.smkd") for name in ("added", "union"))
    assert added.classes_.tolist() == union.classes_.tolist() == list(NAMES)
    assert added.head_ == union.head_
    assert added.temperature_ == pytest.approx(union.temperature_, abs=1e-5)
    assert added.left_out_.by_class == union.left_out_.by_class
    queries = sorted(str(path) for path in photographs(tmp_path / "new", (3, 3, 3), skip=9).rglob("*.png"))
    np.testing.assert_allclose(added.predict_proba(queries), union.predict_proba(queries), atol=1e-5)
    np.testing.assert_allclose(added.known_proba(queries), union.known_proba(queries), atol=1e-5)
    assert (tmp_path / "two.smkd").read_bytes() == before


def test_what_is_there_already_is_said_and_skipped(place: Path, tmp_path: Path) -> None:
    done = smkd("add", place / "two.smkd", place / "bee", "-o", tmp_path / "a.smkd")
    told = done.stderr.splitlines()
    assert len(told) == 5
    assert told[0].endswith("is in the classifier already, as 'bee'; it is skipped")
    assert done.stdout.splitlines()[0] == "added: bee, 2 images"
    assert FewShotClassifier.load(tmp_path / "a.smkd").left_out_.images == 13
    line = refused("add", place / "two.smkd", place / "ant", "-o", tmp_path / "b.smkd")
    assert "holds nothing new: the classifier has learned from all 6 images of it" in line
    assert not (tmp_path / "b.smkd").exists()


@pytest.mark.parametrize("name", ["Ant", "ANT", "_ant", "ant "])
def test_another_spelling_of_a_class(place: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(place / "cat", tmp_path / name)
    line = refused("add", place / "two.smkd", tmp_path / name, "-o", tmp_path / "a.smkd")
    assert f"'{name}' is another spelling of the class 'ant'" in line
    assert not (tmp_path / "a.smkd").exists()


def test_names_are_compared_in_nfc() -> None:
    values, labels = blobs((2, 2))
    labels = np.where(labels == "kind 0", "caf\u00e9", "snow owl")
    classifier = FewShotClassifier().fit(values, labels)
    decomposed = unicodedata.normalize("NFD", "caf\u00e9")
    assert own_labels([decomposed, "tea"], classifier) == {decomposed: "caf\u00e9", "tea": "tea"}
    for names in (["snow_owl"], ["big_cat", "Big cat"]):
        with pytest.raises(DataError, match="is another spelling of the class") as caught:
            own_labels(names, classifier)
        assert "\n" not in str(caught.value)


def test_folders(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name: len(paths) for name, paths in images_by_class(place / "all").items()} == dict(
        zip(NAMES, (6, 7, 5), strict=True)
    )
    monkeypatch.chdir(place / "cat")
    assert list(images_by_class(Path())) == ["cat"]
    mixed = shutil.copytree(place / "all", tmp_path / "mixed")
    shutil.copy(next((place / "cat").iterdir()), mixed / "x.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, line in (
        ("mixed", "holds images beside folders"), ("empty", "holds no images"), ("none", "does not exist"),
        ("file", "is a file"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=line):
            images_by_class(tmp_path / name)


def test_wrong_input(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.smkd"
    line = refused("add", place / "two.smkd", place / "cat", "-o", place / "two.smkd")
    assert "is read by the same call and would be replaced" in line
    (tmp_path / "text.smkd").write_text("no classifier")
    assert "text.smkd" in refused("add", tmp_path / "text.smkd", place / "cat", "-o", out)
    values, labels = blobs((2, 2))
    FewShotClassifier().fit(values, labels).save(tmp_path / "plain.smkd")
    assert "has no backbone" in refused("add", tmp_path / "plain.smkd", place / "cat", "-o", out)
    broken = shutil.copytree(place / "cat", tmp_path / "owl")
    (broken / "bad.png").write_text("no image")
    assert "bad.png" in refused("add", place / "two.smkd", broken, "-o", out)
    assert not out.exists()
