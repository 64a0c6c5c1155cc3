"""Evaluation views, pooled features and few-shot accuracies against the reference."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from golden_files import backbone, cases_within, close, load
from smkd.config.protocol import FeaturesConfig
from smkd.data.augment import resize_center_crop
from smkd.data.color import normalize
from smkd.data.datasets import CIFAR, IMAGENET
from smkd.fewshot.accuracy import accuracies, summary
from smkd.fewshot.episodes import Episodes, Members
from smkd.fewshot.features import pool
from smkd.fewshot.head import rule_products
from smkd.fewshot.heads import make_head
from smkd.fewshot.scoring import count_predictions, support_labels
from smkd.fewshot.sgd import Classifier, Start, train_dist, train_softmax

PARTS = {"cls": "cls", "avg": "mean", "wavg": "weighted_mean"}
RECIPES = r"(n\d+/(?:cls|avg|wavg)(?:_(?:avg|wavg))*)"
CONSTANTS = {"imagenet": IMAGENET, "cifar": CIFAR}
NORMALISED = cases_within("augment_*.npz", rf"(.+/\d+_\d+/(?:{'|'.join(CONSTANTS)}))")


# RECIPES leaves out `..._lastonly`, a mixture of blocks that we do not offer
@pytest.mark.parametrize(("path", "recipe"), cases_within("features_*.npz", RECIPES))
def test_features(path: Path, recipe: str) -> None:
    golden = load(path)
    count, names = recipe.removeprefix("n").split("/")
    parts = tuple(PARTS[name] for name in names.split("_"))
    config = FeaturesConfig(blocks=int(count), parts=parts)
    values = pool(backbone(path).last_blocks(golden.tensor("x"), config.blocks), config)
    close(values, golden.tensor(recipe), atol=1e-5)


def episodes(path: Path, shots: str) -> tuple[Tensor, Members, Episodes]:
    """Features, their classes, and the episodes that the reference drew from them."""
    golden = load(path)
    bank = golden.tensor("bank")
    shot, queries = int(shots.removesuffix("shot")), golden.options["n_query"]
    classes = golden.tensor(f"{shots}/class")
    rows = classes[..., None] * bank.shape[1] + golden.tensor(f"{shots}/perm")
    drawn = Episodes(
        classes,
        rows[..., :shot],
        rows[..., shot : shot + queries].flatten(1),
        torch.arange(rows.shape[1]).repeat_interleave(queries).expand(len(rows), -1),
    )
    return bank.flatten(0, 1), Members(np.repeat(np.arange(len(bank)), bank.shape[1]), len(bank)), drawn


def same_accuracies(path: Path, shots: str, head: str, expected: str) -> None:
    """Exact, but that a tie at rounding level may turn one query of an episode."""
    features, members, drawn = episodes(path, shots)
    ours = accuracies(count_predictions(features, members, drawn, make_head(head), seed=0))
    assert drawn.query is not None
    close(ours, load(path).tensor(expected), atol=100 / drawn.query.shape[1] + 1e-9)
    exact = torch.isclose(ours, load(path).tensor(expected), atol=1e-9)
    assert exact.double().mean() >= 0.95


@pytest.mark.parametrize(("path", "shots"), cases_within("fewshot_*.npz", r"(\d+shot)/cosine_acc"))
def test_prototype_accuracies(path: Path, shots: str) -> None:
    same_accuracies(path, shots, "prototype", f"{shots}/cosine_acc")


@pytest.mark.parametrize(("path", "case"), cases_within("fewshot_*.npz", r"(\d+shot/knn\d+)_acc_corrected"))
def test_knn_accuracies(path: Path, case: str) -> None:
    shots, neighbours = case.split("/knn")
    same_accuracies(path, shots, f"knn:neighbours={neighbours}", f"{case}_acc_corrected")


@pytest.mark.parametrize(("path", "case"), cases_within("fewshot_*.npz", r"(\d+shot/knn\d+)_acc_reference"))
def test_knn_accuracies_as_published(path: Path, case: str) -> None:
    shots, neighbours = case.split("/knn")
    same_accuracies(path, shots, f"knn:neighbours={neighbours},reference=true", f"{case}_acc_reference")


@pytest.mark.parametrize(("path", "case"), cases_within("fewshot_*.npz", r"(\d+shot/clf_(?:dist|softmax)/\d+)/logits"))
def test_classifier_logits(path: Path, case: str) -> None:
    golden = load(path)
    shot, loss = int(case.split("shot")[0]), case.split("/")[1].removeprefix("clf_")
    bank, queries = golden.tensor("bank"), golden.options["n_query"]
    images = bank[golden.tensor(f"{case}/class")[:, None], golden.tensor(f"{case}/perm")]
    way = len(images)
    head = Classifier(loss=loss)  # type: ignore[arg-type]
    support, query = (
        head.prepare(part.flatten(0, 1)[None]) for part in (images[:, :shot], images[:, shot:][:, :queries])
    )
    labels = support_labels(way, shot, 1, torch.device("cpu"))
    logits = golden.tensor(f"{case}/logits")
    order = golden.tensor(f"{case}/batch_order").long()[None]
    for point, expected in enumerate(logits):
        # the reference looks after epochs 100, 200, ..., counted from zero
        seen = order[:, : 100 * (point + 1) + 1]
        if loss == "softmax":
            start = Start(golden.tensor(f"{case}/init/weight")[None], bias=golden.tensor(f"{case}/init/bias")[None])
            rule = train_softmax(support, labels, start, seen)
        else:
            magnitude = golden.tensor(f"{case}/init/weight_g")[None, :, 0]
            rule = train_dist(
                support, labels, Start(golden.tensor(f"{case}/init/weight_v")[None], magnitude=magnitude), seen
            )
        ours = rule_products(rule, query)[0].T
        close(ours, expected, atol=1e-4)
        right = (ours.argmax(dim=1) == torch.arange(way).repeat_interleave(queries)).double().mean()
        assert 100 * float(right) == pytest.approx(
            float(golden.tensor(f"{case}/acc")[point]), abs=100 / len(ours) + 1e-9
        )


@pytest.mark.parametrize(("path", "shots"), cases_within("fewshot_*.npz", r"(\d+shot)/cosine_summary"))
def test_mean_and_interval(path: Path, shots: str) -> None:
    golden = load(path)
    ours = summary(golden.tensor(f"{shots}/cosine_acc"))
    assert ours == pytest.approx(golden.arrays[f"{shots}/cosine_summary"].tolist(), abs=1e-9)


def evaluation_view(path: Path, case: str) -> Tensor:
    """uint8 [3, crop, crop] of a case `<image>/<resize>_<crop>`."""
    name, resize, crop = re.fullmatch(r"(.+)/(\d+)_(\d+)", case).groups()  # type: ignore[union-attr]
    image = torch.from_numpy(load(path).arrays[f"image/{name}"]).permute(2, 0, 1)
    return resize_center_crop(image, int(resize), int(crop))


@pytest.mark.parametrize(("path", "case"), cases_within("augment_*.npz", r"(.+/\d+_\d+)/uint8"))
def test_evaluation_view_is_within_one_grey_level(path: Path, case: str) -> None:
    ours, expected = evaluation_view(path, case), load(path).tensor(f"{case}/uint8").permute(2, 0, 1)
    assert ours.dtype == torch.uint8
    assert ours.shape == expected.shape
    difference = int((ours.int() - expected.int()).abs().max())
    assert difference <= 1


@pytest.mark.parametrize(("path", "case"), NORMALISED)
def test_normalisation_of_the_same_pixels(path: Path, case: str) -> None:
    golden = load(path)
    view, constants = case.rsplit("/", 1)
    pixels = golden.tensor(f"{view}/uint8").permute(2, 0, 1).float() / 255
    close(normalize(pixels, *CONSTANTS[constants]), golden.tensor(case), atol=1e-5)


@pytest.mark.parametrize(("path", "case"), NORMALISED)
def test_normalised_view_is_within_one_grey_level(path: Path, case: str) -> None:
    view, constants = case.rsplit("/", 1)
    mean, std = CONSTANTS[constants]
    ours = normalize(evaluation_view(path, view).float() / 255, mean, std)
    difference = (ours - load(path).tensor(case)).abs().amax(dim=(1, 2))
    levels = (difference * 255 * torch.tensor(std)).tolist()
    assert max(levels) <= 1 + 1e-3
