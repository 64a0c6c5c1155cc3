"""The classifier: accuracy, calibration, unknown classes, time to fit, and images a second against two loops.

The loops are those that people write: one call of `predict` an image, and one `smkd predict` an image.

python benchmarks/classifier.py              plain colours of the embedded patterns
python benchmarks/classifier.py RUN          a run's test classes; also a feature file, without the loop
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf
from sklearn.metrics import roc_auc_score

from smkd import api
from smkd.classify import FewShotClassifier, open_encoder
from smkd.fewshot.accuracy import measure
from smkd.fewshot.episodes import Members, Shape, draw
from smkd.fewshot.features import Features
from smkd.fewshot.heads import make_head

WAY, SHOT, QUERY, DRAWS, BINS = 10, 5, 15, 30, 15
HEADS = ("prototype", "ridge", "logistic", "logistic:c=10", "knn", "classifier", "auto")
IMAGES, LOOPED, STARTED = 1000, 200, 3
TURNS = 3


def calibration_error(chances: NDArray[np.float64], truth: NDArray[np.int64]) -> float:
    """Mean distance of confidence and accuracy over bins of equal width, weighted by their images."""
    confidence, right = chances.max(axis=1), chances.argmax(axis=1) == truth
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(float((right[place == b] - confidence[place == b]).sum())) for b in range(BINS)]
    return sum(gaps) / len(truth)


def heads(features: Features) -> dict[str, dict[str, float]]:
    found, shares = {}, {}
    values, members = features.values.numpy(), Members(features.labels, len(features.class_names))
    episodes = draw(members, Shape(WAY, SHOT, QUERY), episodes=DRAWS, seed=0)
    assert episodes.query is not None
    assert episodes.truth is not None
    labels = np.repeat(np.arange(WAY), SHOT)
    for head in HEADS:
        raw, fitted, truths, right, seconds = [], [], [], [], []
        for support, query, truth in zip(episodes.support, episodes.query, episodes.truth, strict=True):
            start = time.perf_counter()
            classifier = FewShotClassifier(head=head).fit(values[support.flatten()], labels)
            seconds.append(time.perf_counter() - start)
            asked = values[query]
            chances = classifier.predict_proba(asked)
            # softmax(scores), from softmax(scores / T)
            sharp = np.log(np.maximum(chances, 1e-300)) * classifier.temperature_
            weights = np.exp(sharp - sharp.max(axis=1, keepdims=True))
            raw.append(weights / weights.sum(axis=1, keepdims=True))
            fitted.append(chances)
            truths.append(truth.numpy())
            right.append(float((chances.argmax(axis=1) == truth.numpy()).mean()))
        shares[head] = np.array(right)
        truth_all = np.concatenate(truths)
        errors = [calibration_error(np.concatenate(each), truth_all) for each in (raw, fitted)]
        found[head] = {
            "accuracy": 100 * float(np.mean(right)), "calibration error, raw": errors[0],
            "calibration error, fitted": errors[1], "fit, seconds": float(np.mean(seconds)),
        }  # fmt: skip
        print(
            f"{head:14} accuracy {100 * np.mean(right):.1f} ± {196 * np.std(right) / DRAWS**0.5:.1f} %, "
            f"calibration error {errors[0]:.3f} raw, {errors[1]:.3f} fitted, "
            f"fit {np.mean(seconds):.3f} s"
        )
    best = max((head for head in HEADS if head != "auto"), key=lambda head: shares[head].mean())
    less = 100 * (shares["auto"] - shares[best])
    print(f"auto less {best}, on the same draws: {less.mean():+.1f} ± {1.96 * less.std() / DRAWS**0.5:.1f} points")
    return found


def rejection(features: Features) -> dict[str, float]:
    """AUROC of unknown classes by `known_proba`, and by other scores on the same draws."""
    values, members = features.values.double(), Members(features.labels, len(features.class_names))
    episodes = draw(members, Shape(WAY, SHOT, QUERY), episodes=DRAWS, seed=0)
    assert episodes.query is not None
    labels = torch.arange(WAY).repeat_interleave(SHOT)
    found: dict[str, list[float]] = {}
    for rows, query, classes in zip(episodes.support, episodes.query, episodes.classes, strict=True):
        support = values[rows.flatten()]
        others = torch.cat([rows[:QUERY] for label, rows in enumerate(members.rows) if label not in classes.tolist()])
        asked = values[torch.cat([query, others])]
        classifier = FewShotClassifier().fit(support.float(), labels)
        means = torch.stack([support[labels == way].mean(dim=0) for way in range(WAY)])
        cosines, near = (F.normalize(asked, dim=1) @ F.normalize(to, dim=1).T for to in (means, support))
        shrunk = ledoit_wolf((support - means[labels]).numpy(), assume_centered=True)[0]
        whiten = torch.linalg.cholesky(torch.linalg.inv(torch.from_numpy(shrunk)))
        scores = {
            "known_proba": torch.from_numpy(classifier.known_proba(asked.float())), "nearest image": near.amax(dim=1),
            "mean of the 3 nearest images": near.topk(3).values.mean(dim=1),
            "Mahalanobis distance": -torch.cdist(asked @ whiten, means @ whiten).amin(dim=1),
            "largest probability": (cosines / 0.05).softmax(dim=1).amax(dim=1),
            "margin": cosines.topk(2).values @ torch.tensor([1.0, -1.0]).double(),
        }  # fmt: skip
        known = np.repeat([1, 0], [len(query), len(others)])
        for name, score in scores.items():
            found.setdefault(name, []).append(float(roc_auc_score(known, score.numpy())))
    means_of = {name: float(np.mean(areas)) for name, areas in found.items()}
    for name, areas in found.items():
        less = np.array(areas) - found["known_proba"]
        gain = f"{less.mean():+.3f} ± {1.96 * less.std() / DRAWS**0.5:.3f}"
        print(f"unknown classes by {name}: AUROC {means_of[name]:.3f}, {gain} to the first")
    return means_of


def same_as_eval(opened: api.Opened, features: Features) -> bool:
    """Episodes of `smkd eval` with all images outside the support as queries, and the same through the classifier."""
    same = True
    protocol = opened.protocol.model_copy(update={"way": WAY, "query": "all", "episodes": 5, "head": "prototype"})
    result = measure(features, protocol, SHOT, make_head("prototype"))
    members, values = Members(features.labels, len(features.class_names)), features.values.numpy()
    episodes = draw(members, Shape(WAY, SHOT, "all"), episodes=5, seed=protocol.seed)
    for support, classes, wanted in zip(episodes.support, episodes.classes, result.counts, strict=True):
        rows, ways = support.flatten().numpy(), classes.tolist()
        rest = np.setdiff1d(np.flatnonzero(np.isin(features.labels, ways)), rows)
        answers = FewShotClassifier().fit(values[rows], features.labels[rows]).predict(values[rest])
        counts = np.zeros((WAY, WAY), np.int64)
        np.add.at(counts, ([ways.index(n) for n in features.labels[rest]], [ways.index(n) for n in answers]), 1)
        same = same and bool((counts == wanted.numpy()).all())
        shares = [100 * np.trace(each) / each.sum() for each in (wanted.numpy(), counts)]
        print(f"same split, {len(rest)} images: smkd eval {shares[0]:.4f} %, classifier {shares[1]:.4f} %")
    return same


def images_a_second(opened: api.Opened, features: Features, source: str) -> dict[str, float]:
    assert opened.stream is not None
    images = opened.stream.images
    files = Path(images.name(0)).is_file()
    items = [
        Path(images.name(i % len(images))) if files else images.load(i % len(images)).permute(1, 2, 0).numpy()
        for i in range(IMAGES)
    ]
    some = np.concatenate([rows[:SHOT] for rows in Members(features.labels, len(features.class_names)).rows[:WAY]])
    classifier = FewShotClassifier(open_encoder(source)).fit(features.values.numpy()[some], features.labels[some])
    classifier.predict(items[:8])
    turns, loops = [], []
    for _ in range(TURNS):
        start = time.perf_counter()
        together = classifier.predict(items)
        turns.append(time.perf_counter() - start)
        start = time.perf_counter()
        alone = [classifier.predict([item])[0] for item in items[:LOOPED]]
        loops.append((time.perf_counter() - start) * IMAGES / LOOPED)
    once, loop = min(turns), min(loops)
    same = float((np.array(alone) == together[:LOOPED]).mean())
    print(
        f"{IMAGES} images at once {once:.2f} s, one call an image {loop:.2f} s ({LOOPED} measured): "
        f"{loop / once:.1f} x, {100 * same:.0f} % the same answers"
    )
    found = {"at once, seconds": once, "to a call an image": loop / once}
    if files:
        started = process_an_image(classifier, [str(item) for item in items[:STARTED]])
        print(f"one `smkd predict` an image {started:.2f} s each: {started * IMAGES / once:.0f} x")
        found["to a process an image"] = started * IMAGES / once
    return found


def process_an_image(classifier: FewShotClassifier, files: list[str]) -> float:
    """Seconds of `smkd predict` with one image."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clf.smkd"
        classifier.save(file)
        start = time.perf_counter()
        for name in files:
            command = [sys.executable, "-m", "smkd", "predict", str(file), name]
            subprocess.run(command, check=True, capture_output=True)
    return (time.perf_counter() - start) / len(files)


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else "pixels"
    opened = api.open_features(source, recipe="patterns-pretrain" if source == "pixels" else None)
    features = opened.features()
    found: dict[str, Any] = {
        "heads": heads(features), "unknown AUROC": rejection(features),
        "same as smkd eval": same_as_eval(opened, features),
    }  # fmt: skip
    if opened.stream is not None:
        found |= images_a_second(opened, features, source)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
