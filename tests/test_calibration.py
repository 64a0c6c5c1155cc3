"""Probabilities and 'none of these' by hand: cases small enough for the right value to be written down."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from smkd.classify.known import Familiarities, Known, familiarity
from smkd.classify.left_out import LeftOut, fitted_temperature
from smkd.fewshot.head import Learned
from smkd.fewshot.heads import make_head
from smkd.fewshot.intervals import of_share

NOBODY = LeftOut(torch.empty(0, 3, dtype=torch.float64), torch.empty(0, dtype=torch.long))


def learned(support: Tensor, labels: list[int]) -> Learned:
    return Learned(make_head("prototype"), support, torch.tensor(labels), 0)


ANY = learned(torch.eye(3), [0, 1, 2])


# ---- temperature


@pytest.mark.parametrize("images", [1, 3, 20])
@pytest.mark.parametrize("way", [2, 5])
def test_all_right_leaves_the_doubt_of_one_image_more(images: int, way: int) -> None:
    """Each image's own class gets (N + 1/way) / (N + 1), so softmax(gap / T) is exactly that."""
    gap = 3.0
    truth = torch.arange(images) % way
    scores = gap * torch.nn.functional.one_hot(truth, way).double()
    own = (images + 1 / way) / (images + 1)
    expected = gap / math.log(own / ((1 - own) / (way - 1)))
    assert fitted_temperature(LeftOut(scores, truth), ANY) == pytest.approx(expected, rel=1e-6)


def test_the_temperature_is_where_the_likelihood_peaks_and_scales_with_the_scores() -> None:
    rng = np.random.default_rng(1)
    truth = torch.from_numpy(rng.integers(0, 4, 60))
    scores = torch.from_numpy(rng.normal(size=(60, 4)))
    scores[torch.arange(60), truth] += 1.5
    target = (60 * torch.nn.functional.one_hot(truth, 4).double() + 0.25) / 61

    def loss(log_t: float) -> float:
        return -float(((scores / math.exp(log_t)).log_softmax(dim=1) * target).sum())

    expected = math.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded", options={"xatol": 1e-9}).x)
    for factor in (1e-3, 1.0, 1e4):
        found = fitted_temperature(LeftOut(factor * scores, truth), ANY)
        assert found == pytest.approx(factor * expected, rel=1e-5)
    # what is added to all scores of an image says nothing about it
    shifted = scores + torch.from_numpy(rng.normal(size=(60, 1))) * 100
    assert fitted_temperature(LeftOut(shifted, truth), ANY) == pytest.approx(expected, rel=1e-5)


def test_scores_that_mislead_make_all_classes_alike() -> None:
    truth = torch.tensor([0, 1, 0, 1])
    wrong = 2.0 * torch.nn.functional.one_hot(1 - truth, 2).double()
    found = fitted_temperature(LeftOut(wrong, truth), ANY)
    assert found > 1e3
    assert math.isfinite(found)


def test_without_left_out_images_the_spread_of_other_classes_scores_is_the_guess() -> None:
    support = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.6, 0.8]]))
    cosines = (support @ support.T).double()
    others = [float(cosines[i, j]) for i in range(3) for j in range(3) if i != j]
    found = fitted_temperature(NOBODY, learned(support, [0, 1, 2]))
    assert found == pytest.approx(float(np.std(others)), rel=1e-5)
    # all alike: nothing to go by
    assert fitted_temperature(NOBODY, ANY) == 1.0
    same = LeftOut(torch.full((3, 3), 0.5, dtype=torch.float64), torch.arange(3))
    assert fitted_temperature(same, ANY) == 1.0


# ---- known or not


def test_familiarity_is_the_cosine_with_the_nearest_class_mean() -> None:
    support = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, -3.0]])
    labels = torch.tensor([0, 0, 1])  # means (1, 1) and (0, -3)
    query = torch.tensor([[5.0, 5.0], [0.0, -0.1], [1.0, 0.0], [-1.0, 0.0], [-1.0, -1.0]])
    expected = [1.0, 1.0, math.sqrt(0.5), 0.0, math.sqrt(0.5)]
    np.testing.assert_allclose(familiarity(query, support, labels), expected, atol=1e-7)


def test_the_chance_of_being_known_is_a_logistic_curve() -> None:
    known = Known(slope=2.0, intercept=-1.0)
    found = known.chance(np.array([0.5, 1.0, 0.0]))
    np.testing.assert_allclose(found, [0.5, 1 / (1 + math.exp(-1)), 1 / (1 + math.e)], rtol=1e-12)


def plain_kinds(features: Tensor, labels: list[int]) -> tuple[list[float], list[float]]:
    """Familiarities by loops: images left out of their class, and images whose whole class is left out."""

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(torch.cosine_similarity(a, b, dim=0))

    familiar, strange = [], []
    for i, label in enumerate(labels):
        means = {}
        for other in set(labels):
            rows = [n for n, value in enumerate(labels) if value == other and n != i]
            if rows:
                means[other] = features[rows].mean(dim=0)
        if label in means:
            familiar.append(max(cosine(features[i], mean) for mean in means.values()))
        strange.append(max(cosine(features[i], mean) for name, mean in means.items() if name != label))
    return familiar, strange


@pytest.mark.parametrize(("apart", "seed", "slope"), [(2.0, 0, 5.681), (0.3, 4, 0.236)])
def test_known_is_learned_from_images_left_out_and_classes_left_out(apart: float, seed: int, slope: float) -> None:
    """Both kinds weigh the same, and at the fitted parameters the penalised likelihood is at its peak."""
    torch.manual_seed(seed)
    labels = [0, 0, 0, 0, 1, 1, 2, 2, 2, 3]
    features = apart * torch.eye(6)[labels] + 0.5 * torch.randn(10, 6)
    known = Familiarities(features, torch.tensor(labels)).fit()
    assert known is not None
    familiar, strange = plain_kinds(features.double(), labels)
    assert (len(familiar), len(strange)) == (9, 10)
    values = np.array([*familiar, *strange])
    truth = np.array([1.0] * 9 + [0.0] * 10)
    weight = np.array([19 / 18] * 9 + [19 / 20] * 10)
    wrong = weight * (known.chance(values) - truth)
    # the intercept has no penalty; the slope of standardised values has one of slope^2 / 2
    assert abs(wrong.sum()) < 1e-3
    assert (wrong * (values - values.mean()) / values.std()).sum() == pytest.approx(
        -known.slope * values.std(), abs=1e-3
    )
    assert known.slope == pytest.approx(slope, abs=2e-3)
    assert known.chance(np.array(familiar)).mean() > 0.5 > known.chance(np.array(strange)).mean()


def test_familiarity_that_misleads_gives_everything_one_chance() -> None:
    # the images of a class point away from each other, and towards the other class
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [1.0, 0.0], [-1.0, 0.1]])
    assert Familiarities(features, torch.tensor([0, 0, 1, 1])).fit() == Known(0.0, 0.0)
    assert Familiarities(torch.ones(4, 2), torch.tensor([0, 0, 1, 1])).fit() == Known(0.0, 0.0)
    np.testing.assert_array_equal(Known(0.0, 0.0).chance(np.array([-1.0, 0.3])), [0.5, 0.5])


def test_nothing_is_known_where_every_class_has_one_image() -> None:
    assert Familiarities(torch.eye(3), torch.arange(3)).fit() is None


# ---- interval


@pytest.mark.parametrize(
    ("right", "images", "low", "high"),
    [(0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (5, 10, 0.236593, 0.763407), (1, 2, 0.094531, 0.905469),
     (99, 100, 0.945514, 0.998233)],
)  # fmt: skip
def test_wilsons_interval(right: int, images: int, low: float, high: float) -> None:
    """Values of the closed form (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n), z = 1.959964."""
    assert of_share(right, images) == pytest.approx((low, high), abs=2e-6)
