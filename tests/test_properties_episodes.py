"""What holds of any episodes: whatever the classes, ways, shots and queries, and however the work is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from smkd.config.protocol import ProtocolConfig
from smkd.errors import DataError
from smkd.fewshot import scoring
from smkd.fewshot.accuracy import evaluate_features, measure
from smkd.fewshot.episodes import Members, Shape, draw, large_enough
from smkd.fewshot.features import Features
from smkd.fewshot.heads import make_head

CHUNKS = ("RULE_NUMBERS", "PRODUCT_NUMBERS", "GATHERED_NUMBERS", "EPISODE_NUMBERS")
HEADS = ("prototype", "simpleshot", "knn", "ridge")


@st.composite
def shapes(some: Callable[..., Any]) -> Shape:
    query = some(st.one_of(st.integers(1, 4), st.just("all")))
    dirichlet = some(st.one_of(st.none(), st.floats(0.3, 5))) if query != "all" else None
    return Shape(some(st.integers(2, 4)), some(st.integers(1, 4)), query, dirichlet)


@st.composite
def splits(some: Callable[..., Any]) -> tuple[NDArray[np.int64], Shape]:
    """Labels in random order, of which at least as many classes as ways are large enough, and a shape."""
    shape = some(shapes())
    large = some(st.lists(st.integers(shape.needed, shape.needed + 6), min_size=shape.way, max_size=7))
    small = some(st.lists(st.integers(0, shape.needed - 1), max_size=3))
    sizes = some(st.permutations([*large, *small]))
    rng = np.random.default_rng(some(st.integers(0, 99)))
    return rng.permutation(np.repeat(np.arange(len(sizes)), sizes)), shape


def named(labels: NDArray[np.int64], count: int) -> list[str]:
    return [f"class-{label}" for label in range(count)]


@settings(deadline=None, max_examples=150)
@given(splits(), st.integers(0, 2**31))
def test_support_and_queries(split: tuple[NDArray[np.int64], Shape], seed: int) -> None:
    labels, shape = split
    count = int(labels.max()) + 1
    sizes = np.bincount(labels)
    kept = large_enough(sizes, named(labels, count), shape)
    assert kept.tolist() == [label for label in range(count) if sizes[label] >= shape.needed]
    members = Members(labels, count).of(kept)
    drawn = draw(members, shape, episodes=12, seed=seed)
    fewer = draw(members, shape, episodes=5, seed=seed)
    assert torch.equal(drawn.support[:5], fewer.support)
    whole = drawn
    if drawn.query is None:
        if len(set(members.sizes.tolist())) > 1:  # written out only where classes are of one size
            assert shape.query == "all"
        else:
            whole = scoring.with_all_queries(drawn, members)
    for number in range(12):
        classes = kept[drawn.classes[number]]
        assert len(set(classes.tolist())) == shape.way
        support = drawn.support[number]
        assert support.shape == (shape.way, shape.shot)
        assert (labels[support] == classes[:, None]).all()
        rows = set(support.flatten().tolist())
        assert len(rows) == shape.way * shape.shot
        if whole.query is None or whole.truth is None:
            continue
        asked, truth = whole.query[number], whole.truth[number]
        assert rows.isdisjoint(asked.tolist())
        assert len(set(asked.tolist())) == len(asked)
        assert (labels[asked] == classes[truth]).all()
        of_way = truth.bincount(minlength=shape.way).tolist()
        if shape.query == "all":
            assert of_way == [sizes[label] - shape.shot for label in classes]
        elif shape.dirichlet:
            assert sum(of_way) == shape.way * int(shape.query)
        else:
            assert of_way == [shape.query] * shape.way


@settings(deadline=None, max_examples=60)
@given(splits(), st.sampled_from(HEADS), st.integers(1, 3_000), st.integers(0, 99))
def test_numbers_do_not_depend_on_how_the_work_is_cut(
    split: tuple[NDArray[np.int64], Shape], head: str, most: int, seed: int
) -> None:
    labels, shape = split
    count = int(labels.max()) + 1
    values = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(seed))
    features = Features(values, labels, named(labels, count))
    protocol = ProtocolConfig(
        way=shape.way, shots=(shape.shot,), query=shape.query, query_dirichlet=shape.dirichlet, episodes=9, seed=seed,
        head=head,
    )  # fmt: skip
    result = evaluate_features(features, protocol)[0]
    with pytest.MonkeyPatch.context() as patch:
        for name in CHUNKS:
            patch.setattr(scoring, name, most)
        again = evaluate_features(features, protocol)[0]
    assert torch.equal(result.counts, again.counts)
    assert result == again
    # and what is counted is a share
    assert 0 <= result.mean <= 100
    assert 0 <= result.ci95 <= 1.96 * 50
    assert (result.accuracies >= 0).all()
    assert (result.accuracies <= 100).all()
    small = [f"class-{label}" for label, size in enumerate(np.bincount(labels)) if size < shape.needed]
    assert bool(small) == bool(result.without)
    assert set(result.class_names) == set(features.class_names) - set(small)
    queries = result.counts.sum(dim=(1, 2))
    assert (queries == shape.way * int(shape.query)).all() if shape.query != "all" else (queries > 0).all()


@settings(deadline=None, max_examples=60)
@given(splits())
def test_classes_that_are_too_small_are_as_if_they_were_not_there(split: tuple[NDArray[np.int64], Shape]) -> None:
    labels, shape = split
    count = int(labels.max()) + 1
    values = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(0))
    kept = np.flatnonzero(np.bincount(labels) >= shape.needed)
    rows = np.isin(labels, kept)
    protocol = ProtocolConfig(
        way=shape.way, shots=(shape.shot,), query=shape.query, query_dirichlet=shape.dirichlet, episodes=6
    )
    all_there = Features(values, labels, named(labels, count))
    without = Features(values[rows], np.searchsorted(kept, labels[rows]), [f"class-{label}" for label in kept])
    first, second = (measure(each, protocol, shape.shot, make_head("knn")) for each in (all_there, without))
    assert torch.equal(first.counts, second.counts)
    assert first.class_names == second.class_names


@settings(deadline=None)
@given(shapes(), st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_too_few_large_classes_are_refused(shape: Shape, sizes: list[int]) -> None:
    names = [f"class-{label}" for label in range(len(sizes))]
    enough = [size for size in sizes if size >= shape.needed]
    if len(enough) >= shape.way:
        assert len(large_enough(np.array(sizes), names, shape)) == len(enough)
        return
    with pytest.raises(DataError) as raised:
        large_enough(np.array(sizes), names, shape)
    assert "\n" not in str(raised.value)
    assert "way=" in str(raised.value)
