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

from smkd.files import written_aside
from smkd.viz import style
from smkd.viz.tiles import Tile, address, tile_of_file

STYLE = (
    style.CSS
    + """
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2.5rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p { white-space: pre-line; max-width: 46rem; } p.lead, figcaption { color: var(--faint); }
a { color: var(--blue); }
figure { margin: 1rem 0; } img { max-width: 100%; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; align-items: flex-start; }
.figures figure { flex: 0 1 auto; max-width: min(100%, 29.5rem); margin: 0; } .figures figcaption { max-width: 28rem; }
.figures figure.wide { max-width: 100%; }
.scrolls { overflow-x: auto; } .scrolls img { max-width: none; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td:first-child { white-space: normal; min-width: 7rem; }
table.words td { white-space: normal; text-align: left; } table.words th { text-align: left; }
pre { border: 1px solid var(--rule); border-radius: 4px; padding: .8rem; overflow-x: auto; font-size: .85rem; }
.photographs { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .8rem; }
.photographs figure { margin: 0; } .photographs img { width: 100%; height: 8.5rem; object-fit: contain; }
.photographs figcaption { font-size: .85rem; overflow-wrap: anywhere; }
.columns { gap: .4rem; } .columns img { height: auto; aspect-ratio: 1; object-fit: cover; }
.columns figcaption { font-size: .75rem; line-height: 1.3; }
.right img { outline: 3px solid var(--green); } .wrong img { outline: 3px solid var(--orange); }
.right figcaption { color: var(--green); } .wrong figcaption { color: var(--orange); }
"""
)
MARK = '<meta name="generator" content="smkd">'
"""By which a page of ours is known."""
WIDE = 5.2
"""Inches; a wider figure scrolls on a narrow page instead of becoming unreadable."""


@dataclass(frozen=True)
class PageSection:
    """A part of the page: a heading, a few sentences, and a table, figures, photographs or preformatted text."""

    title: str
    text: str = ""
    table: Sequence[Sequence[str]] = ()
    """Rows of cells, the header first."""
    wordy: bool = False
    """The table holds words rather than numbers, so its cells wrap."""
    figures: Sequence[tuple[Figure | Image.Image, str]] = ()
    """Pictures with their descriptions."""
    photographs: Sequence[tuple[str, str]] = ()
    """Image files with their captions."""
    tiles: Sequence[Tile] = ()
    """Images with their captions."""
    columns: int = 0
    """Tiles in a row, as in a table; 0 wraps them."""
    preformatted: str = ""


def write_page(path: Path, title: str, lead: str, sections: Sequence[PageSection]) -> None:
    """Write the page; raises `OSError`, and `ValueError` for a photograph that cannot be read."""
    body = "\n".join(_section(section) for section in sections)
    page = (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{MARK}\n'
        f'<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n<main>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>\n{body}\n</main>\n</body>\n</html>\n'
    )
    with written_aside(path) as aside:
        # paths may hold bytes that are no UTF-8
        aside.write_text(page, encoding="utf-8", errors="backslashreplace")


def _section(section: PageSection) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"] if section.title else []
    if section.text:
        parts.append(f"<p>{html.escape(section.text)}</p>")
    if section.table:
        parts.append(_table(section.table, section.wordy))
    if section.figures:
        shown = "\n".join(_figure(figure, caption) for figure, caption in section.figures)
        parts.append(f'<div class="figures">\n{shown}\n</div>')
    tiles = [*section.tiles, *(tile_of_file(path, caption) for path, caption in section.photographs)]
    if tiles:
        grid = "photographs"
        if section.columns:
            grid += f' columns" style="grid-template-columns: repeat({section.columns}, minmax(0, 1fr))'
        parts.append(f'<div class="{grid}">\n' + "\n".join(map(_tile, tiles)) + "\n</div>")
    if section.preformatted:
        parts.append(f'<pre tabindex="0">{html.escape(section.preformatted)}</pre>')
    return "\n".join(parts)


def _table(rows: Sequence[Sequence[str]], wordy: bool) -> str:
    header, *body = [[html.escape(cell) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    kind = ' class="words"' if wordy else ""
    return f'<div class="scrolls" tabindex="0"><table{kind}>\n' + "\n".join(lines) + "\n</table></div>"


def _figure(figure: Figure | Image.Image, caption: str) -> str:
    said = html.escape(caption)
    image = f'<img src="{_inline(figure)}" alt="{said}">'
    if isinstance(figure, Figure) and figure.get_figwidth() > WIDE:
        image = f'<div class="scrolls" tabindex="0">{image}</div>'
        return f'<figure class="wide">{image}<figcaption>{said}</figcaption></figure>'
    return f"<figure>{image}<figcaption>{said}</figcaption></figure>"


def _tile(tile: Tile) -> str:
    said = html.escape(tile.caption)
    answer = "" if tile.right is None else f' class="{"right" if tile.right else "wrong"}"'
    return f'<figure{answer}><img src="{address(tile.image)}" alt="{said}"><figcaption>{said}</figcaption></figure>'


def _inline(figure: Figure | Image.Image) -> str:
    if isinstance(figure, Figure):
        return "data:image/svg+xml;base64," + base64.b64encode(style.svg(figure)).decode("ascii")
    buffer = io.BytesIO()
    figure.save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
