"""What a run has recorded, as curves: losses, accuracy, and whether the teacher tells images apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure, FigureBase

from smkd.config import foreign_text
from smkd.engine.evaluator import INTERVAL
from smkd.errors import DataError
from smkd.viz.style import PANEL, SERIES, TERMS, styled

Records = Sequence[Mapping[str, Any]]
DASHES = ("-", "--", ":", "-.")
"""Of the second run and the following, whose terms keep their colours."""
COLUMNS = 2
"""Of a legend."""


class Curve(NamedTuple):
    """A picture of what runs have recorded.

    Attributes:
        figure: one panel.
        reading: how to read it, in a sentence.
    """

    figure: Figure
    reading: str


def read_metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    """Objects of one kind in a run's metrics.jsonl, oldest first; without a last line that is being written.

    Raises:
        DataError: there is no such file, or a line of it is damaged; names the line.
    """
    path, found = run / "metrics.jsonl", []
    try:
        for number, (line, record) in enumerate(foreign_text.json_records(path), start=1):
            if record is None and line.endswith("\n"):
                raise DataError(f"'{path}', line {number}: no JSON object; remove the line")
            if record is not None and record.get("kind") == kind:
                found.append(record)
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror}") from error
    return found


def read_history(run: Path) -> list[tuple[int, str]]:
    """What was changed in a run after its start, and at which step, oldest first; damaged lines are left out."""
    path = run / "history.jsonl"
    records = [record for _, record in foreign_text.json_records(path)] if path.is_file() else []
    return [
        (record["step"], str(change))
        for record in records
        if record is not None and isinstance(record.get("step"), int) and isinstance(record.get("changes"), list)
        for change in record["changes"]
    ]


def run_curves(runs: Mapping[str, Path]) -> dict[str, Curve]:
    """Pictures of runs by name: 'losses', 'accuracy', 'teacher', 'prototypes', 'clusters', as far as they recorded it.

    Args:
        runs: folders by what to call them.

    Raises:
        DataError: a folder has no metrics.jsonl, or a damaged one.
    """
    made = {}
    for name, (title, reading, lines) in _lines(runs).items():
        with styled():
            figure = Figure(figsize=(PANEL[0], _height(lines)), layout="constrained")
        _draw(figure, title, lines)
        made[name] = Curve(figure, reading)
    return made


def stacked_curves(runs: Mapping[str, Path]) -> Figure:
    """The same in one figure, below each other; raises `DataError` if nothing was recorded."""
    found = _lines(runs)
    if not found:
        raise DataError(f"'{next(iter(runs.values()))}': nothing was recorded yet")
    with styled():
        heights = [_height(lines) for _, _, lines in found.values()]
        figure = Figure(figsize=(PANEL[0], sum(heights)), layout="constrained")
        parts = np.atleast_1d(np.array(figure.subfigures(len(found), 1, height_ratios=heights)))
    for part, (title, _, lines) in zip(parts, found.values(), strict=True):
        _draw(part, title, lines)
    return figure


class Line(NamedTuple):
    """What one run recorded of one thing.

    Attributes:
        label: of the legend.
        points: (step or epoch, value, half its 95 % interval or None).
        style: of the line, for matplotlib.
    """

    label: str
    points: list[tuple[float, float, float | None]]
    style: dict[str, Any]


READINGS = {
    "losses": ("Losses, weighted, against the step", (
        "A loss can fall no lower than the entropy of its targets, so it may rise while the network improves: with the "
        "teacher's temperature, or where the teacher becomes less sure. Validation accuracy tells progress."
    )),
    "accuracy": ("Validation: accuracy (%) against the epoch", (
        "On the validation split, of which nothing is trained on; the shaded band is the 95 % interval. The best "
        "checkpoint is that of the highest mean; all other pictures are made with it."
    )),
    "teacher": ("Teacher: entropy of its answers (nats), by step", (
        "The entropy of an image's answer is low where the teacher is sure. That of the mean answer is high where "
        "different images get different answers. If both fall to 0, the teacher answers the same for all images."
    )),
    "prototypes": ("Prototypes that a batch's images get, by step", (
        "The more prototypes are in use, the more kinds of image the teacher tells apart. One prototype is collapse."
    )),
    "clusters": ("Prototypes and classes agree (NMI), by epoch", (
        "1 if images get the same prototype exactly where they have the same class, 0 if prototypes say nothing of "
        "classes. Phase 1 sees no classes: there it shows what came out by itself."
    )),
}  # fmt: skip
"""Title of each picture, and how to read it."""


def _lines(runs: Mapping[str, Path]) -> dict[str, tuple[str, str, list[Line]]]:
    """Title, reading and lines of each picture that has any."""
    found: dict[str, list[Line]] = {name: [] for name in READINGS}
    for place, (run, folder) in enumerate(runs.items()):
        train, epochs, scores = (read_metrics(folder, kind) for kind in ("train", "epoch", "validation"))
        named = f"{run}: " if len(runs) > 1 else ""
        dashes, color = DASHES[place % len(DASHES)], SERIES[place % len(SERIES)]
        for term, of_term in TERMS.items():
            found["losses"].append(_line(train, term, named + term, {"color": of_term, "linestyle": dashes}))
        shots = [key for record in scores[:1] for key in record if key.endswith("-shot")]
        for number, shot in enumerate(shots or ["accuracy"]):
            style = {"color": SERIES[number % len(SERIES)], "linestyle": dashes, "marker": "."}
            found["accuracy"].append(_line(scores, shot, named + shot, style, against="epoch"))
        for key, label, dash in (("target_entropy", "of an image", "-"), ("mean_target_entropy", "of the mean", "--")):
            found["teacher"].append(_line(train, key, named + label, {"color": color, "linestyle": dash}))
        found["prototypes"].append(_line(train, "target_prototypes", f"{named}prototypes", {"color": color}))
        found["clusters"].append(_line(epochs, "nmi", f"{named}NMI", {"color": color, "marker": "."}, against="epoch"))
    kept = {name: [line for line in lines if line.points] for name, lines in found.items()}
    return {name: (*READINGS[name], lines) for name, lines in kept.items() if lines}


def _line(records: Records, key: str, label: str, style: dict[str, Any], against: str = "step") -> Line:
    points = []
    for record in records:
        at, value = _number(record, against), _number(record, key)
        if at is not None and value is not None:
            points.append((at, value, _number(record, f"{key}{INTERVAL}")))
    return Line(label, points, {"marker": "."} | style if len(points) == 1 else style)


def _number(record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) else None


def _height(lines: Sequence[Line]) -> float:
    """Of a panel in inches, with room for its legend."""
    return PANEL[1] + 0.2 * max(0, -(-len(lines) // COLUMNS) - 1)


def _draw(figure: FigureBase, title: str, lines: Sequence[Line]) -> None:
    with styled():
        axes = figure.add_subplot()
        axes.set_title(title)
        for line in lines:
            at, values, intervals = zip(*line.points, strict=True)
            axes.plot(at, values, label=line.label, **line.style)
            if None not in intervals:
                low, high = ([v + sign * i for v, i in zip(values, intervals, strict=True)] for sign in (-1, 1))
                axes.fill_between(at, low, high, color=line.style["color"], alpha=0.2, linewidth=0)
        if len(lines) > 1:
            figure.legend(loc="outside lower center", ncols=COLUMNS)
