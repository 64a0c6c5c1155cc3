"""`smkd score`: what a classifier is right about, how sure it is, and what thresholds keep and catch."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from classify_data import blobs
from command_line import refused, smkd
from made_images import encode, noise, photographs
from smkd.classify import FewShotClassifier
from smkd.classify.pictures import InputError
from smkd.classify.scored import Scored, score_features, score_left_out
from smkd.viz.scored_page import SHOWN_MISTAKES, lines

pytestmark = pytest.mark.slow

# of twelve images in three classes of 6, 4 and 2: the answers, and how probable they are
TRUTH = np.repeat([0, 1, 2], [6, 4, 2])
ANSWERS = np.array([0, 0, 0, 0, 1, 2, 1, 1, 1, 0, 2, 0])
SURE = np.array([0.9, 0.8, 0.7, 0.6, 0.95, 0.5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.85])
KNOWN = np.linspace(0.1, 0.9, 12)
UNKNOWN = np.array([0.05, 0.25, 0.55, 0.2])


def made(**changes: object) -> Scored:
    probabilities = np.full((12, 3), np.nan)
    for row, (answer, sure) in enumerate(zip(ANSWERS, SURE, strict=True)):
        probabilities[row] = (1 - sure) / 2
        probabilities[row, answer] = sure
    values = {"known": KNOWN, "unknown": UNKNOWN, **changes}
    return Scored(("ant", "bee", "cat"), tuple(f"{n}.png" for n in range(12)), TRUTH, probabilities, **values)


def test_shares_by_class_and_of_all() -> None:
    scored = made()
    assert [tuple(each) for each in scored.by_class] == [("cat", 1, 2), ("ant", 4, 6), ("bee", 3, 4)]
    assert scored.accuracy == 8 / 12
    assert scored.mean == pytest.approx((4 / 6 + 3 / 4 + 1 / 2) / 3)
    assert scored.accuracy_interval == pytest.approx((0.3906, 0.8619), abs=1e-4)  # Wilson's, by hand
    assert scored.interval[0] < scored.mean < scored.interval[1]
    assert scored.confusion.tolist() == [[4, 1, 1], [1, 3, 0], [1, 0, 1]]
    assert scored.mix_ups[0][2] == 1
    assert set(scored.mix_ups) == {("ant", "bee", 1), ("ant", "cat", 1), ("bee", "ant", 1), ("cat", "ant", 1)}
    assert scored.mistakes == [4, 11, 9, 5]  # 0.95, 0.85, 0.6, 0.5


def test_calibration_in_groups_of_equal_size() -> None:
    scored = made()
    order = np.argsort(SURE, kind="stable")
    groups = np.array_split(order, 10)
    error = sum(abs((ANSWERS == TRUTH)[group].mean() - SURE[group].mean()) * len(group) for group in groups) / 12
    assert scored.calibration_error == pytest.approx(error)
    assert [each.images for each in scored.calibration_groups] == [2, 2] + [1] * 8
    assert scored.calibration_groups[0].confidence == 0.5
    assert scored.calibration_groups[0].accuracy == 0.5


def test_thresholds_and_unknown_images() -> None:
    scored = made()
    found = scored.threshold(0.5)
    assert found is not None
    kept = KNOWN >= 0.5
    assert found == (0.5, kept.mean(), (ANSWERS == TRUTH)[kept].mean(), 0.75)
    assert scored.threshold(0.95) == (0.95, 0.0, None, 1.0)
    assert scored.auroc == pytest.approx(roc_auc_score([1] * 12 + [0] * 4, [*KNOWN, *UNKNOWN]))
    assert made(unknown=None).auroc is None
    assert made(unknown=None).threshold(0.5) == (0.5, kept.mean(), (ANSWERS == TRUTH)[kept].mean(), None)
    assert made(known=None, unknown=None).threshold(0.5) is None
    said = lines(made(known=None, unknown=None), (0.5,))
    assert not any("reject" in line or "AUROC" in line for line in said)


def test_plain_values_say_all_of_it() -> None:
    values = json.loads(json.dumps(made().as_dict((0.5,))))
    assert (values["images"], values["accuracy"], values["unknown"], values["learned_from"]) == (12, 8 / 12, 4, 0)
    assert values["classes"][0]["class"] == "cat"
    assert values["answers"][4] == {
        "image": "4.png", "class": "ant", "answer": "bee", "probability": 0.95, "known": round(float(KNOWN[4]), 4)
    }  # fmt: skip
    assert values["reject"][0]["caught"] == 0.75


def test_left_out_images_are_scored_alike() -> None:
    values, labels = blobs((6, 12, 1, 2), noise=1.3)
    classifier = FewShotClassifier().fit(values, labels)
    scored = score_left_out(classifier, [f"{row}.png" for row in range(len(values))])
    assert scored is not None
    left = classifier.left_out_
    assert (scored.mean, scored.interval, int(scored.own.sum())) == (left.mean, left.interval, left.right)
    assert scored.images[:2] == ("0.png", "1.png")
    assert "18.png" not in scored.images  # its class has no other image
    found = scored.threshold(0.4)
    assert found is not None
    assert found.kept == pytest.approx(np.mean(np.array(left.known) >= 0.4))
    single = FewShotClassifier().fit(values[[0, 7]], labels[[0, 7]])
    assert score_left_out(single, ["a", "b"]) is None


def test_images_that_were_learned_from_are_counted() -> None:
    values, labels = blobs((6, 6))
    classifier = FewShotClassifier().fit(values, labels)
    more, others = blobs((5, 5), seed=1)
    scored = score_features(classifier, np.concatenate([more, 2 * values[:3]]), [*others, *labels[:3]])
    assert scored.learned_from == 3
    with pytest.raises(InputError, match="'kind 7' is no class of the classifier"):
        score_features(classifier, more[:1], ["kind 7"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of three classes by plain colours, other photographs of them, and some of no class."""
    folder = tmp_path_factory.mktemp("score")
    support = photographs(folder / "support", (5, 5, 5))
    photographs(folder / "photos", (7, 4, 6), skip=5)
    shutil.copytree(photographs(folder / "more", (1, 1, 1, 1, 8), skip=5), folder / "all")
    shutil.move(next(each for each in (folder / "all").iterdir() if len(list(each.iterdir())) == 8), folder / "other")
    done = smkd("fit", support, "-o", folder / "clf.smkd", "--backbone", "pixels", "--report", folder / "left.html")
    assert done.returncode == 0, done.stderr
    return folder


def test_the_command(place: Path, tmp_path: Path) -> None:
    done = smkd("score", "clf.smkd", "photos", "--unknown", "other", "--json", tmp_path / "s.json", "--report",
                tmp_path / "s.html", cwd=place)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    values = json.loads((tmp_path / "s.json").read_text())
    classifier = FewShotClassifier.load(place / "clf.smkd")
    right = {}
    for folder in sorted((place / "photos").iterdir()):
        answers = classifier.predict(sorted(map(str, folder.iterdir())))
        right[folder.name] = [int((answers == folder.name).sum()), len(answers)]
    assert {each["class"]: [each["right"], each["images"]] for each in values["classes"]} == right
    assert (values["images"], values["unknown"], values["unreadable"]) == (17, 8, [])
    assert done.stdout.splitlines()[0].startswith(
        f"accuracy: {100 * values['mean']:.1f} %, the mean over 3 classes (95"
    )
    assert f"AUROC of {values['auroc']:.2f}" in done.stdout
    page = (tmp_path / "s.html").read_text()
    mistakes = sum(images - ok for ok, images in right.values())
    assert page.count('src="data:image/jpeg') == min(mistakes, SHOWN_MISTAKES) > 0
    assert "http" not in page.replace("http-equiv", "")
    assert "prefers-color-scheme: dark" in page
    # again over its own files, and the page of `fit`
    assert smkd("score", "clf.smkd", "photos", "--report", tmp_path / "s.html", cwd=place).returncode == 0
    assert "catches of no class" in page
    assert "catches of no class" not in (tmp_path / "s.html").read_text()  # no images of no class were given
    left = (place / "left.html").read_text()
    assert f"{100 * classifier.left_out_.mean:.1f} % in the mean over 3 classes" in left


def test_unreadable_and_known_images_are_named(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "support", tmp_path / "photos")
    broken = sorted((tmp_path / "photos").glob("*/*"))[0]
    broken.write_bytes(b"no image")
    done = smkd("score", place / "clf.smkd", tmp_path / "photos", "--json", tmp_path / "s.json")
    assert done.returncode == 1
    assert "14 of 14 images look the same as images that the classifier has learned from" in done.stderr
    assert str(broken) in done.stderr
    assert "1 unreadable images left out" in done.stderr
    assert json.loads((tmp_path / "s.json").read_text())["unreadable"] == [str(broken)]


def test_names_are_compared_in_one_form(tmp_path: Path) -> None:
    support = photographs(tmp_path / "support", (3, 3))
    first, _ = sorted(support.iterdir())
    first.rename(support / unicodedata.normalize("NFC", "zèbre"))
    assert smkd("fit", support, "-o", tmp_path / "clf.smkd", "--backbone", "pixels").returncode == 0
    shutil.copytree(
        support / unicodedata.normalize("NFC", "zèbre"), tmp_path / "new" / unicodedata.normalize("NFD", "zèbre")
    )
    assert "1 classes" in smkd("score", tmp_path / "clf.smkd", tmp_path / "new").stdout


def test_wrong_input_is_one_line(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "photos", tmp_path / "photos")
    first = sorted((tmp_path / "photos").iterdir())[0]
    first.rename(first.with_name(first.name + "s"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.png").write_bytes(encode(noise((9, 9))))
    photo = sorted(first.with_name(first.name + "s").iterdir())[0].relative_to(tmp_path)
    clf = place / "clf.smkd"
    for words, says in (
        ((clf, "photos"), f"'{first.name}s', which is no class of the classifier .*did you mean '{first.name}'"),
        ((clf, "empty"), "empty"), ((clf, "nowhere"), "'nowhere' does not exist"), (("a.png", "photos"), "a.png"),
        ((clf, place / "photos", "--unknown", "empty"), "holds no images"),
        ((clf, place / "photos", "--report", photo), "is not a page of smkd"),
        ((clf, place / "photos", "--json", photo), "does not end in .png"),
        ((clf, place / "photos", "--report", clf), "is read by the same call"),
    ):  # fmt: skip
        line = refused("score", *words, cwd=tmp_path)
        assert re.search(says, line), line


def test_a_page_of_classes_with_one_image_each_is_refused(tmp_path: Path) -> None:
    support = photographs(tmp_path / "support", (1, 1))
    done = smkd("fit", support, "-o", tmp_path / "a.smkd", "--backbone", "pixels", "--report", tmp_path / "a.html")
    assert done.returncode == 2
    assert "no class has two images" in done.stderr
    assert not (tmp_path / "a.html").exists()
