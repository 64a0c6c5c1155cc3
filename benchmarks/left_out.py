"""How often the interval that `smkd fit` prints holds the accuracy on other photographs, over draws of unequal classes.

Each draw takes some classes, and 3 to 30 images of each as the support; the other images of these classes are the ones
that the classifier has not learned from. Compared is the mean over classes, which counts every class the same.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from smkd import api
from smkd.classify import FewShotClassifier

FEWEST, MOST = 3, 30


def draw(labels: np.ndarray, classes: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the support and of the other images, of so many classes."""
    support, others = [], []
    for label in rng.choice(np.unique(labels), classes, replace=False):
        rows = rng.permutation(np.flatnonzero(labels == label))
        size = min(int(rng.integers(FEWEST, MOST + 1)), len(rows) - FEWEST)
        support.append(rows[:size])
        others.append(rows[size:])
    return np.concatenate(support), np.concatenate(others)


def class_mean(right: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("features", nargs="?", default="pixels", help="feature file; else colours of embedded patterns")
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--head", default="auto")
    given = parser.parse_args()
    recipe = "patterns-pretrain" if given.features == "pixels" else None
    features = api.open_features(given.features, recipe=recipe).features()
    values, labels, rng = features.values.numpy(), np.asarray(features.labels), np.random.default_rng(0)
    held, promised, met, widths = [], [], [], []
    for _ in range(given.draws):
        support, others = draw(labels, given.classes, rng)
        classifier = FewShotClassifier(head=given.head).fit(values[support], labels[support])
        low, high = classifier.left_out_.interval
        accuracy = class_mean(classifier.predict(values[others]) == labels[others], labels[others])
        held.append(low <= accuracy <= high)
        promised.append(classifier.left_out_.mean)
        met.append(accuracy)
        widths.append(high - low)
    found = {
        "draws": given.draws, "held": float(np.mean(held)), "promised": float(np.mean(promised)),
        "met": float(np.mean(met)), "width": float(np.mean(widths)),
    }  # fmt: skip
    held_in, promised_, met_, wide = (100 * found[key] for key in ("held", "promised", "met", "width"))
    print(f"{given.draws} draws of {given.classes} classes with {FEWEST} to {MOST} images: the interval holds the "
          f"accuracy on other images in {held_in:.0f} % of them; promised {promised_:.1f} %, met {met_:.1f} % in the "
          f"mean, {wide:.1f} points wide")  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
