"""Two results on the same episodes: how large is the difference, and is it one?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from smkd.errors import DataError
from smkd.fewshot.accuracy import Result, summary


@dataclass(frozen=True)
class Comparison:
    """Second less first, in percentage points, episode by episode.

    Attributes:
        shot: images per class.
        first, second: mean accuracies in percent.
        difference: of the means.
        ci95: half width of the 95 % interval of the difference.
        wins, ties: share of the episodes in percent where the second is better, and where both are equal.
    """

    way: int
    shot: int
    first: float
    second: float
    difference: float
    ci95: float
    wins: float
    ties: float

    def verdict(self, first: str = "the first", second: str = "the second") -> str:
        """What the interval allows to say."""
        if abs(self.difference) <= self.ci95:
            return f"no difference shown between {first} and {second}: the interval holds 0"
        better, worse = (second, first) if self.difference > 0 else (first, second)
        return f"{better} is better than {worse} by {abs(self.difference):.2f} ± {self.ci95:.2f} points"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def compare_results(first: Result, second: Result) -> Comparison:
    """Paired comparison.

    The interval of the paired differences is narrower than the two intervals suggest, because an episode that is hard
    for one is mostly hard for the other.

    Raises:
        DataError: the episodes are not the same.
    """
    if not torch.equal(first.classes, second.classes) or (first.shot, first.query) != (second.shot, second.query):
        raise DataError("the two results are not of the same episodes; measure both with one protocol and seed")
    differences = second.accuracies - first.accuracies
    mean, ci95 = summary(differences)
    wins, ties = ((100 * share.double().mean()).item() for share in (differences > 0, differences == 0))
    return Comparison(first.way, first.shot, first.mean, second.mean, mean, ci95, wins, ties)
