"""The examples of docs/extending.md: found by name, right, and trained with."""

from __future__ import annotations

import json
import math
import re
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import smkd
from smkd import api, extensions
from smkd.engine.bench import synthetic_views
from smkd.engine.optim import rates_at
from smkd.engine.step import Learner
from smkd.errors import ConfigError
from smkd.models.pair import Outputs
from smkd.objectives.objective import Objective
from smkd.objectives.patch import match_paper

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture(autouse=True)
def only_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    for known in (extensions.matchings, extensions.terms):
        monkeypatch.setattr(known, "registered", {})


@pytest.fixture
def example() -> dict[str, Any]:
    """The names of the page's examples, each executed by itself."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        own: dict[str, Any] = {}
        exec(block, own)
        names |= own
    return names


def announce(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    def found(group: str) -> EntryPoints:
        known = [EntryPoint(name, value, "smkd.matchings"), EntryPoint("cls", value, "smkd.terms")]
        return EntryPoints(known).select(group=group)

    monkeypatch.setattr(extensions, "entry_points", found)


def train(tmp_path: Path, recipe: str, *words: str) -> list[dict[str, Any]]:
    """Log lines of a short run."""
    settings = ("epochs=1", "data.limit_per_class=4", "validation.every=0", "log_every=1", f"out={tmp_path / 'run'}")
    config = api.resolve(recipe, [*settings, *words])
    out = (api.pretrain if config.phase == "pretrain" else api.distill)(config)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def test_mutual_nearest_patches(example: dict[str, Any]) -> None:
    """Against a loop over pairs of patches."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    pairs = torch.tensor([[True, False, True], [False, True, False], [True, False, False]])
    matches = example["mutual_nearest"](student, teacher, pairs, None)
    found = {
        (int(s), int(t)): float(w)
        for s, t, w in zip(matches.student, matches.teacher, matches.weight, strict=True) if w > 0
    }  # fmt: skip
    expected = {}
    for s, t in ((0, 1), (1, 0)):
        for i, j in pairs.nonzero().tolist():
            near = F.cosine_similarity(teacher[t, i][:, None], student[s, j][None], dim=-1)
            both = [(m, n) for n in range(5) for m in range(5) if near[n].argmax() == m and near[:, m].argmax() == n]
            for m, n in both:
                expected[(s * 3 + j) * 5 + m, (t * 3 + i) * 5 + n] = 1 / len(both) / 8
    assert matches.terms == 8
    assert found == pytest.approx(expected)


def test_a_matching_trains(example: dict[str, Any], tmp_path: Path) -> None:
    lines = train(
        tmp_path,
        "debug-distill",
        "init=random",
        "objective.patch.matching=mutual",
        "data.sampler=null",
        "batch_size=32",
    )
    assert all(line["patch"] > 0 for line in lines)
    assert lines


def test_a_term_trains(example: dict[str, Any], tmp_path: Path) -> None:
    lines = train(tmp_path, "debug-pretrain", "objective.terms.koleo=0.5", "batch_size=32", "accumulate=2")
    assert all(line["loss"] == pytest.approx(line["cls"] + line["mim"] + line["koleo"], abs=1e-4) for line in lines)
    assert lines


def test_a_term_by_itself_gets_what_it_needs_and_is_averaged_over_passes(example: dict[str, Any]) -> None:
    words = ["objective.cls.weight=0", "objective.mim.weight=0", "objective.terms.koleo=2"]
    config = api.resolve("debug-pretrain", words)
    learner = Learner.create(config, 2, torch.device("cpu"), None)
    assert learner.pair.idle_weights
    tokens = torch.randn(2, 4, 9, 32)
    outputs = Outputs(torch.zeros(2, 4, config.head.num_prototypes), tokens=tokens)
    x = F.normalize(tokens.mean(2), dim=-1)
    nearest = [min(float((x[v, i] - x[v, j]).norm()) for j in range(4) if j != i) for v in range(2) for i in range(4)]
    labels = torch.zeros(4, dtype=torch.long)
    of_two = learner.objective.passes([labels, labels])
    losses = learner.objective(
        outputs, outputs, torch.zeros(2, 4, 3, 3, dtype=torch.bool), labels,
        cls_temperature=0.1, patch_temperature=0.1, this=of_two[0],
    )  # fmt: skip
    mean = -sum(math.log(distance) for distance in nearest) / 8
    assert float(losses.total) == pytest.approx(2 * mean / 2, rel=1e-4)
    result = learner.step([synthetic_views(config, torch.device("cpu"))], rates_at(config, 1, 2))
    assert set(result.losses) == {"loss", "koleo"}


def test_a_package_announces_a_matching(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, "theirs", "smkd.objectives.patch:match_paper")
    config = api.resolve("debug-distill", ["objective.patch.matching=theirs"])
    assert Objective(config.objective, config.head).match is match_paper
    # the name of one of smkd's own terms cannot be taken
    assert extensions.terms.names() == []


def test_a_package_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, "theirs", "no_such_package.objectives:match")
    config = api.resolve("debug-distill", ["objective.patch.matching=theirs"])
    with pytest.raises(ConfigError, match=r"^patch matching 'theirs' \(no_such_package.objectives:match\) cannot be "):
        Objective(config.objective, config.head)


def test_unknown_names_get_the_nearest(example: dict[str, Any]) -> None:
    for words, message in (
        ("objective.patch.matching=mutal", "objective.patch.matching=mutal: patch matching 'mutal' is unknown; did you "
         "mean 'mutual'? (known: paper, reference, mutual)"),
        ("objective.terms.coleo=1", "objective.terms=coleo: term 'coleo' is unknown; did you mean 'koleo'? (known: "),
        ("objective.terms.koleo=much", "objective.terms.koleo=much: input should be a valid number"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
            api.resolve("debug-distill", [words])


@pytest.mark.parametrize(("register", "name"), [
    (smkd.register_matching, "paper"), (smkd.register_matching, "reference"), (smkd.register_term, "cls"),
    (smkd.register_term, "loss"),
])  # fmt: skip
def test_own_names_cannot_be_taken(register: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{name}' is smkd's own"):
        register(name, print)


def test_a_term_that_needs_something_unknown_is_named() -> None:
    def term(*_: Any) -> Any:
        raise AssertionError

    term.needs = ("gradients",)  # type: ignore[attr-defined]
    smkd.register_term("odd", term)
    config = api.resolve("debug-pretrain", ["objective.terms.odd=1"])
    with pytest.raises(ConfigError, match=r"^term 'odd' needs 'gradients'; a term may need patches, tokens, attention"):
        Learner.create(config, 2, torch.device("cpu"), None)


def test_a_run_is_read_without_the_package_that_it_was_trained_with(example: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path, "debug-pretrain", "objective.terms.koleo=0.5", "batch_size=32")
    extensions.terms.registered.clear()
    assert smkd.load(tmp_path / "run").config.size == "debug"
