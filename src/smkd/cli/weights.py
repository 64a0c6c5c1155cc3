"""Verbs that bring weights and settings of other projects in, and take a backbone elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smkd.cli.fewshot import AttentionHeads, NetworkChoice
from smkd.cli.output import CHECKPOINT, EXPORT, RECIPE, say, write_text
from smkd.cli.verb import verb
from smkd.errors import ConfigError


@verb()
def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="File, folder, URL#sha256=..., or hf:owner/name of the Hugging Face Hub."
        ),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Checkpoint to write (.pt), or a folder for it."), CHECKPOINT
    ],
    network: Annotated[
        NetworkChoice | None, typer.Option(help="Which of the file's two goes into both of ours; none keeps both.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="Settings that weights do not decide, such as the data.")
    ] = "folder-pretrain",
    heads: AttentionHeads = None,
    allow_missing: Annotated[
        list[str] | None,
        typer.Option("--allow-missing", help="Backbone weight that the file may lack; may be repeated."),
    ] = None,
) -> None:
    """Turn weights of another project into a checkpoint that every verb takes; nothing in them is executed."""
    from smkd.config.loading import resolve
    from smkd.engine import checkpoint
    from smkd.engine.log import console
    from smkd.engine.restore import is_ours
    from smkd.weights import fetch, load, read

    target = out if out.suffix in (".pt", ".pth") else out / "checkpoints" / "last.pt"
    if target.exists():
        raise ConfigError(f"'{target}' exists; choose another -o")
    base = resolve(recipe)
    file = fetch.locate_weights(source)
    content = read.read_weights(file)
    if is_ours(content):
        raise ConfigError(f"'{source}' is a checkpoint of smkd already; every verb takes it as it is")
    state = load.imported(
        content, source, base, network=None if network is None else network.value,
        heads=heads, beside=file, allow_missing=allow_missing or (),
    )  # fmt: skip
    for line in state[load.MARK]:
        console.print(line)
    checkpoint.save_checkpoint(state, target)
    console.print(f"written: {target}")


@verb()
def import_args(
    source: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Command line, args file, or checkpoint of the published code."),
    ],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Recipe to write; none prints it."), RECIPE] = None,
) -> None:
    """Turn a command line of the published code into a recipe; what has no meaning here goes to standard error."""
    from smkd.reference.translate import translate

    made = translate(source)
    if out is not None and out.exists():
        raise ConfigError(f"'{out}' exists; choose another -o")
    for note in made.notes:
        say(note, err=True)
    if out is None:
        typer.echo(made.text, nl=False)
    else:
        write_text(out, made.text, "-o")


@verb()
def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CLASSIFIER",
            help="Run folder, checkpoint, weights of another project, hf:owner/name of the Hub, or file of `smkd fit`.",
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORM",
            help="timm, safetensors, onnx, torch-export, or hub: weights and model card. A classifier has the last 3.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="File or folder to write; none takes the run's name."), EXPORT
    ] = None,
    network: Annotated[NetworkChoice, typer.Option(help="Which of a checkpoint's two.")] = NetworkChoice.teacher,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side in pixels of the square images that it is for.")
    ] = None,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="onnx, torch-export: images of any whole number of patches.")
    ] = False,
    repo: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="hub: also push to this repository.")] = None,
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="Licence of the weights, such as apache-2.0.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="Settings of weights that bring none, such as the normalisation.")
    ] = "folder-pretrain",
    heads: AttentionHeads = None,
    reject: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Programs of classifiers: what `smkd predict` has, in the program."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is there, even if it is no former export.")
    ] = False,
) -> None:
    """Write a backbone or a classifier for other programs; these are compared with PyTorch before they are kept."""
    from smkd.engine.log import console
    from smkd.publishing import write

    written = write.export(
        run, to, out, network=network.value, image_size=image_size, dynamic_size=dynamic_size, repository=repo,
        license=license, recipe=recipe, overwrite=overwrite, heads=heads, reject=reject,
    )  # fmt: skip
    for line in written.report:
        console.print(line)
    console.print(f"written: {written.path}")
