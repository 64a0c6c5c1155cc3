"""What the pictures show, against plain loops; that they are drawn is seen through the command line."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from smkd import fewshot
from smkd.fewshot.accuracy import Result
from smkd.viz.figures import accuracy_curves, class_confusion, episode_distribution, hardest_sets

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]


def measured(shot: int = 1, way: int = 3) -> Result:
    rng = np.random.default_rng(0)
    labels = np.repeat(NAMES, 20)
    features = rng.normal(size=(120, 8)) + 1.2 * np.repeat(rng.normal(size=(6, 8)), 20, axis=0)
    return fewshot.evaluate(features, labels, way=way, shot=shot, query=6, episodes=200)


def test_confusion_against_plain_loops() -> None:
    result = measured()
    given, asked = np.zeros((6, 6)), np.zeros((6, 6))
    for classes, counts in zip(result.classes.tolist(), result.counts.tolist(), strict=True):
        for i, j in itertools.product(range(3), range(3)):
            given[classes[i], classes[j]] += counts[i][j]
            asked[classes[i], classes[j]] += sum(counts[i])
    assert class_confusion(result) == pytest.approx(100 * given / asked)


def test_hardest_pairs_against_plain_loops() -> None:
    result = measured()
    values: dict[tuple[str, str], list[float]] = {}
    for classes, accuracy in zip(result.classes.tolist(), result.accuracies.tolist(), strict=True):
        for pair in itertools.combinations(sorted(NAMES[c] for c in classes), 2):
            values.setdefault(pair, []).append(accuracy)
    expected = sorted((float(np.mean(found)), pair, len(found)) for pair, found in values.items())[:5]
    found = hardest_sets(result)
    assert [(s.names, s.episodes) for s in found] == [(pair, count) for _, pair, count in expected]
    assert [s.mean for s in found] == pytest.approx([mean for mean, _, _ in expected])


def test_curves_have_a_panel_per_way_and_per_shot() -> None:
    results = [measured(shot, way) for shot in (1, 5) for way in (3, 5)]
    titles = [axis.get_title(loc="left") for axis in accuracy_curves({"one": results}).axes]
    assert [title for title in titles if title] == ["3-way", "5-way", "1-shot", "5-shot"]


def test_every_episode_is_in_the_histogram() -> None:
    axes = episode_distribution(measured()).axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 200  # type: ignore[attr-defined]


def test_the_head_of_the_documentation_runs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "heads.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    scope: dict[str, object] = {}
    exec(code[1], scope)
    labels = torch.arange(6).repeat_interleave(12)
    features = torch.eye(6)[labels] + 5.0 + 0.05 * torch.randn(72, 6, generator=torch.Generator().manual_seed(0))
    result = fewshot.evaluate(features, labels, head=scope["centred_prototype"], query=5, episodes=50)  # type: ignore[arg-type]
    assert (result.mean, result.head, result.transductive) == (100.0, "centred_prototype", False)
