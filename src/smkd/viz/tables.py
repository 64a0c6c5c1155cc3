"""Results as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from smkd.fewshot.evaluate import Result


def results_table(rows: Mapping[str, Sequence[Result]]) -> Table:
    """One row per model, one column per number of shots; every row measured alike."""
    table = Table()
    table.add_column("model")
    for result in next(iter(rows.values())):
        table.add_column(f"{result.way}-way {result.shot}-shot", justify="right")
    for name, results in rows.items():
        table.add_row(name, *(str(result) for result in results))
    return table
