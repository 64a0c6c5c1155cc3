"""The ways in which papers measure, by name."""

from __future__ import annotations

from typing import Any, NamedTuple

from smkd.config.schema import ProtocolConfig


class Preset(NamedTuple):
    """Queries per class and number of episodes.

    Attributes:
        classifier_episodes: episodes of the SGD classifier, which the authors run less often.
    """

    query: int | str
    episodes: int
    classifier_episodes: int


PRESETS = {
    # the authors of SMKD: every image outside the support is a query
    "paper": Preset("all", 10_000, 1_000),
    # 15 queries, as most papers since 2018
    "standard": Preset(15, 10_000, 10_000),
    # as papers up to 2019 did (Chen et al., ICLR 2019)
    "fair600": Preset(15, 600, 600),
}


def with_preset(protocol: ProtocolConfig, name: str) -> ProtocolConfig:
    """The protocol with a preset's queries and episodes, which depend on its head."""
    preset = PRESETS[name]
    is_classifier = protocol.head.partition(":")[0] == "classifier"
    changes: dict[str, Any] = {
        "query": preset.query,
        "episodes": preset.classifier_episodes if is_classifier else preset.episodes,
    }
    return protocol.model_copy(update=changes)
