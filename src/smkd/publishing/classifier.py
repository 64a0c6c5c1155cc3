"""Export of classifiers: which sources are one, which forms they have, and writing one of these."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from smkd.classify.classifier import ImageClassifier
from smkd.errors import ConfigError
from smkd.files import expanded
from smkd.publishing.classifier_card import classifier_card
from smkd.publishing.classifier_graph import classifier_program
from smkd.publishing.hub import push
from smkd.publishing.place import CARD, EXPORT_FORMS, Exported, Form, check_free, form_of, writing
from smkd.publishing.program import write_onnx, write_program
from smkd.weights.fetch import WEIGHT_FILES, is_classifier, locate_classifier
from smkd.weights.smkd_file import CLASSIFIER, CLASSIFIER_FILE, INDEX, is_of_kind

FORMS = [name for name, form in EXPORT_FORMS.items() if form.of_classifiers]


def classifier_file(where: str | Path) -> Path | None:
    """The file of a classifier that is to be exported; None if a source is something else.

    Raises:
        ConfigError: it is an index, of which nothing can be exported.
        CheckpointError: it cannot be fetched.
    """
    if is_classifier(str(where)):
        return locate_classifier(where)
    path = expanded(where)
    # a classifier that lies in a run's folder or beside weights is not what is meant
    if path.is_dir() and not any((path / name).exists() for name in ("checkpoints", *WEIGHT_FILES)):
        path = path / CLASSIFIER_FILE
    if not path.is_file():
        return None
    if is_of_kind(path, INDEX):
        raise ConfigError(f"'{where}' was made by `smkd index`; expected a run, weights, or a file of `smkd fit`")
    return path if is_of_kind(path, CLASSIFIER) else None


def export_classifier(
    file: Path, to: str, out: str | Path | None, *, repository: str | None, license: str | None, reject: float | None,
    overwrite: bool, backbone_options: dict[str, Any],
) -> Exported:  # fmt: skip
    """Write a classifier for other programs, or for the Hub (`smkd.export`).

    Args:
        file: of `smkd fit`.
        to: 'onnx', 'torch-export' or 'hub'.
        out: file or folder to write; none takes the file's name, in the working directory.
        repository: 'owner/name' on the Hub, to which a 'hub' folder is also pushed.
        license: of the weights; none takes what the backbone is known to have.
        reject: answers are 'none of these' below this chance, in a program.
        overwrite: replace what is at `out` even if it is no former export.
        backbone_options: those by which backbones are exported, as they are typed, where they are given.

    Raises:
        SmkdError: wrong settings, a place that is taken, or a program that computes something else.
    """
    form = _checked_form(to, repository, reject, backbone_options)
    classifier = ImageClassifier.load(file, "cpu")
    encoder = classifier.encoder_
    if encoder is None:
        raise ConfigError(f"'{file}' was made from features and has no backbone to look at images with")
    if reject is not None and classifier.known_ is None:
        raise ConfigError("--reject needs a class with two or more images, to learn what is familiar")
    if license is not None:
        encoder.config = encoder.config.model_copy(update={"license": license})
    path = expanded(f"{file.stem}{form.suffix}" if out is None else out)
    if path.exists() and os.path.samefile(path, file):
        raise ConfigError(f"-o '{path}' is the classifier itself; choose another")
    check_free(path, is_folder=form.is_folder, suffix=form.suffix, overwrite=overwrite)
    with writing(path, is_folder=form.is_folder) as aside:
        if form.is_program:
            work = classifier_program(classifier, reject=reject, license=encoder.config.license)
            report = write_onnx(work, aside) if to == "onnx" else write_program(work, aside)
        else:
            report = _write_folder(classifier, aside, file.stem, repository)
    return Exported(path, report + ([] if repository is None else [f"pushed: {push(path, repository)}"]))


def _checked_form(to: str, repository: str | None, reject: float | None, backbone_options: dict[str, Any]) -> Form:
    form = form_of(to)
    if to not in FORMS:
        raise ConfigError(f"--to {to} is for backbones, and this is a classifier: give {', '.join(FORMS)}")
    for option in (option for option, value in backbone_options.items() if value):
        raise ConfigError(f"{option} is for backbones; a classifier has settings of its own")
    if repository is not None and to != "hub":
        raise ConfigError(f"--repo is for --to hub, not for {to}")
    if reject is not None and not form.is_program:
        raise ConfigError(f"--reject is for --to onnx and torch-export, not for {to}")
    if reject is not None and not 0 <= reject <= 1:
        raise ConfigError(f"--reject {reject}: should be between 0 and 1")
    return form


def _write_folder(classifier: ImageClassifier, folder: Path, name: str, repository: str | None) -> list[str]:
    """Fill a folder that is, or is to become, a repository of the Hub."""
    folder.mkdir(exist_ok=True)
    classifier.save(folder / CLASSIFIER_FILE)
    classifier_card(classifier, name, repository).save(folder / CARD)
    return []
