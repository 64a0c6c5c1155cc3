"""Episodes, counted predictions, accuracies and comparisons against slow, obvious versions."""

from __future__ import annotations

import doctest
import math
import re

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from smkd import fewshot
from smkd.config import loading
from smkd.config.loading import check_protocol
from smkd.config.protocol import ProtocolConfig
from smkd.errors import ConfigError, DataError
from smkd.fewshot import accuracy, scoring
from smkd.fewshot.accuracy import Result, accuracies, compare_results, evaluate_features, summary, with_preset
from smkd.fewshot.episodes import Episodes, Members, Shape, draw, large_enough
from smkd.fewshot.features import Features, concatenated
from smkd.fewshot.head import Head
from smkd.fewshot.heads import make_head
from smkd.fewshot.scoring import count_predictions

NAMES = [f"class-{c}" for c in range(8)]
CPU = torch.Generator()


def unequal_labels() -> NDArray[np.int64]:
    return np.random.default_rng(0).permutation(np.repeat(np.arange(8), [9, 12, 15, 9, 20, 11, 9, 10]))


def clusters(labels: NDArray[np.int64], dim: int = 12, spread: float = 1.2) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(int(labels.max()) + 1, dim, generator=rng)
    return centres[labels] + spread * torch.randn(len(labels), dim, generator=rng)


def drawn(query: int | str, episodes: int = 250, seed: int = 3, shot: int = 2) -> Episodes:
    members = Members(unequal_labels(), 8)
    return draw(members, Shape(5, shot, query), episodes=episodes, seed=seed)


def queries_of(episodes: Episodes, number: int) -> list[tuple[int, int]]:
    """Row and true way of each query of an episode, from the labels alone."""
    labels = unequal_labels()
    if episodes.query is not None:
        assert episodes.truth is not None
        return list(zip(episodes.query[number].tolist(), episodes.truth[number].tolist(), strict=True))
    support = set(episodes.support[number].flatten().tolist())
    ways = episodes.classes[number].tolist()
    return [(row, ways.index(c)) for row, c in enumerate(labels.tolist()) if c in ways and row not in support]


# ---- episodes


@pytest.mark.parametrize("query", [4, "all"])
def test_episodes_hold_different_images_of_different_classes(query: int | str) -> None:
    labels = unequal_labels()
    episodes = drawn(query)
    assert episodes.support.shape == (250, 5, 2)
    for number, (classes, support) in enumerate(zip(episodes.classes, episodes.support, strict=True)):
        assert len(set(classes.tolist())) == 5
        assert (labels[support] == classes[:, None].numpy()).all()
        queries = queries_of(episodes, number)
        assert all(labels[row] == classes[way] for row, way in queries)
        rows = [*support.flatten().tolist(), *(row for row, _ in queries)]
        assert len(set(rows)) == len(rows)
        if query == 4:
            assert np.bincount([way for _, way in queries]).tolist() == [4] * 5


def test_episodes_are_a_pure_function_of_the_seed_and_use_every_image() -> None:
    first, again, other = drawn(4), drawn(4), drawn(4, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))  # type: ignore[arg-type]
    assert not torch.equal(first.support, other.support)
    assert set(first.support.flatten().tolist()) == set(range(len(unequal_labels())))
    # more episodes begin with the same ones; other shots have the same classes
    assert torch.equal(drawn(4, episodes=120).support, first.support[:120])
    assert torch.equal(drawn("all", shot=5).classes, first.classes)


def test_episodes_do_not_depend_on_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        several = drawn(4)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(several.support, drawn(4).support)


def test_every_image_is_as_often_support_as_query_as_any_other() -> None:
    """Also the order is random: Floyd's algorithm alone would put the last images last."""
    members = Members(np.repeat(np.arange(3), 6), 3)
    episodes = draw(members, Shape(2, 1, 2), episodes=30_000, seed=0)
    assert episodes.query is not None
    for rows, per_episode in ((episodes.support, 2), (episodes.query, 4)):
        seen = torch.bincount(rows.flatten(), minlength=18).double()
        expected = 30_000 * per_episode / 18
        assert (seen - expected).abs().max() < 5 * math.sqrt(expected)
    assert torch.bincount(episodes.classes[:, 0]).double().sub(10_000).abs().max() < 500


def test_unbalanced_queries() -> None:
    members = Members(np.repeat(np.arange(8), 70), 8)
    episodes = draw(members, Shape(5, 1, 12, 2.0), episodes=4_000, seed=0)
    assert episodes.query is not None
    assert episodes.truth is not None
    assert episodes.query.shape == (4_000, 60)
    counts = torch.nn.functional.one_hot(episodes.truth, 5).sum(dim=1).double()
    shares = counts / 60
    assert (counts.sum(dim=1) == 60).all()
    assert shares.mean(dim=0).tolist() == pytest.approx([0.2] * 5, abs=0.01)
    # variance of a share of Dirichlet(2, 2, 2, 2, 2)
    assert shares.var(dim=0).mean() == pytest.approx(0.2 * 0.8 / 11, rel=0.08)
    rows = torch.cat([episodes.support.flatten(1), episodes.query], dim=1)
    assert all(len(set(row.tolist())) == 65 for row in rows[:200])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"way": 9, "shot": 1, "query": 1}, r"^way=9, but the val split has only 8 classes \(.*\); set way=8$"),
        (
            {"way": 5, "shot": 5, "query": 15},
            "of the val split has 9 images, but shot=5 and query=15 need at least 20",
        ),
        (
            {"way": 5, "shot": 11, "query": "all"},
            "class 'class-0' of the val split has 9 images, but shot=11 and query=all need",
        ),
        (
            {"way": 5, "shot": 1, "query": 3, "dirichlet": 2.0},
            "class 'class-0' .* 9 images.*need at least 16",
        ),
        ({"way": 5, "shot": 1, "query": "all", "dirichlet": 2.0}, "need a number of queries"),
    ],
)
def test_too_few_classes_or_images_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        large_enough(np.bincount(unequal_labels()), NAMES, Shape(**settings), what="the val split")  # type: ignore[arg-type]


# ---- predictions


def slow_counts(features: Tensor, episodes: Episodes, head: Head) -> Tensor:
    """One episode, one query at a time; the head is called with that query alone."""
    way, shot = episodes.support.shape[1:]
    counts = torch.zeros(len(episodes.classes), way, way, dtype=torch.int64)
    labels = torch.arange(way).repeat_interleave(shot)[None]
    for number, support in enumerate(episodes.support):
        for row, truth in queries_of(episodes, number):
            scores = head(features[support].flatten(0, 1)[None], labels, features[row][None, None], CPU)[0, 0].tolist()
            counts[number, truth, scores.index(max(scores))] += 1
    return counts


@pytest.mark.parametrize("query", [4, "all"])
@pytest.mark.parametrize("spec", ["prototype", "prototype:metric=euclidean", "knn:neighbours=4", "ridge"])
def test_counts_equal_the_slow_ones(query: int | str, spec: str) -> None:
    labels = unequal_labels()
    features, episodes, head = clusters(labels), drawn(query, episodes=25), make_head(spec)
    fast = count_predictions(features, Members(labels, 8), episodes, head, seed=0)
    assert torch.equal(fast, slow_counts(features, episodes, head))
    assert 30 < float(accuracies(fast).mean()) < 95


@pytest.mark.parametrize("query", [4, "all"])
@pytest.mark.parametrize("spec", ["prototype", "knn", "classifier:epochs=3", "logistic", "tim:iterations=5"])
def test_counts_do_not_depend_on_what_is_held_at_once(
    query: int | str, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.repeat(np.arange(8), 9)
    features, members, head = clusters(labels), Members(labels, 8), make_head(spec)
    episodes = draw(members, Shape(5, 2, query), episodes=70, seed=0)
    whole = count_predictions(features, members, episodes, head, seed=0)
    for name in ("RULE_NUMBERS", "PRODUCT_NUMBERS", "GATHERED_NUMBERS", "EPISODE_NUMBERS"):
        monkeypatch.setattr(scoring, name, 2_000)
    assert torch.equal(count_predictions(features, members, episodes, head, seed=0), whole)


def test_a_plain_function_gives_the_same_as_the_built_in_head() -> None:
    def nearest_mean(support: Tensor, labels: Tensor, query: Tensor, generator: torch.Generator) -> Tensor:
        means = torch.stack([support[:, labels[0] == way].mean(dim=1) for way in range(5)], dim=1)
        return torch.cosine_similarity(query[:, :, None], means[:, None], dim=-1)

    labels = np.repeat(np.arange(8), 9)
    features, members = clusters(labels), Members(labels, 8)
    for query in (4, "all"):
        episodes = draw(members, Shape(5, 2, query), episodes=30, seed=0)
        own = count_predictions(features, members, episodes, nearest_mean, seed=0)
        assert torch.equal(own, count_predictions(features, members, episodes, make_head("prototype"), seed=0))


def test_heads_that_see_all_queries_want_as_many_of_each_class() -> None:
    labels = unequal_labels()
    with pytest.raises(DataError, match="query=all gives 7 to 18: set a number of queries"):
        count_predictions(clusters(labels), Members(labels, 8), drawn("all"), make_head("bd-cspn"), seed=0)


# ---- accuracy


def test_interval_is_of_the_population_over_episodes() -> None:
    values = torch.tensor([50.0, 60.0, 80.0], dtype=torch.float64)
    mean, interval = summary(values)
    assert mean == pytest.approx(190 / 3)
    assert interval == pytest.approx(1.96 * np.std(values.numpy()) / np.sqrt(3))


@pytest.mark.slow
def test_the_interval_of_600_episodes_holds_the_mean_of_many() -> None:
    """In 90 to 98 of 100 other seeds; 95 is what it says."""
    labels = np.repeat(np.arange(12), 40)
    features = clusters(labels, dim=16, spread=2.0)

    def measured(episodes: int, seed: int) -> Result:
        return fewshot.evaluate(features, labels, episodes=episodes, seed=seed)

    truth = measured(10_000, 10_000).mean
    held = 0
    for seed in range(200):
        result = measured(600, seed)
        held += abs(result.mean - truth) <= result.ci95
    assert 180 <= held <= 196


def test_results_carry_their_protocol() -> None:
    labels = unequal_labels()
    features = Features(torch.nn.functional.one_hot(torch.from_numpy(labels)).float(), labels, NAMES, skipped=2)
    protocol = ProtocolConfig(shots=(1, 3), query=5, episodes=30, seed=9, head="knn:neighbours=1", split="val")
    results = evaluate_features(features, protocol)
    assert [(r.shot, r.mean, r.ci95) for r in results] == [(1, 100.0, 0.0), (3, 100.0, 0.0)]
    values = results[0].as_dict()
    assert values == {
        "way": 5, "shot": 1, "query": 5, "episodes": 30, "seed": 9, "head": "knn:neighbours=1", "transductive": False,
        "split": "val", "mean": 100.0, "ci95": 0.0, "query_dirichlet": None, "skipped": 2, "without": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [
        ("paper", "prototype", ("all", 10_000)),
        ("paper", "classifier:loss=softmax", ("all", 1_000)),
        ("standard", "classifier", (15, 10_000)),
        ("fair600", "tim", (15, 600)),
    ],
)
def test_presets(name: str, head: str, expected: tuple[int | str, int]) -> None:
    protocol = with_preset(check_protocol(head=head, way=7), name)
    assert (protocol.query, protocol.episodes, protocol.way) == (*expected, 7)


# ---- the library


def test_the_example_of_the_docstring_runs() -> None:
    tried = doctest.testmod(accuracy)
    assert tried.attempted >= 6
    assert tried.failed == 0


def test_any_arrays_and_labels_give_the_same_result() -> None:
    labels = unequal_labels()
    features = clusters(labels)
    expected = fewshot.evaluate(features, labels, query=4, episodes=50)
    for given_features, given_labels in (
        (features.numpy().astype(np.float64), labels.tolist()),
        (features.half().float(), torch.from_numpy(labels) + 100),
        (features, [NAMES[label] for label in labels]),
    ):
        result = fewshot.evaluate(given_features, given_labels, query=4, episodes=50)
        assert result.mean == pytest.approx(expected.mean, abs=0.5)
    assert result.class_names == NAMES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "protoype"}, "head 'protoype' is unknown; did you mean 'prototype'?"),
        ({"head": "knn:neighbors=3"}, "has no option 'neighbors'"),
        ({"head": "knn:neighbours=many"}, "neighbours=many is not a int"),
        ({"head": "knn:neighbours=0"}, "neighbours=0 must be at least 1"),
        ({"head": "prototype:metric=manhattan"}, "metric=manhattan: expected cosine, euclidean"),
        ({"head": "simpleshot:transform=cl2n"}, "cl2n needs the features of the training classes"),
        ({"way": 1}, "way=1: input should be greater than or equal to 2"),
        ({"episodes": 0}, "episodes=0: input should be greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_one_clear_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fewshot.evaluate(clusters(unequal_labels()), unequal_labels(), **{"query": 4, **changes})  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_features_are_one_clear_line() -> None:
    labels = unequal_labels()
    broken = clusters(labels)
    broken[[3, 5], 0] = float("nan")
    with pytest.raises(DataError, match=r"2 of 95 rows are NaN or infinite .rows 3, 5"):
        fewshot.evaluate(broken, labels)
    with pytest.raises(DataError, match=r"labels not matching features .94 labels, 95 features"):
        fewshot.evaluate(clusters(labels), labels[:-1])
    with pytest.raises(DataError, match="labels are float64, expected integers or text"):
        fewshot.evaluate(clusters(labels), labels.astype(float))


# ---- comparing and joining


def test_paired_comparison_against_plain_numbers() -> None:
    labels = unequal_labels()
    first = fewshot.evaluate(clusters(labels), labels, query=4, episodes=300, shot=2)
    second = fewshot.evaluate(clusters(labels, spread=0.9), labels, query=4, episodes=300, shot=2)
    found = compare_results(first, second)
    differences = (second.accuracies - first.accuracies).numpy()
    assert found.difference == pytest.approx(differences.mean())
    assert found.difference == pytest.approx(second.mean - first.mean)
    assert found.ci95 == pytest.approx(1.96 * differences.std() / np.sqrt(300))
    assert found.wins == pytest.approx(100 * (differences > 0).mean())
    assert found.ties == pytest.approx(100 * (differences == 0).mean())
    assert found.verdict("a", "b") == f"b is better than a by {found.difference:.2f} ± {found.ci95:.2f} points"
    assert compare_results(second, first).verdict("b", "a").startswith("b is better than a")
    assert "no difference shown" in compare_results(first, first).verdict()


def test_only_results_on_the_same_episodes_are_compared() -> None:
    labels = unequal_labels()
    first = fewshot.evaluate(clusters(labels), labels, query=4, episodes=30)
    for changes in ({"seed": 1}, {"episodes": 29}, {"query": 3}, {"shot": 2}):
        other = fewshot.evaluate(clusters(labels), labels, **{"query": 4, "episodes": 30, **changes})
        with pytest.raises(DataError, match="not of the same episodes"):
            compare_results(first, other)


def test_concatenated_features() -> None:
    labels = unequal_labels()
    one, two = (Features(clusters(labels, dim), labels, NAMES) for dim in (12, 7))
    both = concatenated([one, two])
    assert torch.equal(both.values, torch.cat([one.values, two.values], dim=1))
    with pytest.raises(DataError, match="not features of the same images: labels differ from row"):
        concatenated([one, Features(one.values, np.roll(labels, 1), NAMES)])
    with pytest.raises(DataError, match="not features of the same images: 95 rows and 94 rows"):
        concatenated([one, Features(one.values[1:], labels[1:], NAMES)])
    with pytest.raises(DataError, match="not features of the same classes: 'class-0' and 'ant'"):
        concatenated([one, Features(one.values, labels, ["ant", *NAMES[1:]])])


# ---- training


def test_training_cannot_select_on_test_classes() -> None:
    with pytest.raises(ConfigError, match=r"validation\.split=test: input should be 'val'"):
        loading.resolve("debug-pretrain", ["validation.split=test"])


def test_wandb_is_off_unless_asked_for() -> None:
    assert not any(loading.resolve(name).wandb for name in loading.recipe_names())


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ([30], Shape(5, 1, 15)),
        ([30, 30, 30], Shape(5, 1, 15)),
        ([30, 30, 9, 8, 7], Shape(5, 1, 15)),
        ([30, 30, 9, 8, 7], Shape(3, 10, 15)),
        ([30, 30, 9, 8, 7], Shape(3, 10, "all")),
        ([3, 3, 3], Shape(3, 4, "all")),
        ([30, 30, 9, 8, 7], Shape(5, 1, 5, 1.0)),
    ],
)
def test_the_way_out_that_is_named_is_one(sizes: list[int], shape: Shape) -> None:
    names = [f"class-{label}" for label in range(len(sizes))]
    with pytest.raises(DataError) as error:
        large_enough(np.array(sizes), names, shape, group="validation", other="stop")
    told = re.search(r"; set validation\.(way|query)=(\d+), or stop$", str(error.value))
    if told is None:
        assert re.search(r"; (add images, or set fewer|episodes need at least two).*, or stop$", str(error.value))
        assert len(sizes) < 2 or sum(size >= shape.needed for size in sizes) < 2
        return
    changed = shape._replace(**{told[1]: int(told[2])})
    assert len(large_enough(np.array(sizes), names, changed)) >= changed.way
