"""A self-contained HTML page: every picture inline, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from smkd.data.decoding import decode, read_file
from smkd.files import written_aside

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1c1c1c; max-width: 62rem; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p { white-space: pre-line; } p.lead, figcaption { color: #555; } figure { margin: 1rem 0; } img { max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; }
.scrolls { overflow-x: auto; } td, th { white-space: nowrap; } td:first-child { white-space: normal; }
.photographs { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem; }
.photographs figure { margin: 0; } .photographs img { width: 100%; height: 9rem; object-fit: contain; }
.photographs figcaption { font-size: .85rem; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) {
  body { color: #e4e4e4; background: #161616; } p.lead, figcaption { color: #adadad; }
  th, td { border-color: #3a3a3a; } pre { background: #242424; } figure > img { background: #fff; }
  .photographs img { background: none; }
}
"""
PHOTOGRAPH = 240
"""Longer side in pixels of the photographs on a page."""
MARK = '<meta name="generator" content="smkd">'
"""By which a page of ours is known."""


@dataclass(frozen=True)
class ReportSection:
    """A part of the page: a heading, a sentence, and a table, pictures, photographs or preformatted text."""

    title: str
    text: str = ""
    table: Sequence[Sequence[str]] = ()
    """Rows of cells, the header first."""
    figures: Sequence[tuple[Figure | Image.Image, str]] = ()
    """Pictures with their descriptions."""
    photographs: Sequence[tuple[str, str]] = ()
    """Image files with their captions."""
    preformatted: str = ""


def write_report(path: Path, title: str, lead: str, sections: Sequence[ReportSection]) -> None:
    """Write the page; raises `OSError`, and `ValueError` for a photograph that cannot be read."""
    body = "\n".join(_section(section) for section in sections)
    page = (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{MARK}\n'
        f'<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>\n{body}\n</body>\n</html>\n'
    )
    with written_aside(path) as aside:
        # paths may hold bytes that are no UTF-8
        aside.write_text(page, encoding="utf-8", errors="backslashreplace")


def _section(section: ReportSection) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{html.escape(section.text)}</p>")
    if section.table:
        parts.append(_table(section.table))
    for figure, caption in section.figures:
        parts.append(
            f'<figure><img src="{_inline(figure)}" alt="{html.escape(caption)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    if section.photographs:
        shown = [
            f'<figure><img src="{_small(path)}" alt="{html.escape(caption)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            for path, caption in section.photographs
        ]
        parts.append('<div class="photographs">\n' + "\n".join(shown) + "\n</div>")
    if section.preformatted:
        parts.append(f"<pre>{html.escape(section.preformatted)}</pre>")
    return "\n".join(parts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = [[html.escape(cell) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return '<div class="scrolls"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _small(path: str) -> str:
    """A photograph made small, as the address of an image."""
    image = decode(read_file(path))
    image.thumbnail((PHOTOGRAPH, PHOTOGRAPH))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _inline(figure: Figure | Image.Image) -> str:
    buffer = io.BytesIO()
    if isinstance(figure, Image.Image):
        figure.save(buffer, "PNG")
    else:
        figure.savefig(buffer, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
