"""Intervals of shares: Wilson's by hand, and how often the interval of the mean over classes holds the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from smkd.fewshot import intervals

RUNS = 1_000
COUNTS = st.integers(1, 40).flatmap(lambda images: st.tuples(st.integers(0, images), st.just(images)))


def test_interval_of_a_share() -> None:
    assert intervals.of_share(44, 50) == pytest.approx((0.7620, 0.9438), abs=1e-4)  # Wilson's, by hand
    assert intervals.of_share(0, 5)[0] == 0
    assert intervals.of_share(5, 5)[1] == 1


def coverage(shares: NDArray[np.float64], images: NDArray[np.int64]) -> float:
    """How often the interval holds the mean of the classes' true shares [runs, classes]."""
    rights = np.random.default_rng(0).binomial(images, shares)
    found = [intervals.of_class_mean(right, images.tolist()) for right in rights]
    return float(np.mean([low <= mean <= high for (low, high), mean in zip(found, shares.mean(axis=1), strict=True)]))


@pytest.mark.parametrize("classes", [3, 5, 10, 40])
@pytest.mark.parametrize("sizes", [(3,), (3, 30), (6, 31, 12), (3, 5, 9, 16, 30)], ids=str)
def test_the_mean_over_classes_is_covered(classes: int, sizes: tuple[int, ...]) -> None:
    images, rng = np.resize(np.array(sizes), classes), np.random.default_rng(1)
    # classes alike and classes that differ, easy and hard
    for a, b in ((20, 20), (2, 2), (6, 2), (2, 6)):
        assert 0.9 <= coverage(rng.beta(a, b, (RUNS, classes)), images) <= 0.98


def test_the_share_of_all_images_would_not_be() -> None:
    # a class of six images of which none is right beside classes that do well: what all images say is another number
    images, shares = np.array([6, 31, 31]), np.tile([0.02, 0.8, 0.8], (RUNS, 1))
    rights = np.random.default_rng(0).binomial(images, shares)
    pooled = [intervals.of_share(int(right.sum()), int(images.sum())) for right in rights]
    assert np.mean([low <= shares[0].mean() <= high for low, high in pooled]) < 0.2
    assert coverage(shares, images) > 0.9


def test_equal_classes_are_nearly_one_share() -> None:
    assert intervals.of_class_mean([20] * 10, [50] * 10) == pytest.approx(intervals.of_share(200, 500), abs=2e-3)


@settings(deadline=None)
@given(st.lists(COUNTS, min_size=1, max_size=12))
def test_intervals_hold_the_mean_and_stay_within_bounds(counts: list[tuple[int, int]]) -> None:
    right, images = zip(*counts, strict=True)
    low, high = intervals.of_class_mean(right, images)
    mean = float(np.mean(np.array(right) / np.array(images)))
    assert 0 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= 1
    assert low < high  # some doubt is always left
    # more images of each class with the same shares: less doubt
    more = intervals.of_class_mean([9 * each for each in right], [9 * each for each in images])
    assert more[1] - more[0] < high - low


def test_interval_of_a_paired_gain() -> None:
    # of 50 images 10 are gained and 2 lost: 8 / 52 -+ 1.96 sqrt(13 / 52 - (8 / 52)^2) / sqrt(52), by hand
    first, second = (
        np.repeat([True, False, True, False], [20, 10, 2, 18]),
        np.repeat([True, True, False, False], [20, 10, 2, 18]),
    )
    gain = intervals.of_paired_gain(first, second)
    assert tuple(gain) == pytest.approx((16.0, 2.454, 28.315), abs=2e-3)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_a_paired_gain_stays_within_bounds(pairs: list[tuple[bool, bool]]) -> None:
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    gain = intervals.of_paired_gain(first, second)
    assert -100 <= gain.low <= gain.points <= gain.high <= 100
    back = intervals.of_paired_gain(second, first)
    assert (back.points, back.low, back.high) == pytest.approx((-gain.points, -gain.high, -gain.low))
