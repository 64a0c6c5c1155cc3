"""What a press or a drop on the page does: each function returns the new values of components."""

from __future__ import annotations

import html
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from smkd.app.support import Support, learn, taken, zip_classes
from smkd.classify.answers import Answer, Lesson, Photo, answer, answer_rows, answers_csv
from smkd.classify.choose_features import Reader
from smkd.classify.encoder import Encoder
from smkd.classify.left_out import LeftOutAccuracy
from smkd.errors import DataError, SmkdError
from smkd.progress import Track
from smkd.viz.explain import NO_NETWORK, reasons

MOST_QUERIES = 50
GalleryItems = list[tuple[str, str | None]] | None
"""What a gallery holds: files with their captions."""


PROGRESS = gr.Progress()
"""Gradio gives each event its own in the place of this."""


def photographs(name: str) -> str:
    """Label of a class's photographs."""
    return f"Photographs of {name}"


def removal(name: str) -> str:
    """Text of the button that removes a class."""
    return f"Remove {name}"


def add_class(support: Support, drawn: int) -> tuple[Support, int]:
    """One class more; the cards are drawn anew."""
    return support.with_class(), drawn + 1


def remove_class(number: int, support: Support, drawn: int) -> tuple[Support, int]:
    """One class less."""
    return support.without_class(number), drawn + 1


def rename_class(number: int, name: str, support: Support) -> tuple[Any, Any, Any, str]:
    """Another name: the support, the labels that have the name in them, and what is wrong with it."""
    try:
        renamed = support.renamed(number, name)
    except SmkdError as error:
        return gr.skip(), gr.skip(), gr.skip(), wrong(error)
    name = next(group.name for group in renamed.groups if group.number == number)
    return renamed, gr.Gallery(label=photographs(name)), gr.Button(removal(name)), ""


def set_photos(
    encoder: Encoder, number: int, shots: GalleryItems, support: Support, progress: gr.Progress = PROGRESS
) -> tuple[Any, Any, Any]:
    """The photographs that a class has now: the support, those that can be read, and a line about the others."""
    paths, before = _paths(shots), support.photos(number)
    if paths == [photo.path for photo in before]:
        return gr.skip(), gr.skip(), gr.skip()
    try:
        photos, refused = taken(encoder, paths, before, _track(progress))
        changed = support.with_photos(number, photos)
    except SmkdError as error:
        return gr.skip(), [photo.path for photo in before], wrong(error)
    return changed, _shots(photos, paths), wrong(*refused)


def add_zip(
    encoder: Encoder, place: Path, archive: str, support: Support, drawn: int, progress: gr.Progress = PROGRESS
) -> tuple[Any, Any, str]:
    """Add the classes of a zip; classes without photographs are removed."""
    try:
        classes, refused = zip_classes(Path(archive), place)
        support = support.without_empty()
        for name, paths in classes.items():
            photos, unread = taken(encoder, paths, track=_track(progress, name))
            support, refused = support.with_class(name, photos), refused + unread
    except SmkdError as error:
        return gr.skip(), gr.skip(), wrong(error)
    return support, drawn + 1, wrong(*refused)


def press_learn(
    reader: Reader, place: Path, support: Support, before: Lesson | None, old: str | None, *, ready: bool = False
) -> tuple[Any, Any, Any]:
    """Make a classifier, a sentence about it and its file; if that fails, keep the previous ones.

    With `ready` nothing happens unless every class has photographs.
    """
    if ready and not (len(support.groups) > 1 and all(group.photos for group in support.groups)):
        return gr.skip(), gr.skip(), gr.skip()
    try:
        lesson = learn(reader, support)
        file = Path(tempfile.mkdtemp(dir=place)) / "classifier.smkd"
        lesson.classifier.save(file)
    except SmkdError as error:
        return before, wrong(error), gr.skip()
    if old is not None:
        shutil.rmtree(Path(old).parent, ignore_errors=True)
    label = f"Download the classifier ({file.stat().st_size / 1e6:.1f} MB)"
    button = gr.DownloadButton(label, value=str(file), visible=True)
    said = f"<p role='status'>{html.escape(_summary(lesson))}</p>{_by_class(lesson.classifier.left_out_)}"
    return lesson, said, button


def take(
    encoder: Encoder, shots: GalleryItems, before: Sequence[Photo], progress: gr.Progress = PROGRESS
) -> tuple[Any, Any, Any]:
    """Photographs to classify: those that can be read, and a line about the others."""
    paths = _paths(shots)
    if paths == [photo.path for photo in before]:
        return gr.skip(), gr.skip(), gr.skip()
    try:
        photos, refused = taken(encoder, paths[:MOST_QUERIES], before, _track(progress))
    except SmkdError as error:
        return gr.skip(), [photo.path for photo in before], wrong(error)
    if len(paths) > MOST_QUERIES:
        refused.insert(0, f"at most {MOST_QUERIES} photographs at once; `smkd predict` takes any number")
    return tuple(photos), _shots(photos, paths), wrong(*refused)


def press(lesson: Lesson | None, queries: Sequence[Photo], reject: float, event: gr.SelectData) -> list[Any]:
    """The number of the pressed photograph, and what `show` returns for it."""
    return [int(event.index), *show(event.index, lesson, queries, reject)]


def show(chosen: int, lesson: Lesson | None, queries: Sequence[Photo], reject: float) -> list[Any]:
    """The answers under the photographs, and the details of one of them.

    Args:
        chosen: number of the photograph; the last one if there are fewer.
        lesson: what has been learned, if anything.
        queries: the photographs.
        reject: chance of any of the classes below which the answer is 'none of these'.
    """
    if lesson is None or not queries:
        hidden = [gr.Label(visible=False), gr.Gallery(visible=False), gr.Image(visible=False), gr.Image(visible=False)]
        return [gr.skip(), "<p>Press Learn first.</p>" if queries else "", *hidden, ""]
    answers = [answer(lesson, lesson.as_read(photo), reject) for photo in queries]
    captions = [(each.photo.path, each.caption) for each in answers]
    return [captions, *_explained(lesson, answers[min(chosen, len(answers) - 1)], reject)]


def save_answers(
    place: Path, lesson: Lesson | None, queries: Sequence[Photo], reject: float, old: str | None
) -> Any:  # fmt: skip
    """The button that downloads the answers as CSV, the same columns as of `smkd predict --csv`; hidden without any."""
    if old is not None:
        shutil.rmtree(Path(old).parent, ignore_errors=True)
    if lesson is None or not queries:
        return gr.DownloadButton(value=None, visible=False)
    classifier = lesson.classifier
    rows = answer_rows(
        classifier, [photo.name for photo in queries], np.stack([lesson.as_read(photo).feature for photo in queries]),
        len(classifier.classes_), None if classifier.known_ is None else reject,
    )  # fmt: skip
    file = Path(tempfile.mkdtemp(dir=place)) / "answers.csv"
    file.write_text(answers_csv(rows), encoding="utf-8", errors="surrogateescape")
    return gr.DownloadButton("Download the answers (CSV)", value=str(file), visible=True)


def threshold(lesson: Lesson | None, reject: float) -> str:
    """A sentence: what a threshold of 'none of these' keeps and catches among the left-out photographs."""
    said = "" if lesson is None else lesson.classifier.left_out_.threshold(reject, "photographs")
    return f"<p>By the photographs that were left out, this {said}.</p>" if said else ""


def wrong(*lines: object) -> str:
    """One line about an error; empty if there is none."""
    if not lines:
        return ""
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    return f"<p class='wrong' role='alert'>{html.escape(str(lines[0]))}{more}</p>"


def _track(progress: gr.Progress, name: str = "photographs") -> Track:
    """Shows on the page how many of so many batches are done."""
    return lambda items, title, total: progress.tqdm(items, desc=f"reading {name}", total=total)


def _paths(shots: GalleryItems) -> list[str]:
    return [path for path, _ in shots or []]


def _shots(photos: Sequence[Photo], asked: list[str]) -> Any:
    """What a gallery is to hold; it is left alone where it does, as more may have been dropped there meanwhile."""
    paths = [photo.path for photo in photos]
    return gr.skip() if paths == asked else paths


def _summary(lesson: Lesson) -> str:
    classifier, count = lesson.classifier, len(lesson.photos)
    left = classifier.left_out_
    begin = f"Learned {len(classifier.classes_)} classes from {count} photographs (head: {classifier.head_})."
    if not left.images:
        return f"{begin} How well is unknown, and so is 'none of these': no class has two photographs."
    low, high = (100 * share for share in left.interval)
    return (
        f"{begin} Of {left.images} photographs, each classified without having been learned from, "
        f"{100 * left.mean:.0f} % got their own class in the mean over classes (95 % interval {low:.0f} to {high:.0f})."
    )


def _by_class(left: LeftOutAccuracy) -> str:
    """A line a class, the worst first."""
    lines = [f"<li>{html.escape(each.name)}: {each.right} of {each.images}</li>" for each in left.worst_first]
    if not lines:
        return ""
    single = [each.name for each in left.by_class if not each.images]
    lines += [f"<li>{html.escape(name)}: one photograph, not left out</li>" for name in single]
    return f"<ul class='shares'>{''.join(lines)}</ul>"


def _explained(lesson: Lesson, given: Answer, reject: float) -> list[Any]:
    """The answer, the probabilities, the nearest photographs, the two pictures, and words about them."""
    name = given.photo.name
    familiar = "" if given.known is None else f"chance of any of the classes {given.known:.2f}, threshold {reject:.2f}"
    said = f"{html.escape(name)}: <strong>{html.escape(given.caption)}</strong><small>{familiar}</small>"
    gallery = [(each.photo.path, f"{each.label} {each.cosine:.2f}") for each in given.neighbours]
    found = [
        f"<p role='status'>{said}</p>", gr.Label(given.chances, visible=True), gr.Gallery(gallery, visible=True),
    ]  # fmt: skip
    try:
        why = reasons(lesson, given)
    except DataError as error:
        return [*found, gr.Image(visible=False), gr.Image(visible=False), wrong(error)]
    if why is None:
        return [*found, gr.Image(visible=False), gr.Image(visible=False), f"<p>{NO_NETWORK}</p>"]
    return [
        *found,
        gr.Image(why.attention, visible=True, alt_text=f"Where [CLS] attends in {name}"),
        gr.Image(why.matches, visible=True, alt_text=why.caption),
        f"<p>{why.words}</p>",
    ]
