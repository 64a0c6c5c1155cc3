"""Verbs that bring weights and settings of other projects in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smkd.cli.fewshot import AttentionHeads, Network
from smkd.cli.output import CHECKPOINT, RECIPE, write_text
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
        Network | None, typer.Option(help="Which of the file's two goes into both of ours; none keeps both.")
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
    from smkd.engine.restore import is_ours
    from smkd.engine.runlog import console
    from smkd.interop import fetching, load, reading

    target = out if out.suffix in (".pt", ".pth") else out / "checkpoints" / "last.pt"
    if target.exists():
        raise ConfigError(f"'{target}' exists; choose another -o")
    base = resolve(recipe)
    file = fetching.locate(source)
    content = reading.read(file)
    if is_ours(content):
        raise ConfigError(f"'{source}' is a checkpoint of smkd already; every verb takes it as it is")
    state = load.imported(
        content, source, base, network=None if network is None else network.value,
        heads=heads, beside=file, allow_missing=allow_missing or (),
    )  # fmt: skip
    for line in state[load.MARK]:
        console.print(line, markup=False)
    checkpoint.save(state, target)
    console.print(f"written: {target}", markup=False)


@verb()
def import_args(
    source: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Command line, args file, or checkpoint of the published code."),
    ],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Recipe to write; none prints it."), RECIPE] = None,
) -> None:
    """Turn a command line of the published code into a recipe; what has no meaning here goes to standard error."""
    from smkd.interop.args import translate

    made = translate(source)
    if out is not None and out.exists():
        raise ConfigError(f"'{out}' exists; choose another -o")
    for note in made.notes:
        typer.echo(note, err=True)
    if out is None:
        typer.echo(made.text, nl=False)
    else:
        write_text(out, made.text, "-o")
