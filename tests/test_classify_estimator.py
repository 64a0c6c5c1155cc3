"""`FewShotClassifier` on features: scikit-learn's own checks, probabilities, new classes, 'none of these'."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import check_estimator

from classify_data import blobs
from smkd.classify import FewShotClassifier
from smkd.classify.left_out import CANDIDATES, LeftOut, fitted_temperature, left_out
from smkd.errors import ConfigError, SmkdError
from smkd.fewshot.head import Learned
from smkd.fewshot.heads import heads, make_head

UNEQUAL = (7, 2, 5, 1)
X, Y = blobs(UNEQUAL)
QUERY, TRUTH = blobs((6, 6, 6, 6), seed=1)


def test_scikit_learn_finds_nothing_wrong() -> None:
    for result in check_estimator(FewShotClassifier(), on_skip=None, on_fail=None):
        assert result["status"] != "failed", (result["check_name"], result["exception"])
    assert cross_val_score(FewShotClassifier(), *blobs((9, 9, 9)), cv=3).mean() > 0.9
    assert clone(FewShotClassifier(head="knn", seed=3)).get_params()["seed"] == 3


@pytest.mark.parametrize("head", [*heads.builtin, "auto", "logistic:c=3", "simpleshot:transform=cl2n"])
def test_every_head_gives_probabilities_with_unequal_shots(head: str) -> None:
    classifier = FewShotClassifier(head=head).fit(X, Y)
    chances = classifier.predict_proba(QUERY)
    assert chances.shape == (24, 4)
    assert np.isfinite(chances).all()
    np.testing.assert_allclose(chances.sum(axis=1), 1, atol=1e-12)
    assert classifier.score(QUERY, TRUTH) > 0.9
    assert classifier.left_out_.images == 14  # the class of one image has none to spare
    assert (classifier.classes_[chances.argmax(axis=1)] == classifier.predict(QUERY)).all()


@pytest.mark.parametrize("head", ["prototype", "knn", "logistic", "auto"])
def test_partial_fit_equals_fit_on_everything(head: str) -> None:
    parts = FewShotClassifier(head=head)
    rows = np.array_split(np.random.default_rng(0).permutation(15), 3)
    for some in rows:
        parts.partial_fit(X[some], Y[some])
    whole = FewShotClassifier(head=head).fit(X[np.concatenate(rows)], Y[np.concatenate(rows)])
    np.testing.assert_array_equal(parts.predict_proba(QUERY), whole.predict_proba(QUERY))
    np.testing.assert_array_equal(parts.known_proba(QUERY), whole.known_proba(QUERY))
    assert (parts.head_, parts.temperature_) == (whole.head_, whole.temperature_)


def test_a_new_class_comes_later() -> None:
    first = Y != "kind 2"
    classifier = FewShotClassifier().fit(X[first], Y[first])
    assert "kind 2" not in classifier.predict(QUERY)
    classifier.partial_fit(X[~first], Y[~first])
    assert classifier.classes_.tolist() == ["kind 0", "kind 1", "kind 2", "kind 3"]
    assert (classifier.predict(QUERY[TRUTH == "kind 2"]) == "kind 2").all()


def test_an_answer_does_not_depend_on_the_other_images() -> None:
    classifier = FewShotClassifier(head="logistic").fit(X, Y)
    together = classifier.predict_proba(QUERY)
    alone = np.concatenate([classifier.predict_proba(each[None]) for each in QUERY])
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-12)


def test_an_unseen_class_is_none_of_these() -> None:
    values, names = blobs((5, 5, 5, 5, 5, 5))
    known = names < "kind 4"
    classifier = FewShotClassifier().fit(values[known], names[known])
    values, names = blobs((20,) * 6, seed=2)
    answers, seen = classifier.predict(values, reject=0.5), names < "kind 4"
    assert (answers[~seen] == None).mean() > 0.9  # noqa: E711
    assert (answers[seen] == names[seen]).mean() > 0.9
    assert roc_auc_score(seen, classifier.known_proba(values)) > 0.98
    assert (classifier.predict(values, reject=0.0) == classifier.predict(values)).all()


def test_auto_takes_what_the_features_need() -> None:
    # one class around another: means say nothing, neighbours by direction do
    angles = np.concatenate(
        [np.array([0.0, 0.02, 0.04, 2.0, 2.02, 2.04]), np.array([1.0, 1.02, 1.04, 3.0, 3.02, 3.04])]
    )
    values, names = np.stack([np.cos(angles), np.sin(angles)], axis=1), np.repeat(["even", "odd"], 6)
    classifier = FewShotClassifier(head="auto").fit(values, names)
    assert classifier.head_ in CANDIDATES
    assert classifier.head_ != "prototype"
    assert classifier.left_out_.right > FewShotClassifier().fit(values, names).left_out_.right
    assert FewShotClassifier(head="auto").fit(values[2:], names[2:]).head_ == "prototype"  # four of one class
    assert FewShotClassifier(head="auto").fit(*blobs((6, 6, 6))).head_ == "ridge"  # all are right


def test_images_are_left_out_as_a_plain_loop_does() -> None:
    head, labels = make_head("prototype"), torch.from_numpy(np.unique(Y, return_inverse=True)[1])
    support = torch.from_numpy(X).float()
    found = left_out(head, support, labels, 0)
    expected: dict[int, list[float]] = {}
    rows = [torch.nonzero(labels == label).flatten().tolist() for label in range(4)]
    for turn in range(7):
        gone = [members[turn % len(members)] for members in rows if len(members) > 1]
        rest = [row for row in range(15) if row not in gone]
        for members in rows:
            if len(members) > max(1, turn):
                query = support[members[turn]]
                means = [support[[r for r in rest if labels[r] == c]].double().mean(dim=0) for c in range(4)]
                cosines = [float(torch.cosine_similarity(query.double(), mean, dim=0)) for mean in means]
                expected[members[turn]] = cosines
    assert found.truth.tolist() == [int(labels[row]) for row in sorted(expected)]
    np.testing.assert_allclose(found.scores, [expected[row] for row in sorted(expected)], atol=1e-6)


def test_the_temperature_is_the_most_likely_one() -> None:
    rng = np.random.default_rng(0)
    scores, truth = torch.from_numpy(rng.normal(size=(400, 5))), torch.from_numpy(rng.integers(0, 5, 400))
    scores[torch.arange(400), truth] += 1.0
    learned = Learned(make_head("prototype"), torch.eye(5), torch.arange(5), 0)

    def loss(t: float) -> float:
        target = (400 * torch.nn.functional.one_hot(truth).double() + 0.2) / 401
        return -float(((scores / t).log_softmax(dim=1) * target).sum())

    best = fitted_temperature(LeftOut(scores, truth), learned)
    grid = np.geomspace(0.1, 10, 2001)
    assert best == pytest.approx(grid[np.argmin([loss(t) for t in grid])], rel=5e-3)
    # all right or nothing known: finite all the same
    assert 0 < fitted_temperature(LeftOut(100 * torch.eye(5).double(), torch.arange(5)), learned) < 1000
    assert fitted_temperature(LeftOut(torch.zeros(3, 5).double(), torch.arange(3)), learned) == 1.0


def test_one_image_a_class_still_classifies() -> None:
    classifier = FewShotClassifier(head="auto").fit(*blobs((1, 1, 1, 1)))
    assert classifier.head_ == "prototype"
    assert classifier.left_out_.images == 0
    assert classifier.score(QUERY, TRUTH) > 0.9
    chances = classifier.predict_proba(QUERY)
    assert 0.3 < chances.max(axis=1).mean() < 1
    with pytest.raises(SmkdError, match="two or more images"):
        classifier.predict(QUERY, reject=0.5)


def test_labels_keep_their_type() -> None:
    values, _ = blobs((3, 3))
    for labels in ([3, 3, 3, 9, 9, 9], [True] * 3 + [False] * 3, np.array(["a"] * 3 + ["b"] * 3, dtype=object)):
        answers = FewShotClassifier().fit(values, labels).predict(values)
        assert answers.dtype == np.asarray(labels).dtype
        assert answers.tolist() == list(labels)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.fit(X, ["a"] * 15), "only one class, 'a'"),
        (lambda c: c.fit(X[:, :0], Y), "0 feature"),
        (lambda c: c.fit(X, Y[:3]), "inconsistent numbers of samples"),
        (lambda c: c.fit(np.full_like(X, np.nan), Y), "X: 15 of 15 rows are NaN or infinite"),
        (lambda c: c.fit(["a.png", "b.png"], ["a", "b"]), "no backbone"),
        (lambda c: c.fit("photos", Y), "give a list"),
        (lambda c: c.fit(X, Y).predict(QUERY[:, :3]), "3 features"),
        (lambda c: c.fit(X, Y).partial_fit(X, np.arange(15)), "those before are"),
        (lambda c: c.fit(X, Y).partial_fit(X, Y, classes=["kind 0"]), "'kind 1' is not among classes="),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(call: Any, message: str) -> None:
    with pytest.raises(SmkdError, match=message) as caught:
        call(FewShotClassifier())
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_wrong_settings_are_one_line() -> None:
    with pytest.raises(ConfigError, match="did you mean 'prototype'"):
        FewShotClassifier(head="protype").fit(X, Y)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        FewShotClassifier().fit(X, Y).predict(X, reject=1.5)
    with pytest.raises(NotFittedError, match="not fitted yet"):
        FewShotClassifier().predict(X)


def test_a_failed_partial_fit_changes_nothing() -> None:
    classifier = FewShotClassifier().fit(X, Y)
    before = copy.deepcopy(classifier.predict_proba(QUERY))
    with pytest.raises(SmkdError):
        classifier.partial_fit(X[:, :4], Y)
    np.testing.assert_array_equal(classifier.predict_proba(QUERY), before)
