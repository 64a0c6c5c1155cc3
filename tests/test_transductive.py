"""Transductive heads against slow twins: one episode at a time, float64, all dimensions, the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from smkd.fewshot.transductive import BDCSPN, PTMAP, TIM, LaplacianShot, TransductiveFinetune

pytestmark = pytest.mark.slow

Array = NDArray[np.float64]
HEADS = [BDCSPN(), LaplacianShot(), PTMAP(), TIM(), TransductiveFinetune()]
EACH_HEAD = pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
# shots and queries of each way, dimensions (fewer and more than points), spread of the clusters, non-negative
KINDS = {
    "1-shot": ((1, 1, 1, 1, 1), (8, 8, 8, 8, 8), 24, 1.6, False),
    "5-shot": ((5, 5, 5, 5, 5), (6, 6, 6, 6, 6), 96, 2.2, False),
    "unequal shots": ((1, 4, 2), (7, 7, 7), 64, 1.9, False),
    "unbalanced queries": ((3, 3, 3, 3, 3), (2, 5, 12, 8, 1), 48, 1.6, False),
    "non-negative": ((5, 5, 5, 5, 5), (6, 6, 6, 6, 6), 80, 1.8, True),
}
EPISODES = 40
# A query whose two best ways are closer than this in the twin is a tie: float32 may decide it the other way.
TIE = 1e-4


def run(head: Any, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    return head(support, labels, query, torch.Generator())


def draw(
    shots: tuple[int, ...], queries: tuple[int, ...], dim: int, spread: float, positive: bool = False,
    common: float = 1.0, episodes: int = EPISODES, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Clusters around random centres and a shared mean; points in random order. Last: the queries' ways."""
    rng = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, dim + 1).float().pow(-0.3)
    centres = torch.randn(episodes, len(shots), dim, generator=rng)
    shared = common * torch.randn(dim, generator=rng)

    def around(counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        ways = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).expand(episodes, -1)
        ways = ways.gather(1, torch.rand(ways.shape, generator=rng).argsort(dim=1))
        noise = torch.randn(*ways.shape, dim, generator=rng)
        features = (shared + centres.gather(1, ways[..., None].expand(-1, -1, dim)) + spread * noise) * scale
        return (features.relu() if positive else features), ways

    support, labels = around(shots)
    query, truth = around(queries)
    return support, labels, query, truth


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x)


def units(rows: Array) -> Array:
    return np.stack([unit(row) for row in rows])


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def rectified_twin(support: Array, labels: list[int], query: Array) -> tuple[Array, Array]:
    support, query = units(support), units(query)
    query = query + (support.mean(0) - query.mean(0))
    ways = range(max(labels) + 1)
    basic = [np.mean([s for s, y in zip(support, labels, strict=True) if y == k], axis=0) for k in ways]
    members: list[list[Array]] = [[s for s, y in zip(support, labels, strict=True) if y == k] for k in ways]
    for q in query:
        members[int(np.argmax([unit(q) @ unit(p) for p in basic]))].append(q)
    prototypes = []
    for k in ways:
        weights = np.array([math.exp(10 * (unit(x) @ unit(basic[k]))) for x in members[k]])
        prototypes.append(sum(w * x for w, x in zip(weights / weights.sum(), members[k], strict=True)))
    return np.array(prototypes), query


def bd_cspn_twin(support: Array, labels: list[int], query: Array) -> Array:
    prototypes, moved = rectified_twin(support, labels, query)
    return np.array([[unit(q) @ unit(p) for p in prototypes] for q in moved])


def laplacian_twin(support: Array, labels: list[int], query: Array) -> Array:
    prototypes, moved = rectified_twin(support, labels, query)
    unary = np.array([[((q - p) ** 2).sum() for p in prototypes] for q in moved])
    nearest = []
    for i, q in enumerate(moved):
        others = [j for j in range(len(moved)) if j != i]
        nearest.append(sorted(others, key=lambda j: float(((q - moved[j]) ** 2).sum()))[:3])
    y = np.array([softmax(-a) for a in unary])
    for _ in range(20):
        y = np.array([softmax(-unary[i] + 0.7 * sum(y[j] for j in nearest[i])) for i in range(len(moved))])
    return y


def pt_map_twin(support: Array, labels: list[int], query: Array) -> Array:
    def prepared(rows: Array) -> Array:
        rows = units(np.where(rows < 0, -1, 1) * np.sqrt(np.abs(rows) + 1e-6))
        return units(rows - rows.mean(0))

    def plan(centres: Array) -> Array:
        p = np.exp(-10 * np.array([[((q - c) ** 2).sum() for c in centres] for q in query]))
        p /= p.sum()
        before = np.zeros(len(query))
        for _ in range(5000):
            totals = p.sum(1)
            if np.abs(before - totals).max() < 1e-7:
                break
            before = totals
            p *= (1 / totals)[:, None]
            p *= len(query) / len(centres) / p.sum(0)
        return p

    support, query = prepared(support), prepared(query)
    ways = range(max(labels) + 1)
    own = np.array([[float(y == k) for k in ways] for y in labels])
    centres = np.array([support[own[:, k] == 1].mean(0) for k in ways])
    for _ in range(20):
        p = plan(centres)
        for k in ways:
            mean = (own[:, k] @ support + p[:, k] @ query) / (own[:, k].sum() + p[:, k].sum())
            centres[k] += 0.2 * (mean - centres[k])
    return plan(centres)


def tim_twin(support: Array, labels: list[int], query: Array) -> Array:
    support, query = units(support), units(query)
    ways = range(max(labels) + 1)
    own = np.array([[float(y == k) for k in ways] for y in labels])
    w = np.array([support[own[:, k] == 1].mean(0) for k in ways])

    def probabilities(points: Array) -> Array:
        p = np.exp(-15 / 2 * ((points[:, None] - w) ** 2).sum(2))
        return p / p.sum(1, keepdims=True)

    for _ in range(150):
        p_s, p_q = probabilities(support), probabilities(query)
        q = np.stack([p_q[:, k] ** 1.1 / math.sqrt((p_q[:, k] ** 1.1).sum()) for k in ways], axis=1)
        q /= q.sum(1, keepdims=True)
        ratio, new = len(support) / len(query), w.copy()
        for k in ways:
            upper = 0.1 / 1.1 * (own[:, k] @ support + p_s[:, k] @ (w[k] - support))
            upper = upper + ratio * (q[:, k] @ query + p_q[:, k] @ (w[k] - query))
            new[k] = upper / (0.1 / 1.1 * own[:, k].sum() + ratio * q[:, k].sum())
        w = new
    return probabilities(query)


def finetune_twin(support: Array, labels: list[int], query: Array) -> Array:
    ways = range(max(labels) + 1)
    means = [np.mean([s for s, y in zip(support, labels, strict=True) if y == k], axis=0) for k in ways]
    w = torch.tensor(units(np.array(means)), requires_grad=True)
    b = torch.zeros(len(ways), dtype=torch.float64, requires_grad=True)
    s, q, y = torch.tensor(units(support)), torch.tensor(units(query)), torch.tensor(labels)
    optimizer = torch.optim.Adam([w, b], lr=3e-4)
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(s @ w.T + b, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        p = (q @ w.T + b).softmax(dim=1)
        (-(p * p.log()).sum(dim=1).mean()).backward()
        optimizer.step()
    return (q @ w.T + b).softmax(dim=1).detach().numpy()


TWINS: dict[type, Callable[[Array, list[int], Array], Array]] = {
    BDCSPN: bd_cspn_twin, LaplacianShot: laplacian_twin, PTMAP: pt_map_twin, TIM: tim_twin,
    TransductiveFinetune: finetune_twin,
}  # fmt: skip


@cache
def episodes(kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shots, queries, dim, spread, positive = KINDS[kind]
    return draw(shots, queries, dim, spread, positive, seed=list(KINDS).index(kind))


@EACH_HEAD
@pytest.mark.parametrize("kind", KINDS)
def test_predicts_as_its_twin(head: Any, kind: str) -> None:
    support, labels, query, truth = episodes(kind)
    scores = run(head, support, labels, query)
    twin = torch.stack([
        torch.from_numpy(TWINS[type(head)](s.double().numpy(), y.tolist(), q.double().numpy()))
        for s, y, q in zip(support, labels, query, strict=True)
    ])  # fmt: skip
    best = twin.topk(2).values
    tie = best[..., 0] - best[..., 1] < TIE
    assert tie.double().mean() < 0.01
    assert (scores.argmax(-1) == twin.argmax(-1))[~tie].all()
    # scores too: as they are, or the distribution they stand for
    same = scores if isinstance(head, BDCSPN | PTMAP) else scores.softmax(dim=-1)
    # the fixed points of these two are reached along paths that spread rounding
    atol = 1e-3 if isinstance(head, PTMAP | TIM) else 1e-5
    torch.testing.assert_close(same.double(), twin, rtol=0, atol=atol)
    accuracy = (scores.argmax(-1) == truth).double().mean()
    assert 1.5 / len(KINDS[kind][0]) < accuracy < 0.99


@EACH_HEAD
def test_scores_do_not_depend_on_the_batch(head: Any) -> None:
    tight = draw((2, 2, 2, 2), (6, 6, 6, 6), 40, 0.3, episodes=3)
    loose = draw((2, 2, 2, 2), (6, 6, 6, 6), 40, 3.0, episodes=3, seed=1)
    support, labels, query, _ = (torch.cat(parts) for parts in zip(tight, loose, strict=True))
    support[4], query[4] = 0, 1
    together = run(head, support, labels, query)
    alone = torch.cat([run(head, support[i : i + 1], labels[i : i + 1], query[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@EACH_HEAD
def test_permuting_ways_permutes_scores(head: Any) -> None:
    support, labels, query, _ = episodes("unbalanced queries")
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = run(head, support, order[labels], query)
    torch.testing.assert_close(permuted[..., order], run(head, support, labels, query), rtol=1e-4, atol=1e-4)


DEGENERATE = {
    "equal points": lambda s, q: (torch.ones_like(s), torch.ones_like(q)),
    "equal queries": lambda s, q: (s, q[:, :1].expand_as(q)),
    "zeros": lambda s, q: (torch.zeros_like(s), torch.zeros_like(q)),
    "zero queries": lambda s, q: (s, torch.zeros_like(q)),
    "some zeros": lambda s, q: (s * (torch.arange(s.shape[1]) % 2)[:, None], q),
    "one query": lambda s, q: (s, q[:, :1]),
    "two queries": lambda s, q: (s, q[:, :2]),
    "queries are support": lambda s, q: (s, s),
    "huge": lambda s, q: (1e20 * s, 1e20 * q),
    "tiny": lambda s, q: (1e-30 * s, 1e-30 * q),
    "opposite": lambda s, q: (s, -s),
}


@EACH_HEAD
@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize(("shots", "spread"), [((1,) * 20, 0.0), ((1, 4, 2), 1.0), ((5, 1), 0.01)])
def test_finite_on_degenerate_input(head: Any, case: str, shots: tuple[int, ...], spread: float) -> None:
    support, labels, query, _ = draw(shots, (2,) * len(shots), 16, spread, episodes=2)
    support, query = DEGENERATE[case](support, query)
    scores = run(head, support, labels, query)
    assert scores.shape == (2, query.shape[1], len(shots))
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


@EACH_HEAD
def test_beats_prototypes_on_clusters(head: Any) -> None:
    support, labels, query, truth = draw((1,) * 5, (15,) * 5, 256, 1.5, common=0.5, episodes=100, seed=5)
    way_of_each = F.one_hot(labels).float().mT
    prototypes = F.normalize(way_of_each @ support, dim=-1)
    plain = (F.normalize(query, dim=-1) @ prototypes.mT).argmax(-1)
    gain = (run(head, support, labels, query).argmax(-1) == truth).double() - (plain == truth).double()
    per_episode = gain.mean(dim=1)
    assert per_episode.mean() > 2 * per_episode.std() / math.sqrt(len(per_episode))


def test_balanced_plan_where_sinkhorn_is_slow() -> None:
    """Tight clusters of 13, 15 and 17 queries: each way still gives or receives what it must."""
    support, labels, query, _ = draw((1, 1, 1), (13, 15, 17), 64, 0.05, episodes=4)
    plan = run(PTMAP(), support, labels, query)
    torch.testing.assert_close(plan.sum(dim=1), torch.full((4, 3), 15.0), rtol=0, atol=1e-4)
    torch.testing.assert_close(plan.sum(dim=2), torch.ones(4, 45), rtol=0, atol=1e-5)
