"""More images and more classes for a classifier that is there, without the photographs that it learned from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from smkd.classify.classifier import ImageClassifier
from smkd.classify.estimator import FewShotClassifier
from smkd.classify.pictures import listed_images, support_images
from smkd.data.formats import class_folders, holds_pictures, loose_pictures, nfc
from smkd.errors import ConfigError, DataError
from smkd.files import expanded
from smkd.progress import Track

SAME = 1 - 1e-4
"""Cosine above which two images are taken for the same photograph."""


class Added(NamedTuple):
    """What a classifier has learned besides.

    Attributes:
        images: how many of each class, by its label.
        new: the labels that it did not know before.
        skipped: photographs that it had learned from already, each with the label that it has for them.
    """

    images: dict[Any, int]
    new: list[Any]
    skipped: list[tuple[str, Any]]


def add_images(classifier: FewShotClassifier, folder: Path, track: Track | None = None) -> Added:
    """Let a classifier learn from a folder besides (`FewShotClassifier.partial_fit`).

    What it reads of its backbone stays; where its head is 'auto', the head is chosen anew.

    Args:
        classifier: fitted, with a backbone; it is changed.
        folder: images, whose class is the folder's name; or a folder of images for each class.
        track: shows progress.

    Raises:
        ConfigError: the classifier has no backbone.
        DataError: no images, one that cannot be read, none that is new, or a class under another spelling.
    """
    if classifier.encoder_ is None:
        raise ConfigError("the classifier was made from features and has no backbone to look at images with")
    files = images_by_class(folder)
    own = own_labels(files, classifier)
    paths = [path for of_class in files.values() for path in of_class]
    labels = [own[name] for name, of_class in files.items() for _ in of_class]
    encoded = classifier.encoder_.readable(paths, track)
    if encoded.unreadable:
        raise DataError(encoded.unreadable[0])
    same = learned_rows(classifier, encoded.values)
    before = [classifier.classes_[classifier.support_labels_[row]] for row in same]
    skipped = [(path, label) for path, label, row in zip(paths, before, same, strict=True) if row >= 0]
    fresh = np.flatnonzero(same < 0)
    if not len(fresh):
        raise DataError(f"'{folder}' holds nothing new: the classifier has learned from all {len(paths)} images of it")
    known = set(classifier.classes_.tolist())
    taken = [labels[row] for row in fresh]
    classifier.partial_fit(encoded.values[fresh], taken)
    images = dict(Counter(taken))
    return Added(images, [label for label in images if label not in known], skipped)


def images_by_class(folder: Path) -> dict[str, list[str]]:
    """Image files of each class, its name in NFC.

    Args:
        folder: images, whose class is the folder's name; or a folder of images for each class.

    Raises:
        DataError: no folder, no images, or both kinds in one.
    """
    folder = expanded(folder)
    if folder.is_dir():
        loose, inside = loose_pictures(folder), class_folders(folder)
        if loose and any(holds_pictures(folder / name) for name in inside):
            raise DataError(
                f"'{folder}' holds images beside folders of images; give a folder of images, whose name is the class, "
                "or a folder of class folders"
            )
        if loose or not inside:
            return {nfc(folder.resolve().name): [str(path) for path in listed_images([folder])]}
    images = support_images(folder)
    files: dict[str, list[str]] = {name: [] for name in images.class_names}
    for row, label in enumerate(images.labels.tolist()):
        files[images.class_names[label]].append(images.name(row))
    return files


def own_labels(names: Iterable[str], classifier: ImageClassifier) -> dict[str, Any]:
    """The classifier's labels for names of classes; a name that it does not know is its own label.

    Raises:
        DataError: a name differs from another one, or from a class, only in case, spaces and underscores.
    """
    own = {nfc(str(label)): label for label in classifier.classes_.tolist()}
    spelled = {_spelling(name): name for name in own}
    found = {}
    for name in names:
        other = name if nfc(name) in own else spelled.setdefault(_spelling(name), name)
        if other != name:
            raise DataError(
                f"'{name}' is another spelling of the class '{other}'; call the folder '{other}', or give it a name "
                "that differs in more than case, spaces and underscores"
            )
        found[name] = own.get(nfc(name), name)
    return found


def learned_rows(classifier: ImageClassifier, values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Row of the support image that looks the same as each image, -1 where none does: int64 [images].

    Args:
        classifier: fitted.
        values: features float32 [images, dim].
    """
    units = F.normalize(torch.from_numpy(values), dim=1)
    support = F.normalize(torch.from_numpy(classifier.support_), dim=1)
    cosines, rows = (units @ support.T).max(dim=1)
    found: NDArray[np.int64] = torch.where(cosines > SAME, rows, -1).numpy()
    return found


def _spelling(name: str) -> str:
    return " ".join(nfc(name).casefold().replace("_", " ").split())
