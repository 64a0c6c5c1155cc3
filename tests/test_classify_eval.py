"""`smkd fit` and `smkd predict` answer image by image as the evaluation does on the same support."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from classify_data import blobs, tiny_network
from smkd import api
from smkd.classify import FewShotClassifier
from smkd.cli import app
from smkd.config.loading import check_protocol, resolve
from smkd.engine import checkpoint
from smkd.fewshot.accuracy import measure
from smkd.fewshot.episodes import Members, Shape, draw
from smkd.fewshot.features import as_features
from smkd.fewshot.heads import make_head

PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "caltech101-mini"
INDUCTIVE = ("prototype", "prototype:metric=euclidean", "simpleshot", "knn", "ridge", "logistic", "classifier")


@pytest.mark.parametrize("head", INDUCTIVE)
def test_each_query_of_an_episode_is_given_the_same_class(head: str) -> None:
    values, names = blobs((12, 9, 14, 10, 11, 8), noise=1.2)
    features = as_features(values, names)
    protocol = check_protocol(way=4, shots=(3,), query="all", episodes=3, head=head)
    result = measure(features, protocol, 3, make_head(head))
    members = Members(features.labels, len(features.class_names))
    episodes = draw(members, Shape(4, 3, "all"), episodes=3, seed=protocol.seed)
    wrong = 0
    for support, classes, counts in zip(episodes.support, episodes.classes, result.counts, strict=True):
        rows, ways = support.flatten().numpy(), classes.tolist()
        rest = np.setdiff1d(np.flatnonzero(np.isin(features.labels, ways)), rows)
        classifier = FewShotClassifier(head=head).fit(features.values.numpy()[rows], features.labels[rows])
        answers = classifier.predict(features.values.numpy()[rest])
        # a head that draws does so for several episodes of an evaluation at once, so that only its own call is the same
        if head != "classifier":
            mine = np.zeros((4, 4), int)
            np.add.at(mine, ([ways.index(c) for c in features.labels[rest]], [ways.index(c) for c in answers]), 1)
            assert mine.tolist() == counts.tolist()
        labels, places = np.unique(features.labels[rows], return_inverse=True)
        scores = make_head(head)(
            features.values[rows][None], torch.from_numpy(places)[None], features.values[rest][None],
            torch.Generator().manual_seed(0),
        )[0]  # fmt: skip
        np.testing.assert_array_equal(answers, labels[scores.argmax(dim=1).numpy()])
        wrong += int((answers != features.labels[rest]).sum())
    assert wrong > 5  # it was not too easy to differ


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs are not here")
def test_photographs_are_given_the_same_classes(tmp_path: Path) -> None:
    weights = {f"backbone.{name}": value for name, value in tiny_network().state_dict().items()}
    config = resolve(
        "debug-pretrain", ["data.dataset=folder", f"data={PHOTOGRAPHS}", "accelerator=cpu", "precision=fp32"]
    )
    checkpoint.save_checkpoint({"teacher": weights, "config": config.model_dump(mode="json")}, tmp_path / "net.pt")
    opened = api.open_features(tmp_path / "net.pt")
    assert opened.stream is not None
    features = opened.features()
    protocol = check_protocol(way=5, shots=(5,), query="all", episodes=1)
    expected = measure(features, protocol, 5, make_head(protocol.head))
    members = Members(features.labels, len(features.class_names))
    episode = draw(members, Shape(5, 5, "all"), episodes=1, seed=protocol.seed)
    chosen = set(episode.support.flatten().tolist())
    for index, label in enumerate(features.labels):
        folder = tmp_path / ("support" if index in chosen else "rest") / features.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(opened.stream.images.name(index), folder)

    for words in (
        ["fit", tmp_path / "support", "-o", tmp_path / "clf.smkd", "--backbone", tmp_path / "net.pt"],
        ["predict", tmp_path / "clf.smkd", tmp_path / "rest", "--csv", tmp_path / "answers.csv"],
    ):
        extra = ["--head", "prototype"] if words[0] == "fit" else []
        assert CliRunner().invoke(app, [str(word) for word in [*words, *extra]]).exit_code == 0
    ways = [features.class_names[number] for number in episode.classes[0].tolist()]
    counts = np.zeros((5, 5), int)
    with (tmp_path / "answers.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            counts[ways.index(Path(row["image"]).parent.name), ways.index(row["answer"])] += 1
    assert counts.tolist() == expected.counts[0].tolist()
    assert counts.sum() == len(features.labels) - 25
