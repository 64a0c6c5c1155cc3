"""Verbs that draw: report, and plot with a picture each."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smkd.cli.fewshot import Accelerator, AttentionHeads, Which
from smkd.cli.output import PAGE, PICTURE, say
from smkd.cli.verb import verb
from smkd.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from smkd.classify.encoder import Encoder

plot_app = typer.Typer(help="Draw one picture, as PNG or SVG.", no_args_is_help=True)
MOST_IMAGES = 200
SUFFIXES = (".png", ".svg")


class MapMethod(StrEnum):
    """How features come into the plane."""

    pca = "pca"
    tsne = "tsne"
    umap = "umap"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Run, checkpoint, weights, or a name of `smkd backbones`.")]
Photographs = Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Images, or folders of them.")]
PictureFile = Annotated[Path, typer.Option("-o", "--out", help="File to write; ends in .png or .svg."), PICTURE]
Recipe = Annotated[str | None, typer.Option(help="Image size and the like for weights of other projects.")]


@verb()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, in the order of their training.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML page to write."), PAGE],
    data: Annotated[Path | None, typer.Option(help="Data folder, if it is not the last run's own.")] = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="Episodes, if not those of the last run.")] = None,
    accelerator: Accelerator = "auto",
) -> None:
    """One page on what runs learned: results, an episode, patches, attention, a map, curves, settings."""
    from smkd.report import write_report

    story = write_report(runs, out, data, episodes, accelerator)
    for line in story.missing:
        say(line)
    say(f"{out}")


@verb()
def attention(
    model: Model, images: Photographs, out: PictureFile,
    heads: Annotated[bool, typer.Option("--all-heads", help="Also draw each head by itself.")] = False,
    which: Which = None, recipe: Recipe = None, attention_heads: AttentionHeads = None,
    accelerator: Accelerator = "auto",
) -> None:  # fmt: skip
    """Where [CLS] looks: the mean of the heads, the patches that hold 60 % of it, and each head."""
    from smkd.viz.patch_pictures import attention_tiles
    from smkd.viz.tiles import sheet

    encoder = _encoder(model, which, recipe, attention_heads, accelerator, out)
    paths = _images(images)
    tiles = attention_tiles(encoder, _loaded(paths), [path.name for path in paths], heads=heads)
    _save(out, sheet(tiles, len(tiles) // len(paths)))


@verb()
def matches(
    model: Model,
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="Image whose patches are matched.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Image that they are matched with.")],
    out: PictureFile,
    which: Which = None, recipe: Recipe = None, attention_heads: AttentionHeads = None,
    accelerator: Accelerator = "auto",
) -> None:  # fmt: skip
    """Patches of two images that match, with the cosines and the weights of the matches that add most."""
    from smkd.viz.explain import MATCHES
    from smkd.viz.patch_pictures import drawn_matches
    from smkd.viz.tiles import Tile, sheet

    encoder = _encoder(model, which, recipe, attention_heads, accelerator, out)
    picture, found, grid = drawn_matches(encoder, _loaded([first, second]), MATCHES)
    _save(out, sheet([Tile(picture, f"{first.name} and {second.name}")], 1, inches=5))
    for number, match in enumerate(found[:MATCHES], start=1):
        places = " and ".join(f"row {p // grid + 1}, column {p % grid + 1}" for p in match[:2])
        say(f"{number}: {places}: cosine {match.cosine:.2f}, weight {match.weight:.3f}")
    say(f"patch-by-patch similarity {sum(match.weight * match.cosine for match in found):.3f}")


@verb()
def embedding(
    model: Model,
    images: Annotated[Path, typer.Argument(metavar="DATA", help="Folder of class folders.")],
    out: PictureFile,
    method: Annotated[MapMethod, typer.Option(help="umap needs the package umap-learn.")] = MapMethod.tsne,
    seed: Annotated[int, typer.Option(help="Of t-SNE and UMAP.")] = 0,
    which: Which = None, recipe: Recipe = None, attention_heads: AttentionHeads = None,
    accelerator: Accelerator = "auto",
) -> None:  # fmt: skip
    """A map of images by their features, with thumbnails."""
    import numpy as np

    from smkd.classify.pictures import support_images
    from smkd.viz.embedding import embedding_figure, project
    from smkd.viz.tiles import picture

    encoder = _encoder(model, which, recipe, attention_heads, accelerator, out)
    found = support_images(images)
    if len(found) > MOST_IMAGES:
        rows = np.linspace(0, len(found) - 1, MOST_IMAGES).round().astype(int)
        say(f"{len(found)} images: {MOST_IMAGES} of them are shown, evenly spread")
    else:
        rows = np.arange(len(found))
    values = encoder([found.name(int(row)) for row in rows])
    photographs = [picture(found.load(int(row))) for row in rows]
    _save(
        out, embedding_figure(project(values, method.value, seed), found.labels[rows], found.class_names, photographs)
    )


@verb()
def crops(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe, YAML file, or a run folder.")],
    images: Photographs,
    out: PictureFile,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting, such as mask.ratio=[0.5].")
    ] = None,
    epoch: Annotated[int | None, typer.Option(min=0, help="Whose crops; else the first that is masked.")] = None,
) -> None:
    """The views that training cuts from images, with their masks."""
    from smkd.classify.pictures import Pictures
    from smkd.config import loading
    from smkd.viz.tiles import sheet
    from smkd.viz.views import view_tiles

    _check_suffix(out)
    run = Path(recipe) / "config.yaml"
    config = loading.load_config(run) if run.is_file() else loading.resolve(recipe, settings or [])
    if run.is_file() and settings:
        raise ConfigError(f"--set {settings[0]}: '{recipe}' is a run, whose settings stay; give its recipe instead")
    paths = _images(images)
    chosen = config.mask.start_epoch if epoch is None else epoch
    pictures = Pictures(paths)
    pictures.class_names = [path.name for path in paths]
    tiles = view_tiles(pictures, config, range(len(paths)), chosen)
    _save(out, sheet(tiles, len(tiles) // len(paths)))


@verb()
def curves(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")], out: PictureFile
) -> None:
    """Losses, accuracy, the teacher's entropy, prototypes and NMI of runs, side by side."""
    from smkd.engine.runs import named_runs
    from smkd.viz.curves import stacked_curves

    _check_suffix(out)
    _save(out, stacked_curves(named_runs(runs)))


PICTURES: tuple[tuple[str, Callable[..., None], str], ...] = (
    ("attention", attention, "runs/two photo.jpg -o attention.png"),
    ("matches", matches, "runs/two first.jpg second.jpg -o matches.png"),
    ("embedding", embedding, "runs/two photos -o map.png"),
    ("crops", crops, "mini-imagenet-distill photo.jpg -o crops.png"),
    ("curves", curves, "runs/one runs/two -o curves.svg"),
)
"""Name, function, and the words of an example."""


def _check_suffix(out: Path) -> None:
    if out.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--out '{out}': a picture ends in .png or .svg")


def _encoder(
    model: str, which: str | None, recipe: str | None, heads: int | None, accelerator: str, out: Path
) -> Encoder:
    from smkd.classify.encoder import PIXELS, open_encoder
    from smkd.fewshot.candidates import features_from

    _check_suffix(out)
    if model == PIXELS:
        raise ConfigError(f"'{PIXELS}' is no network: it has no patches and no attention; give a run or weights")
    encoder = open_encoder(model, recipe, accelerator, heads)
    return encoder if which is None else encoder.reading(features_from(which))


def _images(places: list[Path]) -> list[Path]:
    from smkd.classify.pictures import listed_images

    found = listed_images(places)
    if len(found) > MOST_IMAGES:
        raise ConfigError(f"{len(found)} images would make no readable picture; give at most {MOST_IMAGES}")
    return found


def _loaded(paths: list[Path]) -> list[Tensor]:
    from smkd.classify.pictures import Pictures

    pictures = Pictures(paths)
    return [pictures.load(row) for row in range(len(paths))]


def _save(out: Path, figure: Figure) -> None:
    from smkd.files import explained, written_aside
    from smkd.viz.style import png, svg

    data = svg(figure) if out.suffix.lower() == ".svg" else png(figure)
    with explained(out, ConfigError, option="--out"), written_aside(out) as aside:
        aside.write_bytes(data)
    say(str(out))
