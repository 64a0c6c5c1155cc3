"""What left-out images say of a classifier: by class, with a threshold, and after a round through a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from classify_data import blobs
from smkd.classify import FewShotClassifier, open_encoder
from smkd.classify.classifier import ImageClassifier
from smkd.classify.known import Familiarities, familiarity
from smkd.classify.left_out import CHOICE_ROUNDS, LeftOutAccuracy, _QuickLogistic, left_out
from smkd.errors import CheckpointError, DataError
from smkd.fewshot.heads import make_head
from smkd.fewshot.linear import Logistic

SIZES = (6, 31, 12, 1, 2)
X, Y = blobs(SIZES, noise=1.6)
NAMES = np.unique(Y)


@pytest.fixture(scope="module")
def classifier() -> FewShotClassifier:
    return FewShotClassifier().fit(X, Y)


def test_each_class_counts_the_same(classifier: FewShotClassifier) -> None:
    left = classifier.left_out_
    labels = torch.from_numpy(np.unique(Y, return_inverse=True)[1])
    own = left_out(make_head("prototype"), torch.from_numpy(X).float(), labels, 0)
    rights = [int(own.own[own.truth == label].sum()) for label in range(5)]
    assert [tuple(each) for each in left.by_class] == [
        (name, right, 0 if size == 1 else size) for name, right, size in zip(NAMES, rights, SIZES, strict=True)
    ]
    shares = [right / size for right, size in zip(rights, SIZES, strict=True) if size > 1]
    assert left.mean == pytest.approx(sum(shares) / 4)
    assert [each.right / each.images for each in left.worst_first] == sorted(shares)
    assert left.mean != pytest.approx(left.right / left.images, abs=0.01)
    low, high = left.interval
    assert 0 < low < left.mean < high < 1


def test_a_small_class_of_which_none_is_right_is_not_hidden() -> None:
    left = LeftOutAccuracy(("a", "b"), (0,) * 6 + (1,) * 30, (False,) * 6 + (True,) * 30)
    assert (left.right, left.images, left.mean) == (30, 36, 0.5)
    assert left.worst_first[0] == ("a", 0, 6)
    assert left.interval[1] < 0.75


def test_what_a_threshold_keeps_and_catches_as_a_plain_loop_counts(classifier: FewShotClassifier) -> None:
    left, support = classifier.left_out_, torch.from_numpy(X).float()
    labels = torch.from_numpy(np.unique(Y, return_inverse=True)[1])
    known = classifier.known_
    assert known is not None
    chances, strange = [], []
    for row, label in enumerate(labels.tolist()):
        others = torch.arange(len(X)) != row
        if SIZES[label] > 1:
            familiar = familiarity(support[row : row + 1], support[others], labels[others])
            chances.append(float(known.chance(familiar)[0]))
        there = labels != label
        rest = labels[there] - (labels[there] > label).long()
        told = Familiarities(support[there], rest).fit()
        assert told is not None
        strange.append(float(told.chance(familiarity(support[row : row + 1], support[there], rest))[0]))
    np.testing.assert_allclose(left.known, chances, atol=1e-9)
    np.testing.assert_allclose(left.strange, strange, atol=1e-6)
    truth = [label for label in labels.tolist() if SIZES[label] > 1]
    known, away = left.known, left.strange
    for reject in (0.3, 0.5, 0.62, known[left.own.index(True)], away[4]):
        by_class = [
            [chance >= reject for chance, own, of in zip(known, left.own, truth, strict=True) if own and of == label]
            for label in range(5)
        ]
        assert left.kept(reject) == pytest.approx(np.mean([np.mean(each) for each in by_class if each]))
        caught = [np.mean([away[row] < reject for row in np.flatnonzero(labels == label)]) for label in range(5)]
        assert left.caught(reject) == pytest.approx(np.mean(caught))
    assert left.kept(0) == 1
    assert left.caught(0) == 0
    assert left.caught(1) == 1


def test_what_is_caught_is_what_new_classes_meet() -> None:
    """The estimate from the support against images of classes that were never there, over many draws."""
    estimated, met, kept, right = [], [], [], []
    for seed in range(12):
        values, names = blobs((9,) * 12, noise=1.1, seed=seed)
        there = np.isin(names, np.random.default_rng(seed).permutation(np.unique(names))[:6])
        classifier = FewShotClassifier().fit(values[there], names[there])
        fresh, of = blobs((40,) * 12, noise=1.1, seed=100 + seed)
        known = np.isin(of, classifier.classes_)
        chances, answers = classifier.known_proba(fresh), classifier.predict(fresh)
        own = known & (answers == of)
        estimated.append(classifier.left_out_.caught(0.5))
        met.append((chances[~known] < 0.5).mean())
        kept.append(classifier.left_out_.kept(0.5))
        right.append((chances[own] >= 0.5).mean())
    assert np.mean(estimated) == pytest.approx(np.mean(met), abs=0.1)
    assert np.mean(kept) == pytest.approx(np.mean(right), abs=0.1)


def test_two_classes_catch_nothing_that_could_be_said() -> None:
    left = FewShotClassifier().fit(*blobs((4, 5))).left_out_
    assert left.caught(0.5) is None
    assert left.kept(0.5) is not None
    assert left.threshold(0.5) == "keeps 100 % of the images that get their own class"
    single = FewShotClassifier().fit(*blobs((1, 1, 1))).left_out_
    assert (single.images, single.threshold(0.5), single.as_dict([0.5])) == (0, "", None)


def test_a_file_keeps_it(classifier: FewShotClassifier, tmp_path: Path) -> None:
    classifier.save(tmp_path / "a.smkd")
    loaded = FewShotClassifier.load(tmp_path / "a.smkd").left_out_
    assert loaded == classifier.left_out_
    assert json.dumps(loaded.as_dict([0.5])) == json.dumps(classifier.left_out_.as_dict([0.5]))
    one = FewShotClassifier().fit(*blobs((1, 1, 1)))
    one.save(tmp_path / "one.smkd")
    assert FewShotClassifier.load(tmp_path / "one.smkd").left_out_ == one.left_out_


def test_a_file_from_before_is_read(classifier: FewShotClassifier, tmp_path: Path) -> None:
    classifier.save(tmp_path / "a.smkd")
    with safe_open(tmp_path / "a.smkd", "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    old = {key: value for key, value in tensors.items() if not key.startswith("left_out.")}
    save_file(old, tmp_path / "old.smkd", metadata)
    loaded = FewShotClassifier.load(tmp_path / "old.smkd")
    assert loaded.left_out_ == classifier.left_out_
    np.testing.assert_array_equal(loaded.predict_proba(X), classifier.predict_proba(X))
    for name, bent in (
        ("left_out.own", tensors["left_out.own"][1:]), ("left_out.known", tensors["left_out.known"] + 1),
        ("left_out.strange", tensors["left_out.strange"] * torch.nan),
    ):  # fmt: skip
        save_file(tensors | {name: bent}, tmp_path / "bent.smkd", metadata)
        with pytest.raises(CheckpointError, match=r"left-out images|NaN|none; make it again"):
            FewShotClassifier.load(tmp_path / "bent.smkd")
    settings = json.loads(metadata["smkd"])
    for key, value in (("temperature", 0.0), ("temperature", -1.0), ("temperature", float("nan"))):
        bad = json.dumps(settings | {"settings": settings["settings"] | {key: value}})
        save_file(tensors, tmp_path / "bent.smkd", {"smkd": bad})
        with pytest.raises(CheckpointError, match=r"temperature: .*; make it again"):
            FewShotClassifier.load(tmp_path / "bent.smkd")


@pytest.mark.parametrize(("way", "images"), [(5, 40), (5, 12)])
def test_heads_are_compared_as_well_as_they_do(way: int, images: int) -> None:
    """Solved to the end, logistic regression has the same share of hard images right as in the choice of a head."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(way).repeat(images)
    middles = torch.randn(way, 300, generator=generator)
    support = middles[labels] + 7 * torch.randn(len(labels), 300, generator=generator)
    for c in (1.0, 10.0):
        quick, exact = (
            float(left_out(head, support, labels, 0, CHOICE_ROUNDS).own.float().mean())
            for head in (_QuickLogistic(c), Logistic(c))
        )
        assert 0.4 < exact < 0.9
        assert quick == pytest.approx(exact, abs=0.03)


def test_the_classifier_of_the_command_line_is_the_estimators() -> None:
    values, names = blobs((6, 5, 7), noise=1.5)
    encoder = open_encoder("pixels")
    taught = ImageClassifier.taught(encoder, values.astype(np.float32), names.tolist(), head="auto", reading="own")
    fitted = FewShotClassifier(head="auto").fit(values, names)
    assert taught.head_ == fitted.head_
    assert taught.left_out_ == fitted.left_out_
    np.testing.assert_array_equal(taught.predict(values, reject=0.5), fitted.predict(values, reject=0.5))
    np.testing.assert_array_equal(taught.predict_proba(values), fitted.predict_proba(values))
    for wrong, line in ((values[:, 1:], r"X is \[18, 15\], expected features \[n, 16\]"), (values * np.nan, "NaN")):
        with pytest.raises(DataError, match=line):
            taught.predict(wrong)
