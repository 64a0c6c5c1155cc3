"""The verb that measures a classifier on labelled photographs: score."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smkd.cli.classify import REJECTS, name_unreadable
from smkd.cli.output import JSON, PAGE, say, write_json
from smkd.cli.verb import verb
from smkd.errors import ConfigError, DataError
from smkd.progress import shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from smkd.classify.encoder import Encoded, Encoder
    from smkd.classify.scored import Scored


@verb()
def score(
    classifier: Annotated[
        Path, typer.Argument(metavar="CLASSIFIER", help="File of `smkd fit`, or hf:owner/name of the Hub.")
    ],
    photos: Annotated[Path, typer.Argument(metavar="PHOTOS", help="Folder with a folder of images per class.")],
    unknown: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Images of no class, at any depth: what --reject catches.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results here; - prints them."), JSON]
    = None,
    report: Annotated[Path | None, typer.Option(help="HTML page with tables and the mistakes."), PAGE] = None,
) -> None:  # fmt: skip
    """How well a classifier does on labelled images it has not learned from; exit code 1 if some cannot be read."""
    from smkd.classify.estimator import FewShotClassifier
    from smkd.classify.pictures import listed_images, support_images
    from smkd.classify.scored import check_classes, score_features
    from smkd.viz import scored_page

    loaded = FewShotClassifier.load(classifier)
    if loaded.encoder_ is None:
        raise ConfigError(f"'{classifier}' was made from features and has no backbone to look at images with")
    images = support_images(photos)
    own = check_classes(images.class_names, loaded, str(photos))
    strange_paths = [] if unknown is None else listed_images([unknown])
    if strange_paths and loaded.known_ is None:
        raise DataError("--unknown: no class of the classifier has two images, so it cannot say 'none of these'")
    paths = [images.name(index) for index in range(len(images))]
    encoded = _read(loaded.encoder_, paths)
    strange = _read(loaded.encoder_, list(map(str, strange_paths))) if strange_paths else None
    scored = score_features(
        loaded, encoded.values, [own[images.class_names[images.labels[row]]] for row in encoded.rows],
        images=[paths[row] for row in encoded.rows], unknown=None if strange is None else strange.values,
    )  # fmt: skip
    unread = [*_unread(encoded, paths), *([] if strange is None else _unread(strange, list(map(str, strange_paths))))]
    if json_file is not None:
        write_json(json_file, {**scored.as_dict(REJECTS), "unreadable": unread})
    if report is not None:
        scored_page.save_page(report, scored, f"{classifier}, {len(scored.images)} photographs of {photos}.")
    for line in scored_page.lines(scored, REJECTS):
        say(line)
    _warn_of_repeats(scored)
    if unread:
        say(f"smkd: {len(unread)} unreadable images left out", err=True)
        raise typer.Exit(1)


def _read(encoder: Encoder, paths: list[str]) -> Encoded:
    """Features of the images that can be read; the others are named."""
    return name_unreadable(encoder.readable(paths, shown), len(paths))


def _unread(encoded: Encoded, paths: list[str]) -> list[str]:
    read: NDArray[np.int64] = encoded.rows
    return [path for row, path in enumerate(paths) if row not in set(read.tolist())]


def _warn_of_repeats(scored: Scored) -> None:
    if scored.learned_from:
        say(
            f"smkd: {scored.learned_from} of {len(scored.images)} images look the same as images that the classifier "
            "has learned from: new ones will do worse than this says",
            err=True,
        )
