"""Verbs that make something of your own images: fit, predict, index, search, app."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smkd.cli.backbone import BackboneOption, chosen
from smkd.cli.fewshot import AttentionHeads
from smkd.cli.output import CLASSIFIER, CSV, INDEX, JSON, PAGE, say, write_json, write_text
from smkd.cli.verb import verb
from smkd.errors import ConfigError, DataError
from smkd.files import listed
from smkd.progress import shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from smkd.classify.classifier import ImageClassifier
    from smkd.classify.encoder import Encoded, Encoder
    from smkd.classify.left_out import LeftOutAccuracy

NONE = "none of these"
REJECTS = (0.3, 0.5, 0.7)
"""Thresholds that are said something of."""
Recipe = Annotated[str | None, typer.Option(help="Image size and normalisation of weights that bring none.")]


FeaturesOption = Annotated[
    str,
    typer.Option(
        metavar="auto|own|WHICH",
        help="What to read of the backbone: auto chooses by cross-validation, own is what its run says; or blocks "
        "and parts such as 11 or 10+11:cls.",
    ),
]


@verb()
def fit(
    support: Annotated[Path, typer.Argument(metavar="SUPPORT_DIR", help="Folder with a folder of images per class.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write, such as clf.smkd."), CLASSIFIER],
    backbone: BackboneOption = None,
    head: Annotated[
        str, typer.Option(help="Few-shot classifier as in `smkd eval`; auto chooses where classes have 5 images.")
    ] = "auto",
    features: FeaturesOption = "auto",
    recipe: Recipe = None,
    heads: AttentionHeads = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Also write here what was learned and how well it does; - prints it."),
        JSON,
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="HTML page: how well it does on left-out images, and its mistakes."), PAGE
    ] = None,
) -> None:
    """Make a classifier from a few images per class."""
    from smkd.classify.choose_features import Reader, check_reading
    from smkd.classify.classifier import ImageClassifier
    from smkd.classify.encoder import open_encoder
    from smkd.classify.left_out import check_head
    from smkd.classify.pictures import support_images

    images = support_images(support)
    if len(images.class_names) < 2:
        raise DataError(f"'{support}' holds one class, '{images.class_names[0]}'; a classifier needs at least two")
    check_head(head)
    check_reading(features)
    opened = open_encoder(chosen(backbone), recipe, heads=heads)
    reader = Reader(opened, features)
    _say(opened.report)
    paths = [images.name(index) for index in range(len(images))]
    encoder, values = reader.decided(_all(reader.encoder, paths), images.labels)
    names = [images.class_names[label] for label in images.labels]
    classifier = ImageClassifier.taught(encoder, values, names, head=head, reading=features)
    classifier.save(out)
    if json_file is not None:
        write_json(json_file, _record(classifier))
    if report is not None:
        _save_report(report, classifier, paths, f"{support}: each image left out in turn.")
    _say(summary(classifier))
    say(f"written: {out}")


@verb()
def predict(
    classifier: Annotated[Path, typer.Argument(metavar="CLASSIFIER", help="File of `smkd fit`.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Images, or folders of images.")],
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Also write the answers here, a row an image."), CSV
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the answers here."), JSON] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to name, most probable first.")] = 1,
    reject: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help=f"Answer '{NONE}' where the chance of any of the classes is lower; 0.5 is even."
        ),
    ] = None,
) -> None:
    """Classify images; exit code 1 if some could not be read."""
    from smkd.classify.answers import answer_rows, answers_csv
    from smkd.classify.classifier import ImageClassifier
    from smkd.classify.pictures import listed_images

    loaded = ImageClassifier.load(classifier)
    if loaded.encoder_ is None:
        raise ConfigError(f"'{classifier}' was made from features and has no backbone to look at images with")
    paths = listed_images(images)
    encoded = encode_readable(loaded.encoder_, paths)
    answers = answer_rows(loaded, [str(paths[row]) for row in encoded.rows], encoded.values, top, reject)
    if csv_file is not None:
        write_text(csv_file, answers_csv(answers), "--csv")
    if json_file is not None:
        left = loaded.left_out_.as_dict(REJECTS if reject is None else [reject])
        write_json(json_file, {"images": answers, "unreadable": unread(encoded, paths), "left_out": left})
    for answer in answers:
        say(_line(answer))
    count_unreadable(len(encoded.unreadable))


@verb()
def index(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of images, at any depth.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write, such as index.smkd."), INDEX],
    backbone: BackboneOption = None,
    recipe: Recipe = None,
    heads: AttentionHeads = None,
) -> None:
    """Keep the features of a folder's images, to search them by an image; exit code 1 if some could not be read."""
    from smkd.classify.encoder import open_encoder
    from smkd.classify.pictures import listed_images
    from smkd.classify.search import ImageIndex

    paths = listed_images([folder])
    encoder = open_encoder(chosen(backbone), recipe, heads=heads)
    _say(encoder.report)
    encoded = encode_readable(encoder, paths)
    ImageIndex(encoder, encoded.values, [str(paths[row]) for row in encoded.rows]).save(out)
    say(f"{out}: {len(encoded.rows)} images, features of {encoder.dim} numbers")
    count_unreadable(len(encoded.unreadable))


@verb()
def search(
    index_file: Annotated[Path, typer.Argument(metavar="INDEX", help="File of `smkd index`.")],
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="What to look for.")],
    top: Annotated[int, typer.Option(min=1, help="How many images to name.")] = 5,
) -> None:
    """Nearest images of an index, with their cosines."""
    from smkd.classify.search import ImageIndex

    opened = ImageIndex.load(index_file)
    for name, cosine in opened.search(opened.encoder([image]), top)[0]:
        say(f"{cosine:7.4f}  {name}")


def _save_report(path: Path, classifier: ImageClassifier, images: list[str], about: str) -> None:
    from smkd.classify.scored import score_left_out
    from smkd.viz.scored_page import save_page

    scored = score_left_out(classifier, images)
    if scored is None:
        raise DataError("--report: no class has two images, so none can be left out; the classifier is written")
    save_page(path, scored, about)


def _all(encoder: Encoder, paths: list[str]) -> NDArray[np.float32]:
    """Features of all images, or the error of the first that cannot be read: every support image counts."""
    encoded = encoder.readable(paths, shown)
    if encoded.unreadable:
        raise DataError(encoded.unreadable[0])
    return encoded.values


def encode_readable(encoder: Encoder, paths: Sequence[str | Path]) -> Encoded:
    """Features of the images that can be read; the others are named at once.

    Raises:
        DataError: none can be read.
    """
    encoded = encoder.readable(paths, shown)
    if not len(encoded.rows):
        more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
        raise DataError(f"{encoded.unreadable[0]}{more}")
    for line in encoded.unreadable:
        say(f"smkd: {line}", err=True)
    return encoded


def unread(encoded: Encoded, paths: Sequence[str | Path]) -> list[str]:
    """Those of the images that could not be read."""
    read = set(encoded.rows.tolist())
    return [str(path) for row, path in enumerate(paths) if row not in read]


def count_unreadable(count: int) -> None:
    """End with exit code 1 where images were left out."""
    if count:
        say(f"smkd: {count} unreadable images left out", err=True)
        raise typer.Exit(1)


def summary(classifier: ImageClassifier) -> list[str]:
    """What was learned, a line each."""
    from smkd.classify.left_out import SHOTS

    names = classifier.classes_.tolist()
    counts = [int((classifier.support_labels_ == label).sum()) for label in range(len(names))]
    low, high = min(counts), max(counts)
    chosen = classifier.head_
    if classifier.head == "auto":
        why = "chosen by cross-validation" if low >= SHOTS else f"auto needs {SHOTS} images of every class to choose"
        chosen += f" ({why})"
    return [
        f"classes: {len(names)} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})",
        f"images: {sum(counts)}, {low if low == high else f'{low} to {high}'} per class",
        *_features(classifier),
        f"head: {chosen}",
        *_left_out(classifier.left_out_),
    ]


def _features(classifier: ImageClassifier) -> list[str]:
    """What is read of the backbone, and why; nothing without a network."""
    which = _read_features(classifier)
    if which is None:
        return []
    why = {"own": " (what its run says)", "auto": " (chosen by cross-validation)"}
    if not classifier.left_out_.images:
        why["auto"] = " (what its run says: auto needs a class with two images to choose)"
    return [f"features: {which}{why.get(classifier.reading, '')}"]


def _read_features(classifier: ImageClassifier) -> str | None:
    from smkd.fewshot.candidates import numbered, written

    encoder = classifier.encoder_
    if encoder is None or encoder.backbone is None:
        return None
    return written(numbered(encoder.config.features, len(encoder.backbone.blocks)))


def _left_out(left: LeftOutAccuracy) -> list[str]:
    """How well the classifier does: in the mean, for each class, and with --reject."""
    from smkd.classify.left_out import class_lines

    begin = "leave-one-out accuracy:"
    if not left.images:
        return [f"{begin} unknown: no class has two images; probabilities are a guess, and --reject is not possible"]
    low, high = left.interval
    asked, single = left.worst_first, [each.name for each in left.by_class if not each.images]
    lines = [
        f"{begin} {100 * left.mean:.1f} %, the mean over {len(asked)} classes, of {left.images} images "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f})",
        *class_lines(asked),
    ]
    if single:
        lines.append(f"  not left out, as they have one image: {listed(single)}")
    return [*lines, *(f"--reject {reject}: {said}" for reject in REJECTS if (said := left.threshold(reject)))]


def _record(classifier: ImageClassifier) -> dict[str, Any]:
    """What was learned, as plain values."""
    labels = classifier.support_labels_.tolist()
    return {
        "classes": {str(name): labels.count(label) for label, name in enumerate(classifier.classes_)},
        "features": _read_features(classifier), "head": classifier.head_,
        "left_out": classifier.left_out_.as_dict(REJECTS),
    }  # fmt: skip


def _line(answer: dict[str, Any]) -> str:
    classes = ", ".join(f"{each['class']} {each['probability']:.2f}" for each in answer["classes"])
    if answer["answer"] == NONE:
        return f"{answer['image']}: {NONE} (known {answer['known']:.2f}; else {classes})"
    return f"{answer['image']}: {classes}"


def _say(lines: list[str]) -> None:
    for line in lines:
        say(line)


@verb()
def app(
    support: Annotated[
        Path | None,
        typer.Argument(metavar="[SUPPORT_DIR]", help="Folder with a folder of images per class, to begin with."),
    ] = None,
    backbone: BackboneOption = None,
    recipe: Recipe = None,
    heads: AttentionHeads = None,
    features: FeaturesOption = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Make a classifier from a few photographs in the browser, and see why it answers what it does."""
    from smkd.app.serve import check_gradio, check_port, serve
    from smkd.classify.choose_features import Reader, check_reading
    from smkd.classify.encoder import open_encoder

    check_gradio()
    check_port(host, port)
    check_reading(features)
    source = chosen(backbone)
    encoder = open_encoder(source, recipe, heads=heads)
    reader = Reader(encoder, features)
    for line in encoder.report:
        say(line)
    about = "No network, only plain colours: `--backbone dinov2-small` gives one."
    if encoder.backbone is not None:
        size = sum(weight.numel() for weight in encoder.backbone.parameters()) / 1e6
        about = f"Backbone: {source}, {size:.1f} M parameters, images of {encoder.config.crop} pixels."
    serve(reader, about, support, host, port, open_, say)
