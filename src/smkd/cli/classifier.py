"""Verbs on a classifier that is there: score, add, explain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smkd.cli.classify import REJECTS, count_unreadable, encode_readable, summary, unread
from smkd.cli.output import CLASSIFIER, JSON, PAGE, say, write_json
from smkd.cli.verb import verb
from smkd.errors import ConfigError, DataError
from smkd.progress import shown

if TYPE_CHECKING:
    from smkd.classify.answers import Lesson
    from smkd.classify.estimator import FewShotClassifier
    from smkd.classify.scored import Scored

File = Annotated[Path, typer.Argument(metavar="CLASSIFIER", help="File of `smkd fit`, or hf:owner/name of the Hub.")]


@verb()
def score(
    classifier: File,
    photos: Annotated[Path, typer.Argument(metavar="PHOTOS", help="Folder with a folder of images per class.")],
    unknown: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Images of no class, at any depth: what --reject catches.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results here; - prints them."), JSON]
    = None,
    report: Annotated[Path | None, typer.Option(help="HTML page with tables and the mistakes."), PAGE] = None,
) -> None:  # fmt: skip
    """How well a classifier does on labelled images it has not learned from; exit code 1 if some cannot be read."""
    from smkd.classify.pictures import listed_images, support_images
    from smkd.classify.scored import check_classes, score_features
    from smkd.viz import scored_page

    loaded = _opened(classifier)
    assert loaded.encoder_ is not None
    images = support_images(photos)
    own = check_classes(images.class_names, loaded, str(photos))
    strange_paths = [] if unknown is None else listed_images([unknown])
    if strange_paths and loaded.known_ is None:
        raise DataError("--unknown: no class of the classifier has two images, so it cannot say 'none of these'")
    paths = [images.name(index) for index in range(len(images))]
    encoded = encode_readable(loaded.encoder_, paths)
    strange = encode_readable(loaded.encoder_, strange_paths) if strange_paths else None
    scored = score_features(
        loaded, encoded.values, [own[images.class_names[images.labels[row]]] for row in encoded.rows],
        images=[paths[row] for row in encoded.rows], unknown=None if strange is None else strange.values,
    )  # fmt: skip
    missing = unread(encoded, paths) + ([] if strange is None else unread(strange, strange_paths))
    if json_file is not None:
        write_json(json_file, {**scored.as_dict(REJECTS), "unreadable": missing})
    if report is not None:
        scored_page.save_page(report, scored, f"{classifier}, {len(scored.images)} photographs of {photos}.")
    for line in scored_page.lines(scored, REJECTS):
        say(line)
    _warn_of_repeats(scored)
    count_unreadable(len(missing))


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


def _warn_of_repeats(scored: Scored) -> None:
    if scored.learned_from:
        say(
            f"smkd: {scored.learned_from} of {len(scored.images)} images look the same as images that the classifier "
            "has learned from: new ones will do worse than this says",
            err=True,
        )
