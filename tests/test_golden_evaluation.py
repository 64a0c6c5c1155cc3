"""Evaluation views, pooled features and few-shot accuracies against the reference."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from golden_files import backbone, cases_within, close, load
from smkd.config.schema import FeaturesConfig
from smkd.data.color import normalize
from smkd.data.crops import resize_center_crop
from smkd.data.datasets import CIFAR, IMAGENET
from smkd.fewshot.episodes import Episodes
from smkd.fewshot.evaluate import episode_accuracies, summary
from smkd.fewshot.features import pool

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


def episodes(path: Path, shots: str) -> tuple[Tensor, Episodes]:
    """Features, and the episodes that the reference drew from them."""
    golden = load(path)
    bank = golden.tensor("bank")
    shot, queries = int(shots.removesuffix("shot")), golden.options["n_query"]
    rows = golden.tensor(f"{shots}/class")[..., None] * bank.shape[1] + golden.tensor(f"{shots}/perm")
    return bank.flatten(0, 1), Episodes(rows[..., :shot], rows[..., shot : shot + queries])


def within_one_query(ours: Tensor, expected: Tensor, drawn: Episodes) -> None:
    """Ties at rounding level may turn one query of an episode."""
    _, way, queries = drawn.query.shape
    close(ours, expected, atol=100 / (way * queries) + 1e-9)


@pytest.mark.parametrize(("path", "shots"), cases_within("fewshot_*.npz", r"(\d+shot)/cosine_acc"))
def test_prototype_accuracies(path: Path, shots: str) -> None:
    features, drawn = episodes(path, shots)
    within_one_query(episode_accuracies(features, drawn, "prototype"), load(path).tensor(f"{shots}/cosine_acc"), drawn)


@pytest.mark.parametrize(("path", "case"), cases_within("fewshot_*.npz", r"(\d+shot/knn\d+)_acc_corrected"))
def test_knn_accuracies(path: Path, case: str) -> None:
    shots, neighbours = case.split("/knn")
    features, drawn = episodes(path, shots)
    ours = episode_accuracies(features, drawn, "knn", int(neighbours))
    within_one_query(ours, load(path).tensor(f"{case}_acc_corrected"), drawn)


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
