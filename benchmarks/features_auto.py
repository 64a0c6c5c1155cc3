"""`fit --features auto` against every candidate: draws of a few images of some classes, all other images as queries.

smkd features WEIGHTS --recipe RECIPE --data DATA --split val -o val.h5 \
    --features 7+8+9+10+11+12:cls+weighted_mean
python benchmarks/features_auto.py val.h5 [test.h5 ...]

Accuracies are those of prototypes, the mean over classes, ± a 95 % interval over draws; differences are paired.
Where the file has enough blocks, the backbone is also measured as if it ended at an earlier one, where the last may be
the best.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smkd.classify.choose_features import choose_features
from smkd.config.protocol import FeaturesConfig
from smkd.fewshot.candidates import MOST_BACK, candidates, narrowed, together, written
from smkd.fewshot.feature_file import read_features, read_source
from smkd.fewshot.head import Learned
from smkd.fewshot.heads import make_head

WAY, DRAWS, SEED = 10, 30, 0
SHOTS = (1, 2, 5, 10, 20, "3 to 30")
LEFT = 8
"""Queries that a class has at least."""


def drawn(labels: NDArray[np.int64], shot: int | str, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the support with their classes, and rows of the queries; classes count from 0 in the order drawn."""
    support, classes, query = [], [], []
    for place, label in enumerate(rng.choice(labels.max() + 1, min(WAY, int(labels.max()) + 1), replace=False)):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = min(shot if isinstance(shot, int) else int(rng.integers(3, 31)), len(rows) - LEFT)
        support += rows[:count].tolist()
        classes += [place] * count
        query.append(torch.from_numpy(rows[count:]))
    return torch.tensor(support), torch.tensor(classes), torch.nn.utils.rnn.pad_sequence(query, True, -1)


def accuracy(values: Tensor, support: Tensor, classes: Tensor, query: Tensor) -> float:
    """Mean over classes in percent."""
    there = query >= 0
    scores = Learned(make_head("prototype"), values[support], classes, 0).scores(values[query[there]])
    right = torch.zeros(query.shape)
    right[there] = (scores.argmax(dim=1) == torch.arange(len(query))[:, None].expand_as(query)[there]).float()
    return 100 * float((right.sum(dim=1) / there.sum(dim=1)).mean())


def compared(values: Tensor, labels: NDArray[np.int64], wide: FeaturesConfig, depth: int, shot: int | str) -> Any:
    """Every candidate and the choice among them, on the same draws."""
    tried = candidates(FeaturesConfig(), depth)
    rng = np.random.default_rng(SEED)
    found, picks, seconds = [], [], []
    of_each = [narrowed(values, wide, each) for each in tried]
    held = narrowed(values, wide, together(tried))
    for _ in range(DRAWS):
        support, classes, query = drawn(labels, shot, rng)
        start = time.perf_counter()
        picks.append(tried.index(choose_features(held[support], classes, together(tried), tried)))
        seconds.append(time.perf_counter() - start)
        found.append([accuracy(each, support, classes, query) for each in of_each])
    table = np.array(found)
    auto, best = table[np.arange(DRAWS), picks], int(table.mean(axis=0).argmax())
    report = {
        "depth": depth, "shot": shot, "last": _spread(table[:, 0]), "best": written(tried[best]),
        "best accuracy": _spread(table[:, best]), "auto": _spread(auto),
        "auto - best": _spread(auto - table[:, best]), "auto - last": _spread(auto - table[:, 0]),
        "chosen": {written(tried[place]): count for place, count in Counter(picks).most_common()},
        "all": {written(each): float(mean) for each, mean in zip(tried, table.mean(axis=0), strict=True)},
        "seconds": float(np.mean(seconds)),
    }  # fmt: skip
    print(
        f"to block {depth}, {shot} images: last {_said(report['last'])}, best {report['best']} "
        f"{_said(report['best accuracy'])}, auto {_said(report['auto'])}; auto - best {_said(report['auto - best'])}, "
        f"auto - last {_said(report['auto - last'])}; {report['seconds']:.3f} s; {report['chosen']}"
    )
    return report


def _spread(values: NDArray[np.float64]) -> tuple[float, float]:
    return float(values.mean()), float(1.96 * values.std(ddof=1) / len(values) ** 0.5)


def _said(spread: Sequence[float]) -> str:
    return f"{spread[0]:.1f} ± {spread[1]:.1f}"


def main() -> None:
    found = {}
    for name in sys.argv[1:]:
        source, features = read_source(Path(name)), read_features(Path(name))
        wide = FeaturesConfig.model_validate({"blocks": source.blocks, "parts": source.parts})
        print(name)
        depths = [depth for depth in sorted(wide.blocks, reverse=True) if depth - MOST_BACK + 1 >= min(wide.blocks)]
        found[name] = [
            compared(features.values, features.labels, wide, depth, shot) for depth in depths for shot in SHOTS
        ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
