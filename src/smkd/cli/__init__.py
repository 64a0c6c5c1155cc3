"""The command line. It only wires: every verb is a few calls into the package, imported when needed."""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from smkd.cli import backbone, classifier, classify, data, fewshot, plot, training, weights
from smkd.cli.output import say
from smkd.errors import SmkdError
from smkd.processes import show_warning

VERBS: tuple[tuple[str, Callable[..., None], str], ...] = (
    ("pretrain", training.pretrain, "folder-pretrain data=photos out=runs/one epochs=100"),
    ("distill", training.distill, "folder-distill data=photos init=runs/one out=runs/two"),
    ("adapt", training.adapt, "photos -o runs/mine --backbone dinov2-small"),
    ("features", fewshot.features, "runs/two --split test -o test.h5"),
    ("eval", fewshot.evaluate, "runs/two --head ridge --shot 1 --shot 5"),
    ("compare", fewshot.compare, "runs/one runs/two"),
    ("fit", classify.fit, "photos -o clf.smkd"),
    ("predict", classify.predict, "clf.smkd holiday --reject 0.5"),
    ("score", classifier.score, "clf.smkd labelled --unknown other --report page.html"),
    ("add", classifier.add, "clf.smkd owl -o new.smkd"),
    ("explain", classifier.explain, "clf.smkd new.jpg -o why.html"),
    ("index", classify.index, "photos -o photos.smkd"),
    ("search", classify.search, "photos.smkd new.jpg"),
    ("app", classify.app, "photos --open"),
    ("backbones", backbone.list_backbones, ""),
    ("import", weights.import_, "published.pth -o net.pt"),
    ("import-args", weights.import_args, "args.txt"),
    ("export", weights.export, "clf.smkd --to onnx -o clf.onnx"),
    ("demo", training.demo, "-o demo"),
    ("bench", training.bench, "mini-imagenet-distill batch_size=8"),
    ("runs", training.runs, "runs"),
    ("watch", training.watch, "runs/one"),
    ("report", plot.report, "runs/one runs/two -o report.html"),
)
"""Name, function, and the words of an example, which its help shows."""


class _Plain:
    """A command whose help shows flags without a type."""

    def get_params(self, ctx: Any) -> Any:
        """Options and arguments."""
        params = super().get_params(ctx)  # type: ignore[misc]
        for each in params:
            if getattr(each, "is_flag", False):
                each.metavar = ""
        return params


class Command(_Plain, TyperCommand):
    """A verb."""


class Group(_Plain, TyperGroup):
    """Verbs below a word."""


app = typer.Typer(
    name="smkd", cls=Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Few-shot image classification with Vision Transformers, in two phases.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
for name, function, example in VERBS:
    app.command(name, epilog=f"Example: smkd {name} {example}".rstrip())(function)
app.add_typer(training.recipes_app, name="recipes", cls=Group, invoke_without_command=True)
for name, function, example in plot.PICTURES:
    plot.plot_app.command(name, epilog=f"Example: smkd plot {name} {example}")(function)
app.add_typer(plot.plot_app, name="plot", cls=Group)
data.data_app.command("verify")(data.verify)
data.data_app.command("stats")(data.stats)
app.add_typer(data.data_app, name="data", cls=Group)
for verbs in (app, training.recipes_app, plot.plot_app, data.data_app):
    for each in verbs.registered_commands:
        each.cls = Command


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


def main() -> None:
    """Entry point: a user's mistake is one line on standard error and exit code 2 (75 and above: a run was stopped)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # what a terminal or file cannot encode is escaped
            stream.reconfigure(errors="backslashreplace")
    # or Python would look for cycles in all of PyTorch before it ends, for half a second
    atexit.register(gc.freeze)
    try:
        _main()
    finally:
        _flush()


def _flush() -> None:
    """Empty the buffers now: at the end of the process, a reader that went away would be a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fails_first() -> bool:
    """Whether no other process of a training said why it failed."""
    from smkd import distributed

    return distributed.fails_first()


def _main() -> None:
    debug = "--debug" in sys.argv
    # accepted anywhere on the line
    sys.argv = [sys.argv[0], *(word for word in sys.argv[1:] if word != "--debug")]
    warnings.showwarning = show_warning
    code = SmkdError.exit_code
    try:
        app()
    except SmkdError as error:
        message, code = str(error), error.exit_code
        if debug:
            raise
    except OSError as error:  # a full disk, a folder that may not be written
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        if debug:
            raise
    else:
        return
    if not os.environ.get("RANK") or _fails_first():
        say(f"smkd: {message}", err=True)
    raise SystemExit(code)
