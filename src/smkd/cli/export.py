"""The verb that takes a backbone elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smkd.cli.fewshot import AttentionHeads, Network
from smkd.cli.output import EXPORT
from smkd.cli.verb import verb


@verb()
def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="Run folder, checkpoint, weights of another project, or hf:owner/name of the Hub."
        ),
    ],
    to: Annotated[
        str, typer.Option(metavar="FORM", help="timm, safetensors, onnx, torch-export, or hub: weights and model card.")
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="File or folder to write; none takes the run's name."), EXPORT
    ] = None,
    network: Annotated[Network, typer.Option(help="Which of a checkpoint's two.")] = Network.teacher,
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
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is there, even if it is no former export.")
    ] = False,
) -> None:
    """Write a backbone for other libraries; programs are compared with PyTorch before they are kept."""
    from smkd import publishing
    from smkd.engine.runlog import console

    written = publishing.export(
        run, to, out, network=network.value, image_size=image_size, dynamic_size=dynamic_size, repository=repo,
        license=license, recipe=recipe, overwrite=overwrite, heads=heads,
    )  # fmt: skip
    for line in written.report:
        console.print(line, markup=False)
    console.print(f"written: {written.path}", markup=False)
