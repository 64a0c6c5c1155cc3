"""Inductive heads, one episode at a time in float64 and against scikit-learn; the registry."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from torch import Tensor

from smkd import extensions
from smkd.errors import ConfigError
from smkd.fewshot.head import rule_products
from smkd.fewshot.heads import head_names, heads, make_head
from smkd.fewshot.linear import balanced_logistic
from smkd.fewshot.sgd import Classifier, Start, train_dist, train_softmax

Array = NDArray[np.float64]
# support, labels, queries of one episode -> scores [queries, way]
Twin = Callable[[Array, NDArray[np.int64], Array], Array]
EPISODES = 200
BASE_MEAN = np.linspace(-0.5, 1.0, 24)
TIE = 1e-4


def episodes(way: int, shots: list[int], dim: int = 24, queries: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Clustered features, some with a shared mean, some non-negative, of very different lengths."""
    rng = torch.Generator().manual_seed(way + 10 * sum(shots))
    count = EPISODES // 4
    centres = torch.randn(count, way, dim, generator=rng)
    labels = torch.repeat_interleave(torch.arange(way), torch.tensor(shots)).expand(count, -1)
    truth = torch.randint(way, (count, queries), generator=rng)

    def around(of: Tensor) -> Tensor:
        chosen = centres.gather(1, of[..., None].expand(-1, -1, dim))
        values = chosen + 1.1 * torch.randn(*of.shape, dim, generator=rng)
        values[::3] += 1.0
        values[1::3] = values[1::3].relu()
        return values * torch.tensor([0.1, 1.0, 8.0])[torch.arange(count) % 3, None, None]

    return around(labels), labels, around(truth)


SHAPES = [(5, [1] * 5), (5, [5] * 5), (3, [1, 4, 2]), (8, [3] * 8)]


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def way_means(support: Array, labels: NDArray[np.int64]) -> list[Array]:
    return [support[labels == way].mean(axis=0) for way in range(labels.max() + 1)]


def slow_prototype(support: Array, labels: NDArray[np.int64], query: Array) -> Array:
    return np.array([[cosine(q, mean) for mean in way_means(support, labels)] for q in query])


def slow_euclidean(support: Array, labels: NDArray[np.int64], query: Array) -> Array:
    return np.array([[-float(np.square(q - mean).sum()) for mean in way_means(support, labels)] for q in query])


def slow_simpleshot(transform: str) -> Twin:
    def transformed(values: Array) -> Array:
        if transform == "cl2n":
            values = values - BASE_MEAN
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    return lambda support, labels, query: slow_euclidean(transformed(support), labels, transformed(query))


def slow_knn(neighbours: int, reference: bool = False) -> Twin:
    def scores(support: Array, labels: NDArray[np.int64], query: Array) -> Array:
        way = labels.max() + 1
        votes = np.zeros((len(query), way))
        for number, q in enumerate(query):
            found = sorted(((cosine(q, item), place) for place, item in enumerate(support)), reverse=True)
            for similarity, place in found[:neighbours]:
                voted = place // way if reference else labels[place]
                if voted < way:
                    votes[number, voted] += similarity
        return votes

    return scores


def sklearn_ridge(alpha: float) -> Twin:
    return lambda support, labels, query: RidgeClassifier(alpha=alpha).fit(support, labels).decision_function(query)


def sklearn_logistic(c: float) -> Twin:
    def scores(support: Array, labels: NDArray[np.int64], query: Array) -> Array:
        model = LogisticRegression(C=c, tol=1e-9, max_iter=20_000, solver="newton-cg").fit(support, labels)
        found: Array = model.decision_function(query)
        return found

    return scores


TWINS: dict[str, Twin] = {
    "prototype": slow_prototype,
    "prototype:metric=euclidean": slow_euclidean,
    "simpleshot:transform=un": slow_euclidean,
    "simpleshot:transform=l2n": slow_simpleshot("l2n"),
    "simpleshot:transform=cl2n": slow_simpleshot("cl2n"),
    "knn:neighbours=1": slow_knn(1),
    "knn": slow_knn(5),
    "knn:reference=true": slow_knn(5, reference=True),
    "ridge": sklearn_ridge(1.0),
    "ridge:alpha=0.1": sklearn_ridge(0.1),
    "logistic": sklearn_logistic(1.0),
    "logistic:c=30": sklearn_logistic(30.0),
}


def same_predictions(ours: Array, expected: Array) -> int:
    """Equal wherever the twin's two best scores differ by more than rounding; returns the number of ties."""
    best = np.sort(expected, axis=1)
    scale = np.abs(expected).max(axis=1) + 1e-12
    decided = (best[:, -1] - best[:, -2]) > TIE * scale
    assert (ours.argmax(axis=1) == expected.argmax(axis=1))[decided].all()
    return int((~decided).sum())


@pytest.mark.parametrize(("way", "shots"), SHAPES, ids=["1-shot", "5-shot", "unequal", "8-way"])
@pytest.mark.parametrize("spec", TWINS)
def test_heads_equal_their_slow_twins(spec: str, way: int, shots: list[int]) -> None:
    support, labels, query = episodes(way, shots)
    if "reference" in spec and len(set(shots)) > 1:
        pytest.skip("the published count divides by ways, which has no meaning with unequal shots")
    scores = make_head(spec, torch.from_numpy(BASE_MEAN))(support, labels, query, torch.Generator())
    assert scores.shape == (*query.shape[:2], way)
    ties = 0
    for number in range(len(support)):
        s, q = (part[number].double().numpy() for part in (support, query))
        expected = TWINS[spec](s, labels[number].numpy(), q)
        if "reference" in spec or "knn" in spec:
            # a way without a vote is exactly 0 in both
            expected = np.where(np.abs(expected) < 1e-12, 0.0, expected)
            close_to = np.isclose(scores[number].numpy(), expected, atol=1e-5)
            assert close_to.mean() > 0.99
        else:
            ties += same_predictions(scores[number].double().numpy(), expected)
    assert ties < 0.02 * query.shape[0] * query.shape[1]


@pytest.mark.parametrize("c", [0.01, 1.0, 1000.0])
def test_logistic_reaches_the_minimum(c: float) -> None:
    """Scores equal scikit-learn's, also with duplicates and features in few dimensions."""
    support, labels, query = episodes(5, [5] * 5)
    support[1, 3] = support[1, 2]
    support[2, :, 4:] = 0
    scores = make_head(f"logistic:c={c}")(support, labels, query, torch.Generator())
    for number in range(0, len(support), 5):
        expected = sklearn_logistic(c)(
            support[number].double().numpy(), labels[number].numpy(), query[number].double().numpy()
        )
        size = np.abs(expected).max()
        assert np.abs(scores[number].double().numpy() - expected).max() < 1e-3 * size


@pytest.mark.parametrize("shots", [8, 40])
@pytest.mark.parametrize("way", [1, 2, 6])
@pytest.mark.parametrize("dim", [5, 400])
@pytest.mark.parametrize("c", [0.1, 1.0, 10.0])
def test_a_single_support_has_the_answers_of_one_among_many(c: float, dim: int, way: int, shots: int) -> None:
    """The first is solved by scikit-learn where its images are many, the second side by side with another."""
    generator = torch.Generator().manual_seed(way)
    labels = torch.arange(way).repeat_interleave(shots)[None]
    support = torch.randn(2, shots * way, dim, generator=generator) + 2 * torch.randn(1, 1, dim, generator=generator)
    query, head = torch.randn(2, 20, dim, generator=generator), make_head(f"logistic:c={c}")
    expected = head(support, labels.expand(2, -1), query, torch.Generator())[:1]
    found = head(support[:1], labels, query[:1], torch.Generator())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("count", [(9, 40), (3, 1), (50, 50)])
def test_a_balanced_regression_on_one_number_is_scikit_learns(count: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(1, 1, count[0]), rng.normal(-1, 2, count[1])])
    kinds = np.repeat([1, 0], count)
    right = LogisticRegression(class_weight="balanced", tol=1e-10, max_iter=10_000).fit(values[:, None], kinds)
    found = balanced_logistic(torch.from_numpy(values), torch.from_numpy(kinds == 1))
    assert found == pytest.approx((right.coef_[0, 0], right.intercept_[0]), rel=1e-4, abs=1e-6)


def slow_sgd(
    support: Array, labels: NDArray[np.int64], start: Start, order: NDArray[np.int64], loss: str
) -> torch.nn.Linear:
    """PyTorch's own layer and optimiser on one episode in float64."""
    x, y = torch.from_numpy(support), torch.from_numpy(labels)
    way, dim = start.weight.shape[1:]
    layer = torch.nn.Linear(dim, way, bias=loss == "softmax").double()
    with torch.no_grad():
        layer.weight.copy_(start.weight[0])
        if start.bias is not None:
            layer.bias.copy_(start.bias[0])
    if loss == "dist":
        torch.nn.utils.parametrizations.weight_norm(layer, dim=0)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9, dampening=0.9, weight_decay=0.001)
    for epoch in order:
        for items in torch.from_numpy(epoch).split(4):
            logits = layer(x[items]) * (2 if loss == "dist" else 1)
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(logits, y[items]).backward()
            optimiser.step()
    return layer


@pytest.mark.parametrize("loss", ["dist", "softmax"])
@pytest.mark.parametrize(("way", "shots"), SHAPES, ids=["1-shot", "5-shot", "unequal", "8-way"])
def test_classifier_equals_plain_sgd(loss: str, way: int, shots: list[int]) -> None:
    support, labels, query = episodes(way, shots)
    head = Classifier(loss=loss)  # type: ignore[arg-type]
    support, query = head.prepare(support), head.prepare(query)
    count, n = labels.shape
    rng = torch.Generator().manual_seed(1)
    weight = 0.2 * torch.randn(count, way, 24, generator=rng)
    bias = 0.1 * torch.randn(count, way, generator=rng)
    order = torch.rand(count, 8, n, generator=rng).argsort(dim=-1)
    train = train_dist if loss == "dist" else train_softmax
    start = Start(weight, bias if loss == "softmax" else None, weight.norm(dim=-1) if loss == "dist" else None)
    rule = train(support, labels, start, order)
    scores = rule_products(rule, query).transpose(1, 2)
    ties = 0
    for number in range(count):
        one = Start(*(None if part is None else part[number : number + 1].double() for part in start))  # type: ignore[arg-type]
        s, q = (part[number].double() for part in (support, query))
        layer = slow_sgd(s.numpy(), labels[number].numpy(), one, order[number].numpy(), loss)
        with torch.no_grad():
            expected = layer(q) * (2 if loss == "dist" else 1)
        assert torch.allclose(scores[number].double(), expected, rtol=1e-4, atol=1e-4)
        ties += same_predictions(scores[number].double().numpy(), expected.numpy())
    assert ties < 0.02 * count * query.shape[1]


def test_classifier_learns() -> None:
    support, labels, _ = episodes(5, [5] * 5)
    scores = make_head("classifier")(support, labels, support, torch.Generator().manual_seed(0))
    assert (scores.argmax(dim=-1) == labels).double().mean() > 0.9


def test_knn_is_perfect_on_separable_one_shot_data_and_the_published_count_is_not() -> None:
    support, labels, query = torch.eye(5)[None], torch.arange(5)[None], torch.eye(5).repeat_interleave(3, dim=0)[None]
    for spec, expected in (("knn:neighbours=1", [[c for c in range(5) for _ in range(3)]]),
                           ("knn:neighbours=1,reference=true", [[0] * 15])):  # fmt: skip
        assert make_head(spec)(support, labels, query, torch.Generator()).argmax(dim=-1).tolist() == expected


def test_scores_stay_finite_on_degenerate_support() -> None:
    support = torch.zeros(2, 6, 8)
    support[1, :, 0] = 1.0
    labels, query = torch.tensor([[0, 0, 1, 1, 2, 2]] * 2), torch.zeros(2, 3, 8)
    for name in head_names():
        scores = make_head(name)(support, labels, query, torch.Generator().manual_seed(0))
        assert scores.isfinite().all(), name


def test_heads_of_other_packages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("always-first", f"{__name__}:always_first", heads.group)
    monkeypatch.setattr(extensions, "entry_points", lambda group: EntryPoints([point]))
    assert "always-first" in head_names()
    scores = make_head("always-first")(torch.zeros(1, 4, 3), torch.tensor([[0, 1, 0, 1]]), torch.zeros(1, 2, 3), None)  # type: ignore[arg-type]
    assert scores.argmax(dim=-1).tolist() == [[0, 0]]
    with pytest.raises(ConfigError, match="did you mean 'always-first'"):
        make_head("always-frist")


def always_first() -> Callable[..., Tensor]:
    def head(support: Tensor, labels: Tensor, query: Tensor, generator: torch.Generator) -> Tensor:
        return torch.tensor([1.0, 0.0]).expand(*query.shape[:2], 2)

    return head
