"""The page of `smkd explain`: an answer, its probabilities, the nearest photographs, attention and matched patches."""

from __future__ import annotations

from pathlib import Path

from smkd.classify.answers import Answer, Lesson
from smkd.errors import ConfigError
from smkd.files import explained
from smkd.viz.explain import NO_NETWORK, reasons
from smkd.viz.page import PageSection, write_page

SHOWN_CLASSES = 20


def save_answer_page(path: Path, lesson: Lesson, given: Answer, about: str) -> None:
    """Write the page.

    Args:
        path: HTML file.
        lesson: the classifier, and those of its photographs that are at hand.
        given: its answer.
        about: a sentence about the classifier and the photograph.

    Raises:
        ConfigError: the page cannot be written.
        DataError: a photograph can no longer be read.
    """
    sections = [_answer(given), _nearest(given), _looked_at(lesson, given)]
    with explained(path, ConfigError, option="--out"):
        write_page(path, given.caption, about, sections)


def _answer(given: Answer) -> PageSection:
    known = "How likely it is of any of the classes is unknown: no class has two images."
    if given.known is not None:
        known = f"The chance that it is of any of the classes is {given.known:.2f}."
    shown = list(given.chances.items())[:SHOWN_CLASSES]
    rest = len(given.chances) - len(shown)
    more = f" {rest} less probable classes are not shown." if rest else ""
    return PageSection(
        "Probability of each class", f"Given that it is one of them. {known}{more}",
        table=[["class", "probability"], *([name, f"{100 * chance:.1f} %"] for name, chance in shown)],
        photographs=[(given.photo.path, given.photo.name)],
    )  # fmt: skip


def _nearest(given: Answer) -> PageSection:
    there = [each for each in given.neighbours if each.photo.path]
    ask = "" if there else " The file of a classifier holds no photographs: --support FOLDER shows them."
    return PageSection(
        "Nearest photographs", f"Those of the support whose features have the largest cosine with its own.{ask}",
        table=[["class", "cosine", "photograph"],
               *([each.label, f"{each.cosine:.2f}", each.photo.name] for each in given.neighbours)],
        photographs=[(each.photo.path, f"{each.label} {each.cosine:.2f}") for each in there],
    )  # fmt: skip


def _looked_at(lesson: Lesson, given: Answer) -> PageSection:
    title, why = "What the network looks at", reasons(lesson, given)
    if why is None:
        return PageSection(title, NO_NETWORK)
    pictures = [(why.attention, f"Where [CLS] attends in {given.photo.name}; the brightest patch gets most.")]
    if why.matches is not None:
        pictures.append((why.matches, why.caption))
    return PageSection(title, why.words, figures=pictures)
