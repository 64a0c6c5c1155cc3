"""A step of several passes is the step of one pass over all images, wherever the pairs are the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from smkd import extensions
from smkd.data.loader import Views
from smkd.engine.optim import rates_at
from smkd.engine.step import Learner
from smkd.models.pair import Outputs
from smkd.objectives import patch
from smkd.objectives.passes import passes_of
from whole_steps import ACROSS, SUBSETS, WITHIN, assert_same, config_of, learned, one_step, only, views_of

PATCH: dict[str, Any] = {"weight": 1.0}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "phase1": {"labels": False, "mim": {"weight": 1.0}},
    "phase1-patch": {"labels": False, "patch": PATCH},
    "phase2": {"labels": True, "patch": PATCH},
    "own-views": {"labels": True, "cls": {"same_image": True}, "patch": {**PATCH, "weighting": "mean"}},
    "others": {"labels": True, "patch": {**PATCH, "same_image": False}},
    "global": {"labels": True, "pairs": "global", "patch": PATCH},
    "reference": {"labels": True, "patch": {**PATCH, "matching": "reference"}},
    "reference-mean": {"labels": True, "patch": {**PATCH, "matching": "reference", "weighting": "mean"}},
    "of others": {"labels": True, "terms": {"squares": 0.5}},
    **{"+".join(terms): only(terms) for terms in SUBSETS},
}


def squares(student: Outputs, teacher: Outputs, masks: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """A term from outside the package: the mean square of the logits."""
    return student.cls.square().mean(), student.cls.numel()


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extensions.terms.registered, "squares", squares)


# classes that lie within the passes, which hold different numbers of pairs
LABELS = {2: WITHIN, 4: (0, 0, 1, 1, 2, 3, 4, 4)}


@pytest.mark.parametrize("accumulate", LABELS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_passes_add_up(name: str, accumulate: int) -> None:
    several, one = (
        one_step(config_of(OBJECTIVES[name], accumulate=count, head={"num_patch_prototypes": 24}), LABELS[accumulate])
        for count in (accumulate, 1)
    )
    assert_same(several, one)
    assert learned(one) == {key for key, gradient in one.gradients.items() if gradient is not None}
    # Adam's first step is the learning rate by the gradient's sign, and the sign of a zero is rounding
    for key, gradient in one.gradients.items():
        if gradient is not None:
            sure = gradient.abs() > 1e-4
            torch.testing.assert_close(several.weights[key][sure], one.weights[key][sure], rtol=0, atol=1e-5)


def test_a_class_across_passes_has_fewer_pairs() -> None:
    several, one = (one_step(config_of(OBJECTIVES["phase2"], accumulate=count), ACROSS) for count in (2, 1))
    for term in ("cls", "patch"):
        assert abs(float(several.losses[term] - one.losses[term])) > 1e-4
    torch.testing.assert_close(several.centers, one.centers, rtol=0, atol=1e-5)


def test_empty_passes_are_counted() -> None:
    others = config_of(OBJECTIVES["others"], accumulate=4)
    assert one_step(others, LABELS[4]).empty == {"patch": 1}
    assert one_step(others, tuple(range(8))).empty == {"patch": 4}


def test_views_are_asked_for_one_pass_at_a_time() -> None:
    config = config_of(OBJECTIVES["phase2"], accumulate=2)
    learner = Learner.create(config, 4, torch.device("cpu"), None)
    seen: list[int] = []
    halves = (slice(0, 4), slice(4, 8))

    def views() -> Iterator[Views]:
        for number, part in enumerate(halves):
            assert len(seen) == number
            yield views_of(WITHIN, part)

    learner.objective.register_forward_hook(lambda *_: seen.append(1))
    result = learner.step(views(), rates_at(config, 0, 10), [views_of(WITHIN, part) for part in halves])
    assert len(seen) == 2
    assert result.labels.tolist() == list(WITHIN)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_pairs_of_a_step_are_counted_as_they_are_made(seed: int, own: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randint(12, (1 + seed % 9,), generator=generator) for _ in range(1 + seed % 4)]
    labels = [each % (1 + seed % 7) for each in images]  # an image that is there twice has one label
    passes = passes_of(labels, images, paired=True, pooled=False)
    other = [[[a != b and a % (1 + seed % 7) == b % (1 + seed % 7) for b in each] for a in each] for each in images]
    made = [int(torch.tensor(each).sum()) + own * len(each) for each in other]
    assert [int(this.pairs(own=own).sum()) for this in passes] == made
    terms = [patch.image_terms(partners, "paper", own=own, weighted=False) for partners in passes[0].partners]
    assert terms == made
    terms = [patch.image_terms(partners, "reference", own=True, weighted=False) for partners in passes[0].partners]
    assert terms == [sum(any(row) for row in each) for each in other]
    assert [this.last for this in passes] == [False] * (len(labels) - 1) + [True]
