"""The classifier: accuracy, calibration, unknown classes, time to fit, and images a second against a loop.

python benchmarks/classifier.py              plain colours of the embedded patterns
python benchmarks/classifier.py RUN          a run's test classes; also a feature file, without the loop
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from smkd import api
from smkd.classify import FewShotClassifier, open_encoder
from smkd.fewshot.accuracy import measure
from smkd.fewshot.episodes import Members, draw
from smkd.fewshot.features import Features
from smkd.fewshot.heads import make_head

WAY, SHOT, QUERY, DRAWS, BINS = 10, 5, 15, 30, 15
HEADS = ("prototype", "ridge", "logistic", "logistic:c=10", "knn", "classifier", "auto")
IMAGES, LOOPED = 1000, 200


def calibration_error(chances: NDArray[np.float64], truth: NDArray[np.int64]) -> float:
    """Mean distance of confidence and accuracy over bins of equal width, weighted by their images."""
    confidence, right = chances.max(axis=1), chances.argmax(axis=1) == truth
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(float((right[place == b] - confidence[place == b]).sum())) for b in range(BINS)]
    return sum(gaps) / len(truth)


def heads(features: Features) -> None:
    values, members = features.values.numpy(), Members(features.labels, len(features.class_names))
    episodes = draw(members, way=WAY, shot=SHOT, query=QUERY, episodes=DRAWS, seed=0)
    assert episodes.query is not None
    assert episodes.truth is not None
    labels = np.repeat(np.arange(WAY), SHOT)
    for head in HEADS:
        raw, fitted, truths, areas, right, seconds = [], [], [], [], [], []
        for support, query, truth, classes in zip(
            episodes.support, episodes.query, episodes.truth, episodes.classes, strict=True
        ):
            start = time.perf_counter()
            classifier = FewShotClassifier(head=head).fit(values[support.flatten()], labels)
            seconds.append(time.perf_counter() - start)
            asked = values[query]
            chances = classifier.predict_proba(asked)
            # softmax(scores), from softmax(scores / T)
            sharp = np.log(np.maximum(chances, 1e-300)) * classifier.temperature_
            raw.append(np.exp(sharp) / np.exp(sharp).sum(axis=1, keepdims=True))
            fitted.append(chances)
            truths.append(truth.numpy())
            right.append(float((chances.argmax(axis=1) == truth.numpy()).mean()))
            others = [rows[:QUERY] for label, rows in enumerate(members.rows) if label not in classes.tolist()]
            unknown = values[np.concatenate(others)]
            known = np.concatenate([classifier.known_proba(asked), classifier.known_proba(unknown)])
            areas.append(float(roc_auc_score(np.repeat([1, 0], [len(asked), len(unknown)]), known)))
        truth_all = np.concatenate(truths)
        errors = [calibration_error(np.concatenate(each), truth_all) for each in (raw, fitted)]
        print(
            f"{head:14} accuracy {100 * np.mean(right):.1f} ± {196 * np.std(right) / DRAWS**0.5:.1f} %, "
            f"calibration error {errors[0]:.3f} raw, {errors[1]:.3f} fitted, "
            f"unknown classes AUROC {np.mean(areas):.3f}, fit {np.mean(seconds):.3f} s"
        )


def same_as_eval(opened: api.Opened, features: Features) -> None:
    """Episodes of `smkd eval` with all images outside the support as queries, and the same through the classifier."""
    protocol = opened.protocol.model_copy(update={"way": WAY, "query": "all", "episodes": 5, "head": "prototype"})
    result = measure(features, protocol, SHOT, make_head("prototype"))
    members, values = Members(features.labels, len(features.class_names)), features.values.numpy()
    episodes = draw(members, way=WAY, shot=SHOT, query="all", episodes=5, seed=protocol.seed)
    for support, classes, wanted in zip(episodes.support, episodes.classes, result.accuracies, strict=True):
        rows = support.flatten().numpy()
        rest = np.setdiff1d(np.flatnonzero(np.isin(features.labels, classes.numpy())), rows)
        classifier = FewShotClassifier().fit(values[rows], features.labels[rows])
        share = 100 * classifier.score(values[rest], features.labels[rest])
        print(f"same split: smkd eval {float(wanted):.4f} %, classifier {share:.4f} %")


def images_a_second(opened: api.Opened, features: Features, source: str) -> None:
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
    start = time.perf_counter()
    together = classifier.predict(items)
    middle = time.perf_counter()
    alone = [classifier.predict([item])[0] for item in items[:LOOPED]]
    loop = (time.perf_counter() - middle) * IMAGES / LOOPED
    same = float((np.array(alone) == together[:LOOPED]).mean())
    print(
        f"{IMAGES} images at once {middle - start:.2f} s, one by one {loop:.2f} s ({LOOPED} measured): "
        f"{loop / (middle - start):.1f} x, {100 * same:.0f} % the same answers"
    )


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else "pixels"
    opened = api.open_features(source, recipe="patterns-pretrain")
    features = opened.features()
    heads(features)
    same_as_eval(opened, features)
    if opened.stream is not None:
        images_a_second(opened, features, source)


if __name__ == "__main__":
    main()
