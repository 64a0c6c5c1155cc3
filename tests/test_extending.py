"""The examples of docs/extending.md: found by name, right, and trained with."""

from __future__ import annotations

import json
import math
import re
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import smkd
from smkd import api, extensions
from smkd.classify import open_encoder
from smkd.config.schema import DataConfig
from smkd.data import datasets
from smkd.data.torch_dataset import DatasetImages
from smkd.engine.bench import synthetic_views
from smkd.engine.optim import rates_at
from smkd.engine.restore import open_checkpoint
from smkd.engine.step import Learner
from smkd.errors import ConfigError, DataError
from smkd.fewshot import heads
from smkd.models.pair import Outputs
from smkd.objectives.objective import Objective
from smkd.objectives.patch import match_paper

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture(autouse=True)
def only_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    for known in (extensions.matchings, extensions.terms, heads.heads, datasets.OWN):
        monkeypatch.setattr(known, "registered", {})


@pytest.fixture
def example() -> dict[str, Any]:
    """The names of the page's examples, each executed by itself."""
    names: dict[str, Any] = {"configs": []}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        own: dict[str, Any] = {}
        exec(block, own)
        names |= own
        names["configs"].append(own.get("config"))
    return names


def announce(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    def found(group: str) -> EntryPoints:
        known = [EntryPoint(name, value, "smkd.matchings"), EntryPoint("cls", value, "smkd.terms"),
                 EntryPoint(name, value, "smkd.datasets")]  # fmt: skip
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


@pytest.mark.slow
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
    (smkd.register_term, "loss"), (smkd.register_head, "ridge"), (smkd.register_dataset, "folder"),
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


def test_a_head_is_found_by_name(example: dict[str, Any]) -> None:
    config = next(config for config in example["configs"] if config.evaluation.head == "centred")
    torch.manual_seed(0)
    support, query, labels = torch.randn(2, 6, 8), torch.randn(2, 4, 8), torch.tensor([[0, 1, 2] * 2] * 2)
    scores = heads.make_head(config.evaluation.head)(support, labels, query, torch.Generator())
    centre = support[1].mean(dim=0)
    mean = (support[1, [2, 5]] - centre).mean(dim=0)
    assert float(scores[1, 3, 2]) == pytest.approx(
        float(F.cosine_similarity(query[1, 3] - centre, mean, dim=0)), abs=1e-5
    )
    halved = heads.make_head("centred:power=0.5")(support, labels, query, torch.Generator())
    torch.testing.assert_close(halved.abs() ** 2, scores.abs())
    with pytest.raises(ConfigError, match=r"has no option 'size' \(options: power\)"):
        heads.make_head("centred:size=1")


def test_images_are_trained_on_and_the_run_is_used_elsewhere(
    example: dict[str, Any], tmp_path: Path, make_folder: Any
) -> None:
    run = example["train"](tmp_path / "run")
    assert '"loss"' in (run / "metrics.jsonl").read_text()
    datasets.OWN.registered.clear()
    config = open_checkpoint(run)[0]["config"]
    assert config["data"]["mean"] == list(datasets.IMAGENET[0])
    assert open_encoder(run, accelerator="cpu").config.mean == datasets.IMAGENET[0]
    found = api.open_features(run, changes={"data": {"root": str(make_folder())}}).features()
    assert len(found.values) > 0
    with pytest.raises(DataError, match="does not say where its images lie"):
        api.open_features(run)


def test_a_registered_data_set_is_trained_and_measured_on(example: dict[str, Any], tmp_path: Path) -> None:
    words = ["data.dataset=stripes", "validation.way=2", "validation.shots=[1]", "validation.query=1",
             "validation.episodes=4", "epochs=1", "batch_size=8", f"out={tmp_path / 'run'}"]  # fmt: skip
    run = smkd.pretrain(smkd.resolve("debug-pretrain", words))
    opened = api.open_features(run, changes={"evaluation": {"split": "val"}})
    assert opened.features().class_names == ["across", "down", "slanted"]
    assert len(opened.features().values) == 12
    with pytest.raises(DataError, match=r"data set 'stripes' has no test split; its function gives None$"):
        api.open_features(run, changes={"evaluation": {"split": "test"}})


def test_a_package_announces_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, "theirs", "test_extending:tiny")
    images = datasets.open_split(DataConfig(dataset="theirs"), "train")
    assert (len(images), images.class_names) == (2, ["no", "yes"])
    with pytest.raises(DataError, match=r"data.dataset=their: unknown data set; did you mean 'theirs'\?"):
        datasets.open_split(DataConfig(dataset="their"), "train")


def tiny(split: str) -> Any:
    return [(Image.new("L", (8, 6)), "yes"), (torch.zeros(3, 6, 8, dtype=torch.uint8), "no")]


def test_a_data_set_by_itself() -> None:
    images = DatasetImages(tiny("train"), "tiny/train")
    assert [images.load(index).shape for index in range(2)] == [(3, 6, 8)] * 2
    assert (images.labels.tolist(), images.name(0)) == ([0, 1], "tiny/train[1]")
    few = DatasetImages([(np.full((4, 4, 3), n, np.uint8), n % 3 * 5) for n in range(12)], "t", limit_per_class=2)
    assert [int(few.load(index)[0, 0, 0]) for index in range(len(few))] == [0, 3, 1, 4, 2, 5]
    assert few.class_names == ["0", "5", "10"]


@pytest.mark.parametrize(("dataset", "says"), [
    ([], r"^t holds no images$"),
    (5, r"^t is a int; expected a data set of \(image, label\)$"),
    ([torch.zeros(3, 8, 8)], r"^'t\[0\]' is a Tensor; expected \(image, label\)$"),
    ([(torch.zeros(3, 8, 8), 0)], r"^'t\[0\]' is a Tensor of float32 \[3, 8, 8\]; expected .* before any transform$"),
    ([(np.zeros((8, 8), np.uint8), 0)], r"^'t\[0\]' is a ndarray of uint8 \[8, 8\]; expected a Pillow image"),
    ([("a.png", 0)], r"^'t\[0\]' is a str; expected a Pillow image"),
    ([(np.zeros((8, 8, 3), np.uint8), 0.5)], r"^t: labels are float64; expected whole numbers or texts$"),
    ([(np.zeros((8, 8, 3), np.uint8), None)], r"^t: labels are object; expected whole numbers or texts$"),
])  # fmt: skip
def test_what_is_no_data_set_is_one_line(dataset: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        DatasetImages(dataset, "t")


@pytest.mark.parametrize(("words", "images", "says"), [
    ([], "stripes", r"data set 'given' has no val split; give images=\{'train': ..., 'val': ...\}, validation.data="),
    (["data.root=x"], "stripes", r"data=x and images= are two data sets; leave one out"),
    (["devices=2"], "stripes", r"devices=2 starts processes that do not have images="),
    ([], {"training": "stripes"}, r"images=\{'training': ...\}: unknown split; did you mean 'train'\?"),
])  # fmt: skip
def test_images_that_cannot_be_used(
    example: dict[str, Any], tmp_path: Path, words: list[str], images: Any, says: str
) -> None:
    given = {name: example["Stripes"]() for name in images} if isinstance(images, dict) else example["Stripes"]()
    config = smkd.resolve("debug-pretrain", [*words, "batch_size=8", f"out={tmp_path / 'run'}"])
    with pytest.raises((ConfigError, DataError), match=says):
        smkd.pretrain(config, images=given)


def test_normalisation_of_ones_own(example: dict[str, Any]) -> None:
    spec = datasets.configured_spec(example["configs"][-1].data)
    assert (spec.mean, spec.std) == ((0.5, 0.5, 0.4), (0.2, 0.25, 0.25))
