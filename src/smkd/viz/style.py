"""One look for every picture: colours that mean the same everywhere, and figures as PNG or as SVG for any page.

A figure is drawn in the colours of a light page. In its SVG they are variables, which a dark page gives other values.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure

PANEL = (4.4, 3.0)
"""Inches; at this width the labels of a panel are readable on a phone of 390 pixels."""
DPI = 150


class Shade(NamedTuple):
    """A colour on a light and on a dark page, hexadecimal."""

    light: str
    dark: str


SHADES = {
    "paper": Shade("#ffffff", "#161616"),
    "ink": Shade("#1c1c1c", "#e6e6e6"),
    "faint": Shade("#5c5c5c", "#b0b0b0"),
    "rule": Shade("#d9d9d9", "#414141"),
    "blue": Shade("#0072b2", "#5fb4ea"),
    "orange": Shade("#b84a00", "#ff9a55"),
    "green": Shade("#007a5e", "#35c49b"),
    "purple": Shade("#9c4f86", "#dc9cca"),
    "brown": Shade("#7a6a00", "#d6c64a"),
    "grey": Shade("#707070", "#9d9d9d"),
}
"""Colours by name. The hues are Okabe and Ito's, which colour-blind people tell apart."""
INK, FAINT, RULE = (SHADES[name].light for name in ("ink", "faint", "rule"))
SERIES = tuple(SHADES[name].light for name in ("blue", "orange", "green", "purple", "brown", "grey"))
"""Of curves and bars, in this order."""
RIGHT, WRONG = SHADES["green"].light, SHADES["orange"].light
"""Of answers."""
TERMS = dict(zip(("loss", "cls", "patch", "mim", "supervised"), (INK, *SERIES), strict=False))
"""Of the terms of the loss."""


def _variables(dark: bool) -> str:
    return ";".join(f"--{name}:{shade.dark if dark else shade.light}" for name, shade in SHADES.items())


CSS = f":root{{{_variables(False)}}}@media (prefers-color-scheme: dark){{:root{{{_variables(True)}}}}}"
"""The colours as variables, `var(--ink)`."""
_SETTINGS: Any = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 10, "axes.titlesize": 10,
    "axes.titlelocation": "left", "text.color": INK, "axes.edgecolor": FAINT, "axes.labelcolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "grid.color": RULE, "grid.linewidth": 0.8, "xtick.color": FAINT, "ytick.color": FAINT,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "legend.frameon": False, "legend.fontsize": 9,
    "lines.linewidth": 1.6, "axes.prop_cycle": cycler(color=SERIES), "figure.facecolor": "none",
    "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip


@contextmanager
def styled() -> Iterator[None]:
    """Draw in this look."""
    with mpl.rc_context(_SETTINGS):
        yield


def panel(width: float = PANEL[0], height: float = PANEL[1], **labels: Any) -> tuple[Figure, Axes]:
    """A figure of one panel.

    Args:
        width, height: in inches.
        labels: what `Axes.set` takes, such as `xlabel`.
    """
    with styled():
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set(**labels)
    return figure, axes


def shading(color: str) -> Colormap:
    """From nothing to a colour, so that the lowest values have the colour of the page."""
    return LinearSegmentedColormap.from_list("shading", [(*mpl.colors.to_rgb(color), share) for share in (0.0, 1.0)])


def png(figure: Figure) -> bytes:
    """As a light page shows it."""
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=DPI, facecolor=SHADES["paper"].light)
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    """With the page's colours: light or dark, as its reader has chosen."""
    buffer = io.BytesIO()
    with styled(), mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "smkd"}):
        figure.savefig(buffer, format="svg", dpi=DPI, metadata={"Date": None})
    text = buffer.getvalue().decode("utf-8")
    text = text[text.index("<svg") :]
    for name, shade in SHADES.items():
        text = text.replace(shade.light, f"var(--{name})")
    # what has no colour is black in SVG, and the style of matplotlib's first group reaches everything
    text = re.sub(r"(<text\b(?![^>]*fill:)[^>]*style=\")", r"\1fill:var(--ink);", text)
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', system-ui")
    style = f"<style>{CSS.replace(':root', 'svg')}</style>"
    return re.sub(r"(<svg[^>]*>)", lambda found: found[1] + style, text, count=1).encode("utf-8")
