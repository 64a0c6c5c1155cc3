"""Results of a classifier on labelled photographs: lines for the terminal, and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from smkd.classify.left_out import class_lines
from smkd.classify.scored import Scored, Threshold
from smkd.errors import ConfigError
from smkd.fewshot import intervals
from smkd.files import explained
from smkd.viz.page import PageSection, write_page
from smkd.viz.style import RULE, SERIES, panel

SHOWN_MIX_UPS = 5
SHOWN_MISTAKES = 48
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TITLE = "A classifier on photographs"


def percent(share: float) -> str:
    """A share from 0 to 1 in words."""
    return f"{100 * share:.1f} %"


def _between(interval: tuple[float, float]) -> str:
    return f"95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def lines(scored: Scored, rejects: Sequence[float]) -> list[str]:
    """What to print, a line each.

    Args:
        scored: the results.
        rejects: thresholds that are said something of.
    """
    classes = scored.by_class
    said = [
        f"accuracy: {percent(scored.mean)}, the mean over {len(classes)} classes ({_between(scored.interval)})",
        f"of all {len(scored.images)} images: {percent(scored.accuracy)} ({_between(scored.accuracy_interval)})",
        *class_lines(classes),
    ]
    mixed = [f"{own} taken for {given} {count} x" for own, given, count in scored.mix_ups[:SHOWN_MIX_UPS]]
    said += [f"mistakes: {', '.join(mixed)}"] if mixed else []
    said.append(
        f"probability of the answers: {scored.confidence.mean():.2f} in the mean, {scored.accuracy:.2f} are right; "
        f"calibration error {scored.calibration_error:.2f}"
    )
    said += [f"--reject {each}: {_kept(found)}" for each in rejects if (found := scored.threshold(each)) is not None]
    if scored.auroc is not None:
        said.append(f"images of no class are told apart with an AUROC of {scored.auroc:.2f}")
    return said


def _kept(found: Threshold) -> str:
    said = f"keeps {100 * found.kept:.0f} % of the images"
    said += "" if found.accuracy is None else f", of which {100 * found.accuracy:.0f} % are right"
    return said + ("" if found.caught is None else f"; catches {100 * found.caught:.0f} % of those of no class")


def save_page(path: Path, scored: Scored, about: str) -> None:
    """Write the page.

    Args:
        path: HTML file.
        scored: the results; names of its images are files.
        about: a sentence about the classifier and the photographs.

    Raises:
        ConfigError: the page cannot be written.
    """
    with explained(path, ConfigError, option="--report"):
        write_page(path, TITLE, about, _sections(scored))


def _sections(scored: Scored) -> list[PageSection]:
    wrong = len(scored.mistakes)
    sections = [
        PageSection(
            "How often it is right",
            f"{percent(scored.mean)} in the mean over {len(scored.by_class)} classes ({_between(scored.interval)}); "
            f"{percent(scored.accuracy)} of all {len(scored.images)} photographs "
            f"({_between(scored.accuracy_interval)}). The worst class comes first.",
            table=_class_table(scored),
        ),
        PageSection(
            "How sure it is",
            f"The mean probability of the answers is {scored.confidence.mean():.2f}, and {scored.accuracy:.2f} of them "
            f"are right. The calibration error is {scored.calibration_error:.2f}; 0 is best.",
            figures=[(_calibration(scored), "Share of right answers by the probability of the answer, in ten groups of "
                      "equally many photographs; on the line, probabilities can be taken at their word.")],
        ),
    ]  # fmt: skip
    rows = [found for reject in THRESHOLDS if (found := scored.threshold(reject)) is not None]
    if rows:
        about = "What each threshold of --reject keeps, and how much of that is right."
        if scored.auroc is not None:
            about += f" The last column is what it catches. AUROC: {scored.auroc:.2f}; 0.5 is a guess, 1 is best."
        else:
            about += " `smkd score --unknown` adds what it catches."
        sections.append(PageSection("'None of these'", about, table=_threshold_table(rows)))
    more = f" The {SHOWN_MISTAKES} surest are shown." if wrong > SHOWN_MISTAKES else ""
    sections.append(PageSection(
        f"Mistakes: {wrong}", f"The surest answers come first.{more}" if wrong else "There are none.",
        photographs=[(scored.images[place], _mistake(scored, place))
                     for place in scored.mistakes[:SHOWN_MISTAKES]],
    ))  # fmt: skip
    return sections


def _class_table(scored: Scored) -> list[list[str]]:
    rows = [["class", "right", "photographs", "share", "95 % interval", "taken for"]]
    for each in scored.by_class:
        low, high = intervals.of_share(each.right, each.images)
        others = [f"{given} {count} x" for own, given, count in scored.mix_ups if own == each.name]
        rows.append([
            each.name, str(each.right), str(each.images), percent(each.right / each.images),
            f"{100 * low:.0f} to {100 * high:.0f}", ", ".join(others[:3]),
        ])  # fmt: skip
    return rows


def _threshold_table(rows: Sequence[Threshold]) -> list[list[str]]:
    def shown(share: float | None) -> str:
        return "" if share is None else percent(share)

    table = [["--reject", "keeps", "right among these", "catches of no class"]]
    table += [[f"{each.reject:.1f}", shown(each.kept), shown(each.accuracy), shown(each.caught)] for each in rows]
    return table if any(each.caught is not None for each in rows) else [row[:-1] for row in table]


def _mistake(scored: Scored, place: int) -> str:
    name = Path(scored.images[place]).name
    own, given = scored.names[int(scored.truth[place])], scored.names[int(scored.answers[place])]
    return f"{own}, taken for {given} ({scored.confidence[place]:.2f}): {name}"


def _calibration(scored: Scored) -> Figure:
    labels = {"xlabel": "probability of the answer", "ylabel": "share that is right"}
    figure, axes = panel(3.8, 3.4, xlim=(0, 1.02), ylim=(0, 1.02), **labels)
    groups = scored.calibration_groups
    axes.plot([0, 1], [0, 1], color=RULE, linewidth=1)
    axes.plot([each.confidence for each in groups], [each.accuracy for each in groups], "o-", color=SERIES[0])
    return figure
