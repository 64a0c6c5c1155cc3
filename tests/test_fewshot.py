"""Episodes, heads and accuracies against slow, obvious versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from smkd.config import loading
from smkd.config.schema import ProtocolConfig
from smkd.errors import ConfigError, DataError
from smkd.fewshot import heads
from smkd.fewshot.episodes import Episodes, draw
from smkd.fewshot.evaluate import episode_accuracies, evaluate_features, summary
from smkd.fewshot.features import Features

NAMES = [f"class-{c}" for c in range(8)]


def unequal_labels() -> NDArray[np.int64]:
    return np.random.default_rng(0).permutation(np.repeat(np.arange(8), [9, 12, 15, 9, 20, 11, 9, 10]))


def drawn(query: int | str, episodes: int = 250, seed: int = 3, shot: int = 2) -> Episodes:
    labels = unequal_labels()
    parts = list(draw(labels, NAMES, way=5, shot=shot, query=query, episodes=episodes, seed=seed))
    return Episodes(torch.cat([p.support for p in parts]), torch.cat([p.query for p in parts]))


@pytest.mark.parametrize("query", [4, "all"])
def test_episodes_hold_different_images_of_different_classes(query: int | str) -> None:
    labels = unequal_labels()
    episodes = drawn(query)
    assert episodes.support.shape == (250, 5, 2)
    for support, queries in zip(episodes.support.numpy(), episodes.query.numpy(), strict=True):
        classes = [set(labels[row]) for row in support]
        assert all(len(found) == 1 for found in classes)
        assert len(set.union(*classes)) == 5
        for way in range(5):
            chosen = queries[way][queries[way] >= 0]
            assert set(labels[chosen]) == classes[way]
            everything = [*support[way], *chosen]
            assert len(set(everything)) == len(everything)
            of_class = int((labels == labels[support[way][0]]).sum())
            assert len(chosen) == (4 if query == 4 else of_class - 2)


def test_episodes_are_a_pure_function_of_the_seed_and_use_every_image() -> None:
    first, again, other = drawn(4), drawn(4), drawn(4, seed=4)
    assert torch.equal(first.support, again.support)
    assert torch.equal(first.query, again.query)
    assert not torch.equal(first.support, other.support)
    assert set(first.support.flatten().tolist()) == set(range(len(unequal_labels())))
    # more episodes begin with the same ones
    assert torch.equal(drawn(4, episodes=120).support, first.support[:120])


def test_too_few_classes_or_images_are_named() -> None:
    with pytest.raises(DataError, match="way=9, but the split has only 8 classes"):
        next(iter(draw(unequal_labels(), NAMES, way=9, shot=1, query=1, episodes=1, seed=0)))
    with pytest.raises(DataError, match="class 'class-0' has 9 images, but shot=5 and query=15 need at least 20"):
        next(iter(draw(unequal_labels(), NAMES, way=5, shot=5, query=15, episodes=1, seed=0)))


def slow_accuracy(features: Tensor, support: Tensor, queries: Tensor, head: str, neighbours: int) -> float:
    """One episode, one query at a time, in float64."""
    right, count = 0, 0
    x = features.double()
    for truth in range(len(queries)):
        for row in queries[truth].tolist():
            if row < 0:
                continue
            if head == "prototype":
                scores = [float(torch.cosine_similarity(x[row], x[way].mean(dim=0), dim=0)) for way in support]
            else:
                found = [
                    (float(torch.cosine_similarity(x[row], x[image], dim=0)), way)
                    for way, images in enumerate(support)
                    for image in images
                ]
                scores = [0.0] * len(support)
                for cosine, way in sorted(found, reverse=True)[:neighbours]:
                    scores[way] += cosine
            right += max(range(len(scores)), key=scores.__getitem__) == truth
            count += 1
    return 100 * right / count


@pytest.mark.parametrize("query", [4, "all"])
@pytest.mark.parametrize(("head", "neighbours"), [("prototype", 1), ("knn", 1), ("knn", 4)])
def test_accuracies_equal_the_slow_ones(query: int | str, head: str, neighbours: int) -> None:
    rng = torch.Generator().manual_seed(0)
    labels = torch.from_numpy(unequal_labels())
    centres = torch.randn(8, 12, generator=rng)
    features = centres[labels] + 1.2 * torch.randn(len(labels), 12, generator=rng)
    episodes = drawn(query, episodes=40)
    fast = episode_accuracies(features, episodes, head, neighbours)
    slow = [slow_accuracy(features, s, q, head, neighbours) for s, q in zip(*episodes, strict=True)]
    assert fast.tolist() == pytest.approx(slow)
    assert 30 < float(fast.mean()) < 95


def test_knn_is_perfect_on_separable_one_shot_data() -> None:
    """The published code answers way 0 there: 20 %."""
    support = torch.eye(5)[None, :, None]
    query = torch.eye(5).repeat_interleave(3, dim=0)[None]
    assert heads.knn(support, query, neighbours=1).argmax(dim=-1).tolist() == [[c for c in range(5) for _ in range(3)]]


def test_interval_is_of_the_population_over_episodes() -> None:
    accuracies = torch.tensor([50.0, 60.0, 80.0], dtype=torch.float64)
    mean, interval = summary(accuracies)
    assert mean == pytest.approx(190 / 3)
    assert interval == pytest.approx(1.96 * np.std(accuracies.numpy()) / np.sqrt(3))


def test_results_carry_their_protocol() -> None:
    labels = unequal_labels()
    features = Features(torch.nn.functional.one_hot(torch.from_numpy(labels)).float(), labels, NAMES, skipped=2)
    protocol = ProtocolConfig(shots=(1, 3), query=5, episodes=30, seed=9, head="knn", neighbours=1, split="val")
    results = evaluate_features(features, protocol)
    assert [(r.shot, r.mean, r.ci95) for r in results] == [(1, 100.0, 0.0), (3, 100.0, 0.0)]
    assert (results[0].query, results[0].episodes, results[0].seed, results[0].head, results[0].split) == (
        5, 30, 9, "knn", "val",
    )  # fmt: skip
    assert results[0].skipped == 2


def test_training_cannot_select_on_test_classes() -> None:
    with pytest.raises(ConfigError, match=r"validation\.split=test: input should be 'val'"):
        loading.resolve("debug-pretrain", ["validation.split=test"])


def test_wandb_is_off_unless_asked_for() -> None:
    assert not any(loading.resolve(name).wandb for name in loading.recipe_names())
