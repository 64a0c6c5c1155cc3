"""Tables as rows of text, the header first, for the terminal, Markdown and pages."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

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
    header, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *body])
