"""One episode as it was measured: its support, some queries, and what they were given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smkd.config.protocol import ProtocolConfig
from smkd.data.images import Images
from smkd.fewshot.accuracy import Result, shape_of
from smkd.fewshot.episodes import Episodes, Members, draw, large_enough
from smkd.fewshot.features import Features
from smkd.fewshot.heads import make_head
from smkd.viz.tiles import Tile, picture, short

SHOWN = 3
"""Queries of each class."""


def typical_episode(result: Result) -> int:
    """The first episode whose accuracy is nearest to the mean."""
    return int((result.accuracies - result.mean).abs().argmin())


def episode_tiles(
    images: Images, features: Features, protocol: ProtocolConfig, shot: int, number: int
) -> list[list[Tile]]:
    """A row for each class of an episode: its first support image, and queries with their answers.

    Of each class a wrong answer is among those shown, if there is one.

    Args:
        images: of the features' split, of which each has its feature.
        features: of these images.
        protocol: by which they are measured.
        shot: support images of each class.
        number: of the episode, as the protocol's seed draws it.
    """
    episode, names, members = _drawn(features, protocol, shot, number)
    queries, truth = _queries(episode, members)
    answers = _answers(features.values, episode, queries, protocol, shot)
    rows = []
    for way, label in enumerate(episode.classes[0].tolist()):
        support = int(episode.support[0, way, 0])
        row = [Tile(picture(images.load(support)), f"{short(names[label], 20)}: support")]
        own = (truth == way).nonzero().flatten().tolist()
        wrong = [place for place in own if answers[place] != way][:1]
        right = [place for place in own if place not in wrong]
        for place in (right[: SHOWN - len(wrong)] + wrong)[:SHOWN]:
            given = names[int(episode.classes[0, answers[place]])]
            image = picture(images.load(int(queries[place])))
            row.append(Tile(image, f"answer: {short(given, 20)}", right=bool(answers[place] == way)))
        rows.append(row)
    return rows


def _drawn(
    features: Features, protocol: ProtocolConfig, shot: int, number: int
) -> tuple[Episodes, Sequence[str], Members]:
    """The episode as `smkd.fewshot.accuracy.measure` draws it, the names of its classes, and their members."""
    shape = shape_of(protocol, shot)
    members, names = Members(features.labels, len(features.class_names)), features.class_names
    kept = large_enough(members.sizes.numpy(), names, shape)
    if len(kept) < len(names):
        members, names = members.of(kept), [names[label] for label in kept]
    return draw(members, shape, episodes=number + 1, seed=protocol.seed).part(number, number + 1), names, members


def _queries(episode: Episodes, members: Members) -> tuple[Tensor, Tensor]:
    """Rows and ways of the queries, int64 [queries] each."""
    if episode.query is not None and episode.truth is not None:
        return episode.query[0], episode.truth[0]
    rows, ways = [], []
    for way, label in enumerate(episode.classes[0].tolist()):
        others = members.rows[label]
        others = others[~torch.isin(others, episode.support[0, way])]
        rows.append(others)
        ways.append(torch.full_like(others, way))
    return torch.cat(rows), torch.cat(ways)


def _answers(values: Tensor, episode: Episodes, queries: Tensor, protocol: ProtocolConfig, shot: int) -> Tensor:
    """The way that each query is given, int64 [queries]."""
    support = values[episode.support[0].flatten()]  # [way * shot, dim]
    labels = torch.arange(len(episode.classes[0])).repeat_interleave(shot)
    generator = torch.Generator().manual_seed(protocol.seed)
    scores = make_head(protocol.head)(
        support[None], labels[None], values[queries][None], generator
    )  # [1, queries, way]
    return scores[0].argmax(dim=1)
