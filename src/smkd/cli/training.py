"""Verbs that train, and the recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from smkd.cli.output import DEMO
from smkd.cli.verb import is_first_rank, verb

STOPPED = "stopped at once; the same command goes on from the last checkpoint"
recipes_app = typer.Typer(help="List the recipes, or show one.")

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="Name (see `smkd recipes`) or YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="Settings, such as data=photos optim.lr=1e-4."),
]


@verb(STOPPED)
def pretrain(recipe: Recipe, settings: Overrides = None) -> None:
    """Phase 1: self-supervised training (iBOT). The same command resumes an interrupted run."""
    _train(recipe, settings, "pretrain")


@verb(STOPPED)
def distill(recipe: Recipe, settings: Overrides = None) -> None:
    """Phase 2: supervised masked knowledge distillation, from init=RUN. The same command resumes."""
    _train(recipe, settings, "distill")


@verb(STOPPED)
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the runs, results.json and report.html."), DEMO],
    seed: Annotated[int, typer.Option(help="Seed of both phases.")] = 0,
) -> None:
    """Both phases on embedded data in a few minutes: a table, results.json and report.html."""
    from smkd.demo import run_demo

    run_demo(out, seed)


@recipes_app.callback()
@verb()
def list_recipes(context: typer.Context) -> None:
    """List the recipes."""
    if context.invoked_subcommand is not None:
        return
    from smkd.config.loading import recipe_names, recipe_summary

    width = max(len(name) for name in recipe_names())
    for name in recipe_names():
        typer.echo(f"{name:{width}}  {recipe_summary(name)}")


@recipes_app.command("show")
@verb()
def show_recipe(
    name: Annotated[str, typer.Argument(help="Name of a recipe.")],
    resolved: Annotated[bool, typer.Option("--resolved", help="Print every setting, defaults included.")] = False,
) -> None:
    """Print a recipe as YAML."""
    from smkd.config import loading

    typer.echo(loading.dump(loading.resolve(name)) if resolved else loading.recipe_text(name), nl=False)


def _train(recipe: str, settings: list[str] | None, phase: Literal["pretrain", "distill"]) -> None:
    from smkd import api

    config = api.resolve(recipe, settings or [], phase)
    run = api.pretrain(config) if phase == "pretrain" else api.distill(config)
    if is_first_rank():
        typer.echo(f"run folder: {run}")
