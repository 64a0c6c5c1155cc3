"""Verbs that train: pretrain, distill, demo, adapt, bench; and the recipes."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from smkd.cli.backbone import BackboneOption, chosen
from smkd.cli.fewshot import AttentionHeads
from smkd.cli.output import DEMO, JSON, RUN, say, say_table, write_json
from smkd.cli.verb import verb
from smkd.errors import ConfigError
from smkd.processes import is_first_rank

STOPPED = "stopped at once; the same command goes on from the last checkpoint"
recipes_app = typer.Typer(help="List the recipes, or show one.")

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="Name (see `smkd recipes`) or YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="Settings, such as data=photos optim.lr=1e-4."),
]

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check data, settings and weights, time three steps, and write nothing.")
]


@verb(STOPPED)
def pretrain(recipe: Recipe, settings: Overrides = None, dry_run: DryRun = False) -> None:
    """Phase 1: self-supervised training (iBOT). The same command resumes an interrupted run."""
    _train(recipe, settings, "pretrain", dry_run)


@verb(STOPPED)
def distill(recipe: Recipe, settings: Overrides = None, dry_run: DryRun = False) -> None:
    """Phase 2: supervised masked knowledge distillation, from init=RUN. The same command resumes."""
    _train(recipe, settings, "distill", dry_run)


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
        say(f"{name:{width}}  {recipe_summary(name)}")


@recipes_app.command("show")
@verb()
def show_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a recipe.")],
    resolved: Annotated[bool, typer.Option("--resolved", help="Print every setting, defaults included.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="The same, with a comment on what each means.")] = False,
) -> None:
    """Print a recipe as YAML."""
    from smkd.config import loading
    from smkd.reference.settings_page import explained_yaml

    text = loading.recipe_text(name)
    if explain:
        text = explained_yaml(loading.resolve(name).model_dump(mode="json"))
    elif resolved:
        text = loading.dump(loading.resolve(name))
    typer.echo(text, nl=False)


@verb()
def runs(
    places: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FOLDER]... | diff RUN RUN",
            help="Runs, or folders of runs; else runs/. After the word diff, two runs whose settings are compared.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the list here; - prints it."), JSON
    ] = None,
) -> None:
    """List runs: recipe, data, state, best validation, time, device; or compare two."""
    from smkd.engine.runs import find_runs, run_differences, run_summary

    given = places or [Path("runs")]
    if diff := given[0] == Path("diff"):
        given = given[1:]
        if len(given) != 2:
            raise ConfigError(
                f"runs diff compares two runs, not {len(given)}; a folder called diff needs its whole path"
            )
    found = [run_summary(folder) for place in given for folder in find_runs(place)]
    say_table([_RUN_COLUMNS, *map(_run_row, found)])
    if diff:
        for line in run_differences(*given) or ["no setting differs"]:
            say(line)
    if json_file is not None:
        write_json(json_file, [each.as_dict() for each in found])


@verb()
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, which may go on elsewhere.")],
    once: Annotated[bool, typer.Option("--once", help="Print it once and stop.")] = False,
) -> None:
    """Follow a run: curves, images a second, time left, validations. Ctrl-C stops looking, not the run."""
    from smkd.engine.watch import follow, state_of

    if once or not sys.stdout.isatty():
        for line in state_of(run):
            say(line)
    else:
        follow(run)


_RUN_COLUMNS = ("run", "recipe", "data", "epochs", "best validation", "hours", "device", "state")


def _run_row(run: RunSummary) -> tuple[str, ...]:
    best = "" if run.best is None else f"{run.best:.2f} (epoch {run.best_epoch})"
    return (
        str(run.folder), run.recipe, run.data, f"{run.epoch}/{run.epochs}", best, f"{run.hours:.2f}", run.device,
        run.state,
    )  # fmt: skip


def _train(recipe: str, settings: list[str] | None, phase: Literal["pretrain", "distill"], only_look: bool) -> None:
    if sys.stdout.isatty() and is_first_rank():
        say(f"smkd {phase} {recipe}")  # before PyTorch loads
    from smkd import api
    from smkd.engine.runs import next_steps

    config = api.resolve(recipe, settings or [], phase)
    if only_look:
        from smkd.engine.dry_run import dry_run
        from smkd.fewshot.validation import FewShotValidation

        for line in dry_run(config, FewShotValidation()):
            say(line)
        return
    run = api.pretrain(config) if phase == "pretrain" else api.distill(config)
    if is_first_rank():
        say(f"run folder: {run}")
        say("next:")
        for line in next_steps(run, config):
            say(f"  {line}")


if TYPE_CHECKING:
    from smkd.adaptation import Adapted
    from smkd.engine.runs import RunSummary


@verb(STOPPED)
def adapt(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Labelled images, such as a folder of class folders.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder."), RUN],
    backbone: BackboneOption = None,
    heads: AttentionHeads = None,
    settings: Overrides = None,
) -> None:
    """Phase 2 on your own few images from any backbone, and whether held-out images gain. The same command resumes."""
    from smkd.adaptation import adapt

    adapted = adapt(data, out, chosen(backbone), settings or [], heads)
    if is_first_rank():
        for line in [*report(adapted), *next_commands(adapted, data)]:
            say(line)


def report(adapted: Adapted) -> list[str]:
    """What came of it, a line each."""
    if adapted.epoch:
        lines = [f"best: after epoch {adapted.epoch}, in {adapted.run}"]
    else:
        lines = [f"adapting did not help: the backbone as it was is the best, and is what {adapted.run} keeps"]
    lines.append(f"features: {adapted.features}")
    lines += _classes(adapted) if adapted.held_out == "classes" else _images(adapted)
    if adapted.split == "val":
        lines.append(
            "there is no test split: these also chose the checkpoint, which makes them look better than new ones"
        )
    return lines


def next_commands(adapted: Adapted, data: str) -> list[str]:
    """What to type now."""
    run = shlex.quote(str(adapted.run))
    folder = Path(data) / "train" if (Path(data) / "train").is_dir() else Path(data)
    own = adapted.held_out == "images" and folder.is_dir()
    support = shlex.quote(str(folder)) if own else "SUPPORT_DIR"
    return [f"next: smkd fit {support} -o clf.smkd --backbone {run}", "      smkd predict clf.smkd IMAGE..."]


def _classes(adapted: Adapted) -> list[str]:
    from smkd.fewshot.accuracy import Result, compare_results

    lines = []
    for before, after in zip(adapted.before, adapted.after, strict=True):
        assert isinstance(before, Result)
        assert isinstance(after, Result)
        line = f"{len(before.class_names)} held-out classes, {before.way}-way {before.shot}-shot: {before} %"
        if adapted.epoch:
            change = compare_results(before, after)
            line += f" -> {after} %, {change.difference:+.2f} ± {change.ci95:.2f} on the same episodes"
        lines += [line, before.without] if before.without else [line]
    return lines


def _images(adapted: Adapted) -> list[str]:
    import numpy as np

    from smkd.fewshot import intervals

    before, after = np.asarray(adapted.before), np.asarray(adapted.after)

    def shown(right: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> str:
        low, high = intervals.of_share(int(right.sum()), len(right))
        return f"{100 * right.mean():.1f} % ({100 * low:.1f} to {100 * high:.1f})"

    line = f"{len(before)} held-out images: {shown(before)}"
    if adapted.epoch:
        gain = intervals.of_paired_gain(before, after)
        line += f" -> {shown(after)}, {gain.points:+.1f} ({gain.low:+.1f} to {gain.high:+.1f}) on the same images"
    return [line]


if TYPE_CHECKING:
    from smkd.engine.bench import Bench


@verb()
def bench(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name or YAML file.")] = "mini-imagenet-distill",
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings, such as batch_size=8 data=photos.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 10,
    load: Annotated[int, typer.Option(min=0, help="Busy processes beside it, as of other users.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result here."), JSON] = None,
    against: Annotated[Path | None, typer.Option(help="Earlier --json file to print ratios to.")] = None,
) -> None:
    """Images a second, where a step's time goes, FLOPs, share of the machine's ceiling, memory.

    Without data= the views are noise on the device; with it, images go through the loader.
    """
    from smkd.files import millions
    from smkd.machine import settle_threads
    from smkd.processes import busy_processes

    earlier = None if against is None else _read(against)
    with busy_processes(load):
        settle_threads()  # before PyTorch loads
        from smkd.config.loading import resolve
        from smkd.engine.bench import measure_steps

        found = measure_steps(resolve(recipe, settings or []), steps)
    from smkd.engine.log import console
    from smkd.viz.measured import rich_table

    if json_file is not None:
        write_json(json_file, found.as_dict())
    console.print(
        f"{found.recipe}, batch {found.batch_size}, {millions(found.parameters)} parameters, {found.data}; "
        f"{found.device}, {found.precision}, PyTorch {found.torch}, {found.threads} threads"
        + (f", beside {load} busy processes" if load else "")
    )
    console.print(rich_table(_table(found, earlier)))


def _table(found: Bench, earlier: dict[str, Any] | None) -> list[list[str]]:
    """A line per figure; with an earlier result, what it was and the ratio."""
    names = {
        "images/s": "images_per_second", "step, ms": "step_ms", "GFLOP an image": "gflop_per_image",
        "TFLOP/s": "tflops", "ceiling, TFLOP/s": "ceiling_tflops", "peak memory, GB": "peak_memory_gb",
    }  # fmt: skip
    values = found.as_dict()
    lines = [(title, values[name], earlier[name] if earlier else None) for title, name in names.items()]
    share = [(f"{n['tflops'] / n['ceiling_tflops']:.0%}" if n else "") for n in (values, earlier)]
    rows = [[title, f"{value:.2f}", *_compared(value, before)] for title, value, before in lines]
    rows.insert(5, ["share of the ceiling", share[0], *([share[1], ""] if earlier else [])])
    for part, value in found.parts_ms.items():
        before = earlier["parts_ms"].get(part) if earlier else None
        if value or before:
            rows.append([f"  {part}, ms", f"{value:.1f}", *_compared(value, before, digits=1)])
    return [["", "now", *(["earlier", "ratio"] if earlier else [])], *rows]


def _compared(value: float, before: float | None, digits: int = 2) -> list[str]:
    if before is None:
        return []
    return [f"{before:.{digits}f}", f"{value / before:.2f}" if before else ""]


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--against: cannot read '{path}': {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"--against: '{path}' is not JSON") from error
    if not isinstance(values, dict) or not {"images_per_second", "parts_ms", "ceiling_tflops"} <= values.keys():
        raise ConfigError(f"--against: '{path}' is no result of `smkd bench --json`")
    return values
