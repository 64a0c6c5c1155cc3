"""Which blocks and parts a feature may be made of: written in a word, tried side by side from one pass.

`11` is block 11, `10+11:cls` is [CLS] of blocks 10 and 11; a negative number counts from the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pydantic import ValidationError
from torch import Tensor

from smkd.config.protocol import FeaturesConfig
from smkd.errors import ConfigError
from smkd.models.vit import block_numbers

MOST_BACK = 4
"""Candidates look at so many last blocks."""
PARTS = (("cls", "weighted_mean"), ("cls",))


def written(features: FeaturesConfig) -> str:
    """In a word, as `features_from` takes it."""
    return f"{'+'.join(map(str, features.blocks))}:{'+'.join(features.parts)}"


def features_from(word: str, option: str = "--features") -> FeaturesConfig:
    """From a word such as `11`, `10+11:cls` or `-2:cls+weighted_mean`; without parts they are the default ones.

    Raises:
        ConfigError: it is no such word.
    """
    blocks, colon, parts = word.partition(":")
    try:
        values = {"blocks": tuple(map(int, blocks.split("+")))} | ({"parts": parts.split("+")} if colon else {})
        return FeaturesConfig.model_validate(values)
    except (ValidationError, ValueError) as error:
        raise ConfigError(
            f"{option} {word}: should be blocks and parts such as 11, 10+11:cls or -2:cls+weighted_mean "
            "(parts: cls, mean, weighted_mean)"
        ) from error


def candidates(own: FeaturesConfig, depth: int) -> list[FeaturesConfig]:
    """What is worth trying: a run's own features first, then the last four blocks and pairs of neighbours among them.

    Each with [CLS] and the attention-weighted mean, and with [CLS] alone.

    Args:
        own: blocks and parts as they are set.
        depth: blocks of the backbone.

    Raises:
        ConfigError: the backbone lacks a block of `own`.
    """
    single = [(block,) for block in range(depth, max(0, depth - MOST_BACK), -1)]
    pairs = [(*earlier, *later) for later, earlier in itertools.pairwise(single)]
    first = numbered(own, depth)
    tried = [FeaturesConfig(blocks=blocks, parts=parts) for parts in PARTS for blocks in (*single, *pairs)]
    return [first, *(each for each in tried if each != first)]


def numbered(features: FeaturesConfig, depth: int) -> FeaturesConfig:
    """With blocks counted from 1; raises `ConfigError` where the backbone lacks one."""
    return features.model_copy(update={"blocks": tuple(block_numbers(features.blocks, depth))})


def together(tried: Sequence[FeaturesConfig]) -> FeaturesConfig:
    """What holds all of them: every block, counted from 1, with every part."""
    blocks = tuple(sorted({block for each in tried for block in each.blocks}))
    return FeaturesConfig(blocks=blocks, parts=tuple(dict.fromkeys(part for each in tried for part in each.parts)))


def narrowed(values: Tensor, wide: FeaturesConfig, features: FeaturesConfig) -> Tensor:
    """The numbers of `features` among those of `wide`.

    Args:
        values: float32 [images, dim of `wide`].
        wide: what they are made of.
        features: blocks and parts that are among those of `wide`.
    """
    pieces = values.unflatten(1, (len(wide.parts) * len(wide.blocks), -1))  # [images, pieces, embed_dim]
    kept: Tensor = pieces[:, places(wide, features)].flatten(1)
    return kept


def places(wide: FeaturesConfig, features: FeaturesConfig) -> list[int]:
    """Where the pieces of `features` are among those of `wide`; a piece is one part of one block."""
    return [
        wide.parts.index(part) * len(wide.blocks) + wide.blocks.index(block)
        for part in features.parts
        for block in features.blocks
    ]
