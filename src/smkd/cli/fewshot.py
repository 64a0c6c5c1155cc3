"""Verbs that measure: features, eval, compare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smkd.cli.output import FEATURES, JSON, PAGE, PICTURES, write_json
from smkd.cli.verb import verb
from smkd.errors import ConfigError
from smkd.progress import shown

if TYPE_CHECKING:
    from torch import Tensor

    from smkd.api import Opened
    from smkd.config.protocol import ProtocolConfig
    from smkd.fewshot.features import Features


class Split(StrEnum):
    """The three splits."""

    train = "train"
    val = "val"
    test = "test"


class NetworkChoice(StrEnum):
    """The two networks of a checkpoint."""

    teacher = "teacher"
    student = "student"


class PartChoice(StrEnum):
    """Parts of a feature."""

    cls = "cls"
    mean = "mean"
    weighted_mean = "weighted_mean"


class Precision(StrEnum):
    """Arithmetic of the backbone."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class PresetChoice(StrEnum):
    """Named ways of measuring (`smkd.fewshot.accuracy.PRESETS`)."""

    paper = "paper"
    standard = "standard"
    fair600 = "fair600"


class PictureFormat(StrEnum):
    """Formats of pictures."""

    png = "png"
    svg = "svg"


HEADS = (
    "prototype, simpleshot, knn, classifier, logistic, ridge; transductive: bd-cspn, laplacian-shot, pt-map, tim, "
    "transductive-finetune; options as in knn:neighbours=3"
)
Data = Annotated[Path | None, typer.Option(help="Data folder, if it is not the run's own.")]
Recipe = Annotated[str | None, typer.Option(help="Settings for 'pixels', 'random' and weights of other projects.")]
AttentionHeads = Annotated[
    int | None,
    typer.Option("--heads", min=1, help="Attention heads of weights of another project, which may not say how many."),
]
ALL = "all"
SplitName = Annotated[Split | None, typer.Option(help="Split whose classes are measured.")]
Resize = Annotated[int | None, typer.Option(help="Shorter side in pixels before the crop.")]
Crop = Annotated[int | None, typer.Option(help="Side of the centre crop in pixels.")]
Which = Annotated[
    str | None,
    typer.Option("--features", metavar="WHICH", help="Blocks and parts such as 11, 10+11:cls or -2:cls+weighted_mean."),
]
Accelerator = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
ShotCounts = Annotated[list[int] | None, typer.Option(help="Support images per class; may be repeated.")]
Query = Annotated[str | None, typer.Option(help="Queries per class: a number, or 'all'.")]
Dirichlet = Annotated[
    float | None, typer.Option(help="Unbalanced queries: concentration of their shares among the classes.")
]
EpisodeCount = Annotated[int | None, typer.Option(help="Number of episodes.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the episodes.")]
Protocol = Annotated[
    PresetChoice | None,
    typer.Option(help="paper: all queries, 10000 episodes, 1000 of the classifier; standard: 15 queries, 10000; "
                 "fair600: 15 queries, 600."),
]  # fmt: skip
Heads = Annotated[list[str] | None, typer.Option("--head", help=f"Few-shot classifier; may be repeated: {HEADS}.")]
Base = Annotated[Path | None, typer.Option(help="Feature file of the training classes, for simpleshot:transform=cl2n.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the results here."), JSON]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]
Latex = Annotated[bool, typer.Option("--latex", help="Print the table as LaTeX.")]


@verb()
def features(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Run folder or checkpoint; or, with --recipe, 'pixels', 'random' or weights of another project.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="HDF5 file to write."), FEATURES],
    data: Data = None,
    recipe: Recipe = None,
    attention_heads: AttentionHeads = None,
    split: SplitName = None,
    which: Which = None,
    blocks: Annotated[int | None, typer.Option(help="How many last blocks contribute.")] = None,
    part: Annotated[
        list[PartChoice] | None, typer.Option(help="Tokens that make the feature; may be repeated.")
    ] = None,
    network: Annotated[NetworkChoice | None, typer.Option(help="Which of the two networks; else the teacher.")] = None,
    resize: Resize = None,
    crop: Crop = None,
    precision: Annotated[Precision | None, typer.Option(help="Arithmetic of the backbone.")] = None,
    accelerator: Accelerator = "auto",
) -> None:
    """Write the features of a split to an HDF5 file, in the layout of the published ones."""
    from smkd import api
    from smkd.engine.log import console
    from smkd.fewshot.feature_file import FeatureWriter
    from smkd.files import listed

    changes = _changes(split, data, resize, crop, accelerator, which)
    if which is None:
        changes["features"] = {"blocks": blocks, "parts": [p.value for p in part] if part else None}
    elif blocks is not None or part:
        raise ConfigError(f"--features {which} says blocks and parts; leave --blocks and --part out")
    changes["precision"] = precision and precision.value
    chosen: Any = None if network is None else network.value
    opened = api.open_features(model, recipe=recipe, network=chosen, changes=changes, heads=attention_heads)
    stream = opened.stream
    if stream is None:
        raise ConfigError(f"'{model}' is a feature file already")
    with FeatureWriter(out, rows=len(stream.images), dim=stream.dim, source=opened.about) as writer:
        for values, labels in shown(stream, f"{opened.about.split} features", len(stream.loader)):
            writer.append(values, labels)
    kept = set(writer.labels[: writer.count].tolist())
    gone = [name for label, name in enumerate(stream.images.class_names) if label not in kept]
    console.print(f"{out}: {writer.count} features of {stream.dim} numbers, {len(kept)} classes")
    if writer.count < len(stream.images):
        console.print(f"{len(stream.images) - writer.count} unreadable images left out")
    if gone:
        said = f"{len(gone)} classes fall out, as none of their images can be read: {listed(gone)}"
        console.print(said)


@verb()
def evaluate(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Run folder, checkpoint or feature file; with --recipe also 'pixels', "
                       "'random' or weights of another project."),
    ],
    data: Data = None,
    recipe: Recipe = None,
    attention_heads: AttentionHeads = None,
    split: SplitName = None,
    protocol: Protocol = None,
    way: Annotated[list[int] | None, typer.Option(help="Classes per episode; may be repeated.")] = None,
    shot: ShotCounts = None,
    query: Query = None,
    query_dirichlet: Dirichlet = None,
    episodes: EpisodeCount = None,
    seed: Seed = None,
    head: Heads = None,
    reference_knn: Annotated[
        bool, typer.Option("--reference-knn", help="Also kNN as the authors' code counts its votes.")
    ] = False,
    base: Base = None,
    which: Annotated[
        str | None,
        typer.Option(
            "--features", metavar="WHICH|all",
            help="Blocks and parts such as 11, 10+11:cls or -2:cls+weighted_mean; all: each that `fit` chooses among.",
        ),
    ] = None,
    concat: Annotated[bool, typer.Option("--concat", help="Join the sources' features into one.")] = False,
    resize: Resize = None,
    crop: Crop = None,
    accelerator: Accelerator = "auto",
    json_file: Json = None,
    markdown: Markdown = False,
    latex: Latex = False,
    figures: Annotated[Path | None, typer.Option(help="Folder for pictures of the results."), PICTURES] = None,
    figure_format: Annotated[PictureFormat, typer.Option(help="Format of the pictures.")] = PictureFormat.png,
    report: Annotated[Path | None, typer.Option(help="HTML page with the table and the pictures."), PAGE] = None,
) -> None:  # fmt: skip
    """Few-shot accuracy on classes never seen, with its 95 % interval."""
    from smkd import api
    from smkd.fewshot.accuracy import evaluate_features
    from smkd.viz import measured

    every = which == ALL
    if every and concat:
        raise ConfigError("--features all measures one by one what --concat would join; leave one of them out")
    changes = _changes(split, data, resize, crop, accelerator, None if every else which)
    opened = api.open_all(sources, recipe=recipe, changes=changes, heads=attention_heads, every=every)
    given = {
        "shots": tuple(shot) if shot else None, "query": query, "query_dirichlet": query_dirichlet,
        "episodes": episodes, "seed": seed,
    }  # fmt: skip
    heads = [*(head or []), *(["knn:reference=true"] if reference_knn else [])]
    named = _joined(opened) if concat else _measured_one_by_one(opened)
    base_mean = _base_mean(base)
    rows = []
    for each, values in named:
        results = []
        for name in heads or [each.protocol.head]:
            for count in way or [each.protocol.way]:
                wanted = _protocol(each.protocol, protocol, {**given, "way": count, "head": name})
                results += evaluate_features(_placed(values, accelerator), wanted, base_mean)
        rows.append(measured.Measured(each.name, each.about, results))
    _name_checkpoints(opened)
    if json_file is not None:
        write_json(json_file, {"results": measured.records(rows)})
    if figures is not None:
        measured.save_figures(figures, rows, figure_format.value)
    if report is not None:
        measured.save_report(report, rows)
    _print(measured.results_table(rows), measured.conditions(rows), markdown, latex)


@verb()
def compare(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE [SOURCE]", help="Two sources as in `smkd eval`, or one and two heads."),
    ],
    data: Data = None,
    recipe: Recipe = None,
    attention_heads: AttentionHeads = None,
    split: SplitName = None,
    protocol: Protocol = None,
    way: Annotated[int | None, typer.Option(help="Classes per episode.")] = None,
    shot: ShotCounts = None,
    query: Query = None,
    query_dirichlet: Dirichlet = None,
    episodes: EpisodeCount = None,
    seed: Seed = None,
    head: Heads = None,
    base: Base = None,
    resize: Resize = None,
    crop: Crop = None,
    accelerator: Accelerator = "auto",
    json_file: Json = None,
    markdown: Markdown = False,
    latex: Latex = False,
) -> None:
    """Which of two is better, on the same episodes, with the 95 % interval of the difference."""
    from smkd import api
    from smkd.engine.log import console
    from smkd.fewshot.accuracy import compare_results, evaluate_features
    from smkd.fewshot.features import check_same_images
    from smkd.viz import measured

    heads = head or []
    if (len(sources), len(heads)) not in ((2, 0), (2, 1), (2, 2), (1, 2)):
        raise ConfigError(
            f"compare takes two sources, or one source and two heads, not {len(sources)} and {len(heads)}"
        )
    changes = _changes(split, data, resize, crop, accelerator)
    opened = api.open_all(sources, recipe=recipe, changes=changes, heads=attention_heads)
    values = [_placed(each.features(), accelerator) for each in opened]
    check_same_images(values[0], values[-1])
    given = {
        "way": way, "shots": tuple(shot) if shot else None, "query": query, "query_dirichlet": query_dirichlet,
        "episodes": episodes, "seed": seed,
    }  # fmt: skip
    base_mean = _base_mean(base)
    # both are measured as the first one's run is
    wanted = [
        _protocol(opened[0].protocol, protocol, {**given, "head": name})
        for name in (heads[0] if heads else None, heads[-1] if heads else None)
    ]
    if wanted[0].episodes != wanted[1].episodes:
        fewer = min(each.episodes for each in wanted)
        wanted = [each.model_copy(update={"episodes": fewer}) for each in wanted]
    first = evaluate_features(values[0], wanted[0], base_mean)
    second = evaluate_features(values[-1], wanted[1], base_mean)
    names = measured.two_names([each.name for each in opened], [each.head for each in wanted])
    comparisons = [compare_results(a, b) for a, b in zip(first, second, strict=True)]
    rows = [
        measured.Measured(name, about, results)
        for name, about, results in zip(names, (opened[0].about, opened[-1].about), (first, second), strict=True)
    ]
    if json_file is not None:
        write_json(
            json_file,
            {"first": names[0], "second": names[1], "comparisons": [each.as_dict() for each in comparisons],
             "results": measured.records(rows)},
        )  # fmt: skip
    _print(measured.comparison_table(names, comparisons), measured.conditions(rows[:1]), markdown, latex)
    for each in comparisons:
        console.print(f"{each.way}-way {each.shot}-shot: {each.verdict(*names)}")


def _changes(
    split: Split | None, data: Path | None, resize: int | None, crop: int | None, accelerator: str,
    which: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    from smkd.fewshot.candidates import features_from

    return {
        "features": {} if which is None else features_from(which).model_dump(mode="json"),
        "evaluation": {"split": split and split.value, "resize": resize, "crop": crop},
        "data": {"root": data and str(data)},
        "accelerator": None if accelerator == "auto" else accelerator,
    }


def _protocol(own: ProtocolConfig, preset: PresetChoice | None, given: dict[str, Any]) -> ProtocolConfig:
    """A run's way of measuring, less what a preset and options change."""
    from smkd.config.loading import check_protocol
    from smkd.fewshot.accuracy import with_preset

    changes = {key: value for key, value in given.items() if value is not None}
    if preset is not None:
        own = with_preset(own.model_copy(update={"head": changes.get("head", own.head)}), preset.value)
    return check_protocol(**{**own.model_dump(), **changes})


def _measured_one_by_one(opened: list[Opened]) -> Iterator[tuple[Opened, Features]]:
    """Every source with its features; those that are tried one after another."""
    for each in opened:
        if each.tried:
            yield from each.one_by_one()
        else:
            yield each, each.features()


def _joined(opened: list[Opened]) -> Iterable[tuple[Opened, Features]]:
    from dataclasses import replace

    from smkd.fewshot.features import concatenated

    joined = replace(opened[0], name=" + ".join(each.name for each in opened))
    return [(joined, concatenated([each.features() for each in opened]))]


def _placed(features: Features, accelerator: str) -> Features:
    """On the device where the heads work: CUDA if it is asked for; the CPU holds features of any size."""
    from dataclasses import replace

    from smkd.device import pick_device

    device = pick_device("cpu" if accelerator == "auto" else accelerator)
    # some heads compute in float64, which MPS lacks
    return replace(features, values=features.values.to(device if device.type == "cuda" else "cpu"))


def _base_mean(base: Path | None) -> Tensor | None:
    from smkd.fewshot.feature_file import read_features

    return None if base is None else read_features(base).values.mean(dim=0)


def _name_checkpoints(opened: list[Opened]) -> None:
    """Say which file of each run is measured: its best, else its last."""
    from smkd.engine.log import console

    for each in opened:
        if each.checkpoint:
            console.print(f"{each.name}: {each.checkpoint}")


def _print(table: Any, conditions: list[str], markdown: bool, latex: bool) -> None:
    from smkd.engine.log import console
    from smkd.viz.measured import latex_table, markdown_table, rich_table

    if markdown and latex:
        raise ConfigError("--markdown and --latex are two forms of one table; leave one out")
    if markdown or latex:
        typer.echo(latex_table(table) if latex else markdown_table(table))
    else:
        console.print(rich_table(table))
    for line in conditions:
        console.print(line)
