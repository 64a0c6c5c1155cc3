"""The command line. It only wires: every verb is a few calls into the package, imported when needed."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from smkd.errors import ConfigError, SmkdError

if TYPE_CHECKING:
    from smkd.api import Result, RunConfig

app = typer.Typer(
    name="smkd", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Few-shot image classification with Vision Transformers, in two phases.",
)  # fmt: skip
recipes_app = typer.Typer(help="List the recipes, or show one.")
app.add_typer(recipes_app, name="recipes", invoke_without_command=True)

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="Name (see `smkd recipes`) or YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="Settings, such as data=photos optim.lr=1e-4."),
]


class Split(StrEnum):
    """The three splits."""

    train = "train"
    val = "val"
    test = "test"


class Head(StrEnum):
    """Few-shot classifiers."""

    prototype = "prototype"
    knn = "knn"


def _print_version(wanted: bool) -> None:
    if wanted:
        from smkd import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Few-shot image classification with Vision Transformers, in two phases."""


@app.command()
def pretrain(recipe: Recipe, settings: Overrides = None) -> None:
    """Phase 1: self-supervised training (iBOT). The same command resumes an interrupted run."""
    _train(recipe, settings, "pretrain")


@app.command()
def distill(recipe: Recipe, settings: Overrides = None) -> None:
    """Phase 2: supervised masked knowledge distillation, from init=RUN. The same command resumes."""
    _train(recipe, settings, "distill")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Run folder or checkpoint; or, with --recipe, 'pixels' or 'random'.")],
    data: Annotated[Path | None, typer.Option(help="Data folder, if it is not the run's own.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Settings for 'pixels' and 'random'.")] = None,
    split: Annotated[Split | None, typer.Option(help="Split whose classes are measured.")] = None,
    way: Annotated[int | None, typer.Option(help="Classes per episode.")] = None,
    shot: Annotated[list[int] | None, typer.Option(help="Support images per class; may be repeated.")] = None,
    query: Annotated[str | None, typer.Option(help="Queries per class: a number, or 'all'.")] = None,
    episodes: Annotated[int | None, typer.Option(help="Number of episodes.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the episodes.")] = None,
    head: Annotated[Head | None, typer.Option(help="Few-shot classifier.")] = None,
    neighbours: Annotated[int | None, typer.Option(help="Neighbours that vote (knn).")] = None,
    resize: Annotated[int | None, typer.Option(help="Shorter side in pixels before the crop.")] = None,
    crop: Annotated[int | None, typer.Option(help="Side of the centre crop in pixels.")] = None,
    accelerator: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results here.")] = None,
) -> None:
    """Few-shot accuracy on classes never seen, with its 95 % interval."""
    from smkd import api
    from smkd.engine.restore import load_backbone

    source: Any = model
    if model in ("pixels", "random"):
        if recipe is None:
            raise ConfigError(f"`smkd eval {model}` needs --recipe, whose data and image size it takes")
        config = api.resolve(recipe)
        if model == "random":
            source = api.random_backbone(config)
    else:
        source, config = load_backbone(Path(model))
    protocol = {
        "split": split and split.value, "way": way, "shots": shot or None, "query": query, "episodes": episodes,
        "seed": seed, "head": head and head.value, "neighbours": neighbours, "resize": resize, "crop": crop,
    }  # fmt: skip
    changes = {"evaluation": protocol, "data": {"root": data}, "accelerator": accelerator}
    config = _changed(config, changes)
    results = api.evaluate(source, config)
    _print_results(model, results, config)
    if json_file is not None:
        settings = config.model_dump(mode="json", include={"evaluation", "features", "data"})
        _write_json(json_file, {"model": model, **settings, "results": [r.as_dict() for r in results]})


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the runs, results.json and report.html.")],
    seed: Annotated[int, typer.Option(help="Seed of both phases.")] = 0,
) -> None:
    """Both phases on embedded data in a few minutes: a table, results.json and report.html."""
    from smkd.demo import run_demo

    run_demo(out, seed)


@recipes_app.callback()
def list_recipes(context: typer.Context) -> None:
    """List the recipes."""
    if context.invoked_subcommand is not None:
        return
    from smkd.config.loading import recipe_names, recipe_summary

    width = max(len(name) for name in recipe_names())
    for name in recipe_names():
        typer.echo(f"{name:{width}}  {recipe_summary(name)}")


@recipes_app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="Name of a recipe.")],
    resolved: Annotated[bool, typer.Option("--resolved", help="Print every setting, defaults included.")] = False,
) -> None:
    """Print a recipe as YAML."""
    from smkd.config import loading

    typer.echo(loading.dump(loading.resolve(name)) if resolved else loading.recipe_text(name), nl=False)


def main() -> None:
    """Entry point: a user's mistake is one line on standard error and exit code 2."""
    debug = "--debug" in sys.argv
    # accepted anywhere on the line
    sys.argv = [sys.argv[0], *(word for word in sys.argv[1:] if word != "--debug")]
    try:
        app()
    except SmkdError as error:
        message = str(error)
        if debug:
            raise
    except OSError as error:  # a full disk, a folder that may not be written
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        if debug:
            raise
    else:
        return
    typer.echo(f"smkd: {message}", err=True)
    raise SystemExit(2)


def _train(recipe: str, settings: list[str] | None, phase: Literal["pretrain", "distill"]) -> None:
    from smkd import api

    config = api.resolve(recipe, settings or [], phase)
    try:
        run = api.pretrain(config) if phase == "pretrain" else api.distill(config)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on after the last finished epoch", err=True)
        raise SystemExit(130) from None
    if os.environ.get("RANK", "0") == "0":  # once under torchrun
        typer.echo(f"run folder: {run}")


def _changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The configuration with the values that were given; None leaves a value as it is."""
    from smkd.config.loading import check

    values = config.model_dump(mode="json")
    for key, change in changes.items():
        if isinstance(change, dict):
            given = {name: value for name, value in change.items() if value is not None}
            values[key] = {**values[key], **given}
        else:
            values[key] = change
    return check(values)


def _print_results(model: str, results: list[Result], config: RunConfig) -> None:
    from smkd.engine.runlog import console
    from smkd.viz.tables import results_table

    console.print(results_table({model: results}))
    protocol = config.evaluation
    console.print(
        f"{config.data.dataset}, {protocol.split} classes, {protocol.way}-way, {protocol.query} queries a class, "
        f"{protocol.episodes} episodes, seed {protocol.seed}, head {protocol.head}, "
        f"images {protocol.resize} -> {protocol.crop} px; accuracy in %, mean ± 95 % interval"
    )
    if results[0].skipped:
        console.print(f"{results[0].skipped} unreadable images left out")


def _write_json(path: Path, values: Any) -> None:
    try:
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json: cannot write '{path}': {error.strerror}") from error
