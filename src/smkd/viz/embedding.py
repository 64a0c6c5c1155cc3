"""Maps of features: images in the plane, where near means alike."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from numpy.typing import NDArray
from PIL import Image

from smkd.errors import ConfigError, DataError
from smkd.viz.style import DPI, styled
from smkd.viz.tiles import short

Method = Literal["pca", "tsne", "umap"]
PERPLEXITY = 30.0
THUMB = 44
"""Longer side in pixels of a photograph on a map."""
CLASS_COLORS = ("#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#5f7fd0", "#a8a020", "#9d9d9d")
"""Of classes, with black text on them; used again from the ninth class on."""


def project(values: NDArray[np.float32], method: Method = "tsne", seed: int = 0) -> NDArray[np.float32]:
    """Features in the plane.

    Args:
        values: [images, dim].
        method: principal components; t-SNE or UMAP, which keep neighbours together and say nothing of distances.
        seed: of t-SNE and UMAP.

    Returns:
        [images, 2].

    Raises:
        DataError: fewer than three images.
        ConfigError: UMAP is not installed.
    """
    if len(values) < 3:
        raise DataError(f"a map needs three images or more, not {len(values)}")
    reducer: Any
    if method == "pca":
        from sklearn.decomposition import PCA

        reducer = PCA(2, random_state=seed)
    elif method == "tsne":
        from sklearn.manifold import TSNE

        reducer = TSNE(2, perplexity=min(PERPLEXITY, (len(values) - 1) / 3), init="pca", random_state=seed)
    else:
        try:
            from umap import UMAP
        except ImportError as error:
            raise ConfigError("umap is not installed: pip install umap-learn, or use pca or tsne") from error
        reducer = UMAP(2, n_neighbors=min(15, len(values) - 1), random_state=seed)
    placed: NDArray[np.float32] = np.asarray(reducer.fit_transform(values), np.float32)
    return placed


def embedding_figure(
    places: NDArray[np.float32], labels: NDArray[np.int64], names: Sequence[str], photographs: Sequence[Image.Image]
) -> Figure:
    """Photographs at their places, framed in the colour of their class, whose name stands amid them.

    Args:
        places: [images, 2].
        labels: [images].
        names: of the classes.
        photographs: of each image.
    """
    with styled():
        figure = Figure(figsize=(6.0, 6.0))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.scatter(places[:, 0], places[:, 1], s=0)
        axes.margins(0.06)
        axes.set_axis_off()
        for place, label, image in zip(places, labels, photographs, strict=True):
            thumb = image.convert("RGB")
            thumb.thumbnail((THUMB, THUMB))
            color = CLASS_COLORS[label % len(CLASS_COLORS)]
            box = OffsetImage(np.asarray(thumb), zoom=72 / DPI * 0.9)
            frame = {"facecolor": color, "edgecolor": "none"}
            axes.add_artist(AnnotationBbox(box, (float(place[0]), float(place[1])), pad=0.08, bboxprops=frame))
        for label in np.unique(labels):
            x, y = np.median(places[labels == label], axis=0)
            axes.text(
                x, y, short(names[label], 18), ha="center", va="center", fontsize=10, color="black", zorder=5,
                bbox={"facecolor": CLASS_COLORS[label % len(CLASS_COLORS)], "edgecolor": "none", "pad": 2},
            )  # fmt: skip
    return figure


def embedding_image(figure: Figure) -> Image.Image:
    """The map as an image with a clear background: as SVG its many photographs would be large."""
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=DPI, transparent=True)
    return Image.open(buffer)
