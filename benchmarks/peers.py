"""smkd's few-shot heads beside those of easyfsl and scikit-learn: the same features, the same episodes.

A peer learns and answers one episode at a time, as its users call it. `same` marks pairs that compute the same
answers; the script exits with 1 if one of these differs by more than the 95 % interval of the paired difference. The
others are two ways of one idea, and only their time and accuracy stand side by side. Time is the processor's, with one
thread. easyfsl is measured where it is installed (`pip install 'smkd[peers]'`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from torch import Tensor

from smkd import fewshot
from smkd.fewshot.accuracy import compare_results
from smkd.fewshot.feature_file import read_features

CLASSES, PER_CLASS, DIM = 20, 60, 384
SPREAD = 0.3  # of the classes' centres, beside images of spread 1
SHOTS = (1, 5)


@dataclass(frozen=True)
class Pair:
    """A head of smkd and what corresponds to it.

    Attributes:
        head: name and options.
        peer: whose, and its name and options.
        make: gives a function from support, labels and queries of an episode to answers or scores.
        same: both compute the same answers.
    """

    head: str
    peer: str
    make: Callable[[], Callable[[Tensor, Tensor, Tensor], Tensor]]
    same: bool = False


class OneByOne:
    """A peer as a head: episode after episode."""

    def __init__(self, answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.answer = answer

    def __call__(self, support: Tensor, labels: Tensor, query: Tensor, generator: torch.Generator) -> Tensor:
        """Scores [episodes, queries, way]."""
        with torch.inference_mode(False):  # some train
            episodes = zip(support.clone(), labels.clone(), query.clone(), strict=True)
            return torch.stack([self.answer(*episode) for episode in episodes])


def of_sklearn(model: Callable[[], Any]) -> Callable[[], Callable[[Tensor, Tensor, Tensor], Tensor]]:
    def answer(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        with np.errstate(invalid="ignore"):  # NearestCentroid divides 0 by 0 where a class has one image
            given = model().fit(support.numpy(), labels.numpy()).predict(query.numpy())
        return torch.nn.functional.one_hot(torch.from_numpy(given), int(labels.max()) + 1).float()

    return lambda: answer


def by_cosine(distances: np.ndarray) -> np.ndarray:
    return 1 - distances


SKLEARN = [
    Pair("prototype:metric=euclidean", "scikit-learn NearestCentroid", of_sklearn(NearestCentroid), same=True),
    Pair("logistic", "scikit-learn LogisticRegression, to 1e-6", of_sklearn(
        lambda: LogisticRegression(max_iter=10_000, tol=1e-6)), same=True),
    Pair("ridge", "scikit-learn RidgeClassifier", of_sklearn(lambda: RidgeClassifier(alpha=1.0)), same=True),
    Pair("knn:neighbours=3", "scikit-learn KNeighborsClassifier, 3, weighted by cosine", of_sklearn(
        lambda: KNeighborsClassifier(3, metric="cosine", weights=by_cosine)), same=True),
]  # fmt: skip


def of_easyfsl(module: str, name: str, **options: Any) -> Callable[[], Callable[[Tensor, Tensor, Tensor], Tensor]]:
    def make() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        method = getattr(importlib.import_module(f"easyfsl.methods.{module}"), name)(**options)

        def answer(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
            with torch.no_grad():
                method.process_support_set(support, labels)
                return method(query).detach()

        return answer

    return make


# BDCSPN and LaplacianShot move the queries to make prototypes and classify them where they were; smkd classifies the
# moved ones. LaplacianShot counts a query among its own neighbours: 4 are 3 others.
EASYFSL = [
    Pair("prototype:metric=euclidean", "easyfsl PrototypicalNetworks",
         of_easyfsl("prototypical_networks", "PrototypicalNetworks"), same=True),
    Pair("prototype", "easyfsl SimpleShot", of_easyfsl("simple_shot", "SimpleShot"), same=True),
    Pair("simpleshot", "easyfsl PrototypicalNetworks, normalised",
         of_easyfsl("prototypical_networks", "PrototypicalNetworks", feature_normalization=2), same=True),
    Pair("bd-cspn:scale=1", "easyfsl BDCSPN, normalised", of_easyfsl("bd_cspn", "BDCSPN", feature_normalization=2)),
    Pair("laplacian-shot:scale=1", "easyfsl LaplacianShot, normalised, knn=4",
         of_easyfsl("laplacian_shot", "LaplacianShot", feature_normalization=2, knn=4)),
    Pair("tim", "easyfsl TIM, normalised", of_easyfsl("tim", "TIM", feature_normalization=2)),
    Pair("pt-map", "easyfsl PTMAP, normalised, 20 steps",
         of_easyfsl("pt_map", "PTMAP", feature_normalization=2, fine_tuning_steps=20)),
    Pair("classifier", "easyfsl Finetune", of_easyfsl("finetune", "Finetune")),
    Pair("transductive-finetune", "easyfsl TransductiveFinetuning",
         of_easyfsl("transductive_finetuning", "TransductiveFinetuning")),
]  # fmt: skip


def easyfsl_is_here() -> bool:
    """Whether easyfsl's methods can be imported.

    Its package of methods begins by importing networks that need torchvision and are not used here. The package is
    therefore made without its `__init__`, and its modules are imported one by one.
    """
    found = find_spec("easyfsl")
    if found is None or found.origin is None:
        print("easyfsl is not installed (pip install 'smkd[peers]'): scikit-learn alone is beside smkd")
        return False
    package = types.ModuleType("easyfsl.methods")
    package.__path__ = [str(Path(found.origin).parent / "methods")]
    sys.modules["easyfsl.methods"] = package
    return True


def gaussians() -> tuple[Tensor, np.ndarray]:
    rng = torch.Generator().manual_seed(0)
    labels = np.repeat(np.arange(CLASSES), PER_CLASS)
    centres = SPREAD * torch.randn(CLASSES, DIM, generator=rng)
    return centres[torch.from_numpy(labels)] + torch.randn(len(labels), DIM, generator=rng), labels


def measured(pairs: list[Pair], features: Tensor, labels: np.ndarray, episodes: int) -> Iterator[dict[str, Any]]:
    for pair in pairs:
        for shot in SHOTS:
            spent, results = [], []
            heads: tuple[str | OneByOne, ...] = (pair.head, OneByOne(pair.make()))
            for head in heads:
                fewshot.evaluate(features, labels, head=head, shot=shot, episodes=2)  # loads what it needs
                start = time.process_time()
                results.append(fewshot.evaluate(features, labels, head=head, shot=shot, episodes=episodes))
                spent.append(1e3 * (time.process_time() - start) / episodes)
            found = compare_results(results[1], results[0])
            yield {
                "head": pair.head, "peer": pair.peer, "shot": shot, "same": pair.same, "ms": spent[0],
                "peer_ms": spent[1], "ratio": spent[1] / spent[0], "accuracy": results[0].mean,
                "peer_accuracy": results[1].mean, "difference": found.difference, "ci95": found.ci95,
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=Path, help="feature file of `smkd features`; none: Gaussian classes")
    parser.add_argument("--episodes", type=int, default=100)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.features is None:
        features, labels = gaussians()
    else:
        read = read_features(given.features)
        features, labels = read.values, read.labels
    print(f"{len(labels)} features of {features.shape[1]} numbers, 5-way, 15 queries, {given.episodes} episodes")
    rows = []
    for row in measured(SKLEARN + (EASYFSL if easyfsl_is_here() else []), features, labels, given.episodes):
        rows.append(row)
        ours = f"{row['head']}, {row['shot']}-shot: {row['ms']:.2f} ms an episode, {row['accuracy']:.2f} %"
        theirs = f"{row['peer']}: {row['peer_ms']:.2f} ms ({row['ratio']:.1f} x), {row['peer_accuracy']:.2f} %"
        apart = f"difference {row['difference']:+.2f} ± {row['ci95']:.2f}{', same' * row['same']}"
        print("; ".join((ours, theirs, apart)), flush=True)
    print(json.dumps({"episodes": given.episodes, "torch": torch.__version__, "rows": rows}))
    if wrong := [row["head"] for row in rows if row["same"] and abs(row["difference"]) > row["ci95"]]:
        raise SystemExit(f"not the same after all: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
