"""Verbs on a classifier that is there: add, explain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smkd.cli.classify import summary
from smkd.cli.output import CLASSIFIER, PAGE, say
from smkd.cli.verb import verb
from smkd.errors import ConfigError, DataError
from smkd.progress import shown

if TYPE_CHECKING:
    from smkd.classify.answers import Lesson
    from smkd.classify.estimator import FewShotClassifier

File = Annotated[Path, typer.Argument(metavar="CLASSIFIER", help="File of `smkd fit`, or hf:owner/name of the Hub.")]


@verb()
def add(
    classifier: File,
    photos: Annotated[
        Path,
        typer.Argument(
            metavar="PHOTOS", help="Folder of images, whose name is the class; or with a folder of images per class."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write, such as new.smkd."), CLASSIFIER],
) -> None:
    """Add classes and images to a classifier, without the images that it has learned from."""
    from smkd.classify.added import add_images

    loaded = _opened(classifier)
    added = add_images(loaded, photos, shown)
    loaded.save(out)
    for path, label in added.skipped:
        say(f"smkd: '{path}' is in the classifier already, as '{label}'; it is skipped", err=True)
    for label, count in added.images.items():
        say(f"added: {label}, {count} image{'s' * (count != 1)}{' (a new class)' * (label in added.new)}")
    for line in summary(loaded):
        say(line)
    say(f"written: {out}")


@verb()
def explain(
    classifier: File,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image to classify.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML page to write, such as why.html."), PAGE],
    support: Annotated[
        Path | None,
        typer.Option(metavar="SUPPORT_DIR", help="Images that the classifier has learned from, to show the nearest."),
    ] = None,
    reject: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Answer 'none of these' where the chance of any of the classes is lower."),
    ] = None,
) -> None:
    """Show why an image gets its answer: the nearest images, attention and matched patches, on a page."""
    from smkd.classify.answers import Photo, answer
    from smkd.viz.answer_page import save_answer_page

    loaded = _opened(classifier)
    if reject is not None and loaded.known_ is None:
        raise DataError("--reject: no class of the classifier has two images, so it cannot say 'none of these'")
    assert loaded.encoder_ is not None
    photo = Photo(str(image), loaded.encoder_([image])[0])
    lesson = _with_photographs(loaded, support)
    given = answer(lesson, photo, reject or 0.0)
    save_answer_page(out, lesson, given, f"{image}, classified by {classifier}.")
    say(f"{image}: {given.caption}")
    say(f"written: {out}")


def _opened(place: Path) -> FewShotClassifier:
    """A classifier that can look at images."""
    from smkd.classify.estimator import FewShotClassifier

    loaded = FewShotClassifier.load(place)
    if loaded.encoder_ is None:
        raise ConfigError(f"'{place}' was made from features and has no backbone to look at images with")
    return loaded


def _with_photographs(classifier: FewShotClassifier, folder: Path | None) -> Lesson:
    """The classifier with those of its photographs that lie in a folder, at any depth; other images are passed over."""
    from smkd.classify.added import learned_rows
    from smkd.classify.answers import Lesson, Photo
    from smkd.classify.pictures import listed_images

    files = [""] * len(classifier.support_)
    if folder is not None:
        assert classifier.encoder_ is not None
        paths = listed_images([folder])
        encoded = classifier.encoder_.readable(paths, shown)
        for place, row in zip(encoded.rows, learned_rows(classifier, encoded.values), strict=True):
            if row >= 0:
                files[row] = str(paths[place])
        if not any(files):
            raise DataError(f"--support '{folder}': the classifier has learned from none of its {len(paths)} images")
    return Lesson(classifier, tuple(map(Photo, files, classifier.support_)))
