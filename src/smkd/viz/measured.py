"""Results as tables, records, pictures and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.table import Table

from smkd.errors import ConfigError
from smkd.fewshot.accuracy import Comparison, Result
from smkd.fewshot.feature_file import FeatureSource
from smkd.files import explained, printable, written_aside
from smkd.viz import figures, style
from smkd.viz.curves import read_history
from smkd.viz.page import PageSection, write_page

Rows = Sequence[Sequence[str]]


def rich_table(rows: Rows) -> Table:
    """For the terminal: the first column to the left, numbers to the right."""
    table = Table()
    header, *body = rows
    for number, cell in enumerate(header):
        table.add_column(cell, justify="right" if number else "left")
    for row in body:
        table.add_row(*row)
    return table


def markdown_table(rows: Rows) -> str:
    """For documents."""
    header, *body = [[printable(cell).replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *body])


LATEX = str.maketrans({
    "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
})  # fmt: skip


def latex_table(rows: Rows) -> str:
    """For papers; needs the package booktabs."""
    header, *body = [[printable(cell).translate(LATEX).replace("±", r"$\pm$") for cell in row] for row in rows]
    lines = [" & ".join(row) + r" \\" for row in (header, *body)]
    columns = "l" + "r" * (len(header) - 1)
    return "\n".join([
        rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule",
        r"\end{tabular}",
    ])  # fmt: skip


class Measured(NamedTuple):
    """Results of one source of features.

    Attributes:
        name: of the source.
        about: where its features come from.
        results: of every head, way and number of shots.
    """

    name: str
    about: FeatureSource
    results: Sequence[Result]


def results_table(rows: Sequence[Measured]) -> list[list[str]]:
    """A line per source, head and way, a column per number of shots, the header first."""
    results = rows[0].results
    shots = list(dict.fromkeys(result.shot for result in results))
    header = ["source", "head", *(f"{shot}-shot" for shot in shots)]
    lines = []
    for row in rows:
        for head, way in dict.fromkeys((result.head, result.way) for result in row.results):
            of_line = [result for result in row.results if (result.head, result.way) == (head, way)]
            name = f"{head} (transductive)" if of_line[0].transductive else head
            cells = {result.shot: str(result) for result in of_line}
            lines.append([row.name, f"{way}-way {name}", *(cells.get(shot, "") for shot in shots)])
    return [header, *lines]


def conditions(rows: Sequence[Measured]) -> list[str]:
    """Lines: the protocol, once where all is measured alike; and which classes are too small for it."""
    texts = list(dict.fromkeys(_conditions(row, result) for row in rows for result in row.results))
    skipped = sum(row.results[0].skipped for row in rows)
    ending = f"; {skipped} unreadable images left out" if skipped else ""
    too_small = dict.fromkeys(
        f"{row.name}: {result.without}" for row in rows for result in row.results if result.without
    )
    return [*texts, f"accuracy in %, mean ± 95 % interval over episodes{ending}", *too_small]


def _conditions(row: Measured, result: Result) -> str:
    about = row.about
    query = "all other images" if result.query == "all" else f"{result.query} queries a class"
    if result.query_dirichlet:
        query = f"{result.way * int(result.query)} queries, Dirichlet {result.query_dirichlet:g}"
    parts = [about.dataset, f"{about.split or result.split} classes", query, f"{result.episodes} episodes",
             f"seed {result.seed}", about.transform]  # fmt: skip
    return ", ".join(part for part in parts if part)


def records(rows: Sequence[Measured]) -> list[dict[str, Any]]:
    """One object per result, each with all that is known of it."""
    return [
        {"source": row.name, "dataset": row.about.dataset, "transform": row.about.transform,
         "model": row.about.model, "checkpoint_sha256": row.about.checkpoint_sha256, **result.as_dict()}
        for row in rows
        for result in row.results
    ]  # fmt: skip


def two_names(sources: Sequence[str], heads: Sequence[str]) -> tuple[str, str]:
    """Names for a comparison: the sources, the heads, or both where both differ."""
    sources = [sources[0], sources[-1]]
    if sources[0] == sources[1]:
        return heads[0], heads[1]
    if heads[0] == heads[1]:
        return sources[0], sources[1]
    return f"{sources[0]} with {heads[0]}", f"{sources[1]} with {heads[1]}"


def comparison_table(names: tuple[str, str], comparisons: Sequence[Comparison]) -> list[list[str]]:
    """A line per number of shots."""
    header = ["", *names, "difference", "better in", "equal in"]
    return [
        header,
        *(
            [f"{c.way}-way {c.shot}-shot", f"{c.first:.2f}", f"{c.second:.2f}", f"{c.difference:+.2f} ± {c.ci95:.2f}",
             f"{c.wins:.0f} %", f"{c.ties:.0f} %"]
            for c in comparisons
        ),
    ]  # fmt: skip


def result_figures(rows: Sequence[Measured]) -> dict[str, tuple[Figure, str]]:
    """Pictures by name, with a sentence each.

    The confusion and the distribution are those of the last source's first head at the largest number of shots.
    """
    results = {_curve_name(row, head, rows): [r for r in row.results if r.head == head]
               for row in rows for head in dict.fromkeys(r.head for r in row.results)}  # fmt: skip
    chosen = _shown(rows)
    of = f"{rows[-1].name}, {chosen.head}, {chosen.way}-way {chosen.shot}-shot"
    made = {
        "accuracy": (figures.accuracy_curves(results), "Accuracy against shots and ways, with 95 % intervals."),
        "confusion": (
            figures.confusion(chosen),
            f"How often queries of a class (row) are given to another (column), of the episodes with both; {of}.",
        ),
        "episodes": (
            figures.episode_distribution(chosen),
            f"Accuracy of single episodes; {of}.",
        ),
    }
    return made


def _shown(rows: Sequence[Measured]) -> Result:
    """The last source's first head at the largest number of shots."""
    return max((r for r in rows[-1].results if r.head == rows[-1].results[0].head), key=lambda r: (r.shot, -r.way))


def _curve_name(row: Measured, head: str, rows: Sequence[Measured]) -> str:
    heads = {result.head for each in rows for result in each.results}
    names = [row.name] * (len(rows) > 1) + [head] * (len(heads) > 1)
    return ", ".join(names) or f"{row.name}, {head}"


def save_figures(folder: Path, rows: Sequence[Measured], kind: str) -> None:
    """Write the pictures to a folder as png or svg; raises `ConfigError` if it cannot be used."""
    with explained(folder, ConfigError, option="--figures"), written_aside(folder, folder=True) as aside:
        for name, (figure, _) in result_figures(rows).items():
            (aside / f"{name}.{kind}").write_bytes(style.svg(figure) if kind == "svg" else style.png(figure))


def sections(rows: Sequence[Measured]) -> list[PageSection]:
    """The table, what was changed in its runs after their start, and the pictures, for a page."""
    changes = [
        [row.name, str(step), change] for row in rows for step, change in read_history(Path(row.name))
    ]  # fmt: skip
    header = ["run", "after step", "change"]
    history = [PageSection("Changes since the start", table=[header, *changes])] if changes else []
    return [
        PageSection("Accuracy on unseen classes", "\n".join(conditions(rows)), results_table(rows)),
        *history,
        PageSection("Pictures", figures=list(result_figures(rows).values())),
        PageSection(
            "Hardest classes",
            "Pairs of classes with the lowest mean accuracy of the episodes that have both, and the hardest episode.",
            figures.hardest_table(_shown(rows)),
        ),
    ]


def save_report(path: Path, rows: Sequence[Measured]) -> None:
    """Write a self-contained page; raises `ConfigError` if the file cannot be written."""
    with explained(path, ConfigError, option="--report"):
        write_page(path, "Few-shot accuracy", ", ".join(row.name for row in rows), sections(rows))
