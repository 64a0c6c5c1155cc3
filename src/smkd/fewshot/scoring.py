"""How many queries are given each way, in each episode.

There are three ways to the same counts. With all images as queries, the rows of an inductive head in many episodes are
multiplied with the images of one class, class after class, so every image is read once. With a few queries, these are
gathered, as many at a time as fit into the cache. Other heads are called with the gathered features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from smkd.errors import DataError
from smkd.fewshot.episodes import Episodes, Members
from smkd.fewshot.head import Head, InductiveHead, Rule, rule_products

RULE_NUMBERS = 2**26
"""Numbers of fitted rows held at once (256 MiB)."""
PRODUCT_NUMBERS = 2**20
"""Products of rows and images held at once: what stays in a cache."""
GATHERED_NUMBERS = 2**20
"""Numbers of queries gathered at once for inductive heads."""
EPISODE_NUMBERS = 2**22
"""Numbers of support and queries gathered at once for other heads."""


@torch.inference_mode()
def count_predictions(features: Tensor, members: Members, episodes: Episodes, head: Head, seed: int) -> Tensor:
    """Number of queries by their true way and the way they are given.

    Args:
        features: [images, dim]; heads work on its device.
        members: rows of each class.
        episodes: rows of support and queries.
        head: the classifier.
        seed: of the heads that draw.

    Returns:
        int64 [episodes, way (true), way (given)] on the CPU.

    Raises:
        DataError: all queries are asked for, classes differ in size, and the head looks at the queries together.
    """
    total, way, _ = episodes.support.shape
    counts = torch.zeros(total, way, way, dtype=torch.int64, device=features.device)
    if not isinstance(head, InductiveHead):
        _count_by_call(counts, features, members, episodes, head, seed)
        return counts.cpu()
    for start, stop, rule in _fitted(features, episodes, head, seed):
        part, into = episodes.part(start, stop), counts[start:stop]
        if part.query is None:
            _count_by_class(into, features, members, part, head, rule)
        else:
            _count_by_gather(into, features, part, head, rule)
    return counts.cpu()


def _fitted(features: Tensor, episodes: Episodes, head: InductiveHead, seed: int) -> Iterator[tuple[int, int, Rule]]:
    """The head's rows for as many episodes as may be held: first, one past the last, rows."""
    total, way, shot = episodes.support.shape
    held = head.fit_at_once  # a few queries are scored while their rule is still in a cache
    if episodes.query is None:
        held *= max(1, RULE_NUMBERS // (way * shot * features.shape[1] * held))
    for start in range(0, total, held):
        stop = min(start + held, total)
        rules = []
        for first in range(start, stop, head.fit_at_once):
            rows = episodes.support[first : min(first + head.fit_at_once, stop)].flatten(1)
            support = head.prepare(_rows(features, rows))
            generator = torch.Generator().manual_seed(_mixed(seed, first))
            rules.append(head.fit(support, support_labels(way, shot, len(rows), features.device), generator))
        biases = [rule.bias for rule in rules if rule.bias is not None]
        joined = Rule(torch.cat([rule.weight for rule in rules]), torch.cat(biases) if biases else None)
        yield start, stop, joined if len(rules) > 1 else rules[0]


def _count_by_class(
    counts: Tensor, features: Tensor, members: Members, episodes: Episodes, head: InductiveHead, rule: Rule
) -> None:
    _, way, shot = episodes.support.shape
    for label in range(len(members.rows)):
        episode, own_way = (episodes.classes == label).nonzero(as_tuple=True)
        if not len(episode):
            continue
        images = head.prepare(_rows(features, members.rows[label]))
        at_once = max(1, PRODUCT_NUMBERS // (rule.weight.shape[1] * len(images)))
        for some, some_way in zip(episode.split(at_once), own_way.split(at_once), strict=True):
            # way is what these episodes call the class
            chosen, chosen_way = some.to(features.device), some_way.to(features.device)
            products = torch.matmul(rule.weight[chosen], images.T)
            if rule.bias is not None:
                products += rule.bias[chosen][..., None]
            given = first_largest(head.scores(products, support_labels(way, shot, len(some), features.device)))
            support_places = members.place[episodes.support[some, some_way]].to(features.device)
            of_support = given.gather(1, support_places)
            for other in range(way):
                counts[chosen, chosen_way, other] = (given == other).sum(dim=1) - (of_support == other).sum(dim=1)


def _count_by_gather(counts: Tensor, features: Tensor, episodes: Episodes, head: InductiveHead, rule: Rule) -> None:
    assert episodes.query is not None
    assert episodes.truth is not None
    total, way, shot = episodes.support.shape
    at_once = max(1, GATHERED_NUMBERS // (episodes.query.shape[1] * features.shape[1]))
    for first in range(0, total, at_once):
        some = slice(first, first + at_once)
        query = head.prepare(_rows(features, episodes.query[some]))
        own = Rule(rule.weight[some], None if rule.bias is None else rule.bias[some])
        products = rule_products(own, query)
        given = first_largest(head.scores(products, support_labels(way, shot, len(query), features.device)))
        _add(counts[some], episodes.truth[some].to(features.device), given)


def _count_by_call(
    counts: Tensor, features: Tensor, members: Members, episodes: Episodes, head: Head, seed: int
) -> None:
    total, way, shot = episodes.support.shape
    if episodes.query is None and len(set(members.sizes.tolist())) > 1:
        smallest, largest = int(members.sizes.min()), int(members.sizes.max())
        raise DataError(
            f"this head takes as many queries from every class, and query=all gives {smallest - shot} to "
            f"{largest - shot}: set a number of queries"
        )
    queries = way * (int(members.sizes[0]) - shot) if episodes.query is None else episodes.query.shape[1]
    at_once = max(1, EPISODE_NUMBERS // ((way * shot + queries) * features.shape[1]))
    for first in range(0, total, at_once):
        some = with_all_queries(episodes.part(first, first + at_once), members)
        assert some.query is not None
        assert some.truth is not None
        support = _rows(features, some.support.flatten(1))
        labels = support_labels(way, shot, len(support), features.device)
        generator = torch.Generator().manual_seed(_mixed(seed, first))
        scores = head(support, labels, _rows(features, some.query), generator)
        _add(counts[first : first + at_once], some.truth.to(features.device), first_largest(scores.transpose(1, 2)))


def with_all_queries(episodes: Episodes, members: Members) -> Episodes:
    """The episodes with every image outside the support written out as queries; classes are of one size."""
    if episodes.query is not None:
        return episodes
    way, size = episodes.support.shape[1], len(members.rows[0])
    outside = torch.ones(*episodes.classes.shape, size, dtype=torch.bool)
    outside.scatter_(2, members.place[episodes.support], value=False)
    rows = torch.stack(members.rows)[episodes.classes][outside].view(len(outside), -1)
    truth = torch.arange(way).repeat_interleave(rows.shape[1] // way).expand(len(rows), -1)
    return episodes._replace(query=rows, truth=truth)


def first_largest(scores: Tensor) -> Tensor:
    """Way of the largest score, the first on ties: [episodes, way, queries] -> int64 [episodes, queries]."""
    return scores.max(dim=1).indices


def support_labels(way: int, shot: int, episodes: int, device: torch.device) -> Tensor:
    """Labels of a support in the order of its ways: int64 [episodes, way * shot]."""
    return torch.arange(way, device=device).repeat_interleave(shot).expand(episodes, -1)


def _rows(features: Tensor, rows: Tensor) -> Tensor:
    """features[rows], which is several times slower."""
    return features.index_select(0, rows.to(features.device).flatten()).view(*rows.shape, features.shape[1])


def _add(counts: Tensor, truth: Tensor, given: Tensor) -> None:
    way = counts.shape[1]
    counts.flatten(1).scatter_add_(1, truth * way + given, torch.ones_like(given))


def _mixed(seed: int, episode: int) -> int:
    """Seed of the heads' generator from that of the episodes."""
    return (seed * 1_000_003 + episode) % 2**63
