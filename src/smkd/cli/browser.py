"""The verb `app`: the page in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smkd.cli.classify import Backbone, Recipe
from smkd.cli.fewshot import AttentionHeads
from smkd.cli.verb import verb


@verb()
def app(
    support: Annotated[
        Path | None,
        typer.Argument(metavar="[SUPPORT_DIR]", help="Folder with a folder of images per class, to begin with."),
    ] = None,
    backbone: Backbone = "pixels",
    recipe: Recipe = None,
    heads: AttentionHeads = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Make a classifier from a few photographs in the browser, and see why it answers what it does."""
    from smkd.app.serve import check_gradio, check_port, serve
    from smkd.classify.encoder import open_encoder

    check_gradio()
    check_port(host, port)
    encoder = open_encoder(backbone, recipe, heads=heads)
    for line in encoder.report:
        typer.echo(line)
    about = "No network, only plain colours: `--backbone` gives one."
    if encoder.backbone is not None:
        size = sum(weight.numel() for weight in encoder.backbone.parameters()) / 1e6
        about = f"Backbone: {backbone}, {size:.1f} M parameters, images of {encoder.config.crop} pixels."
    serve(encoder, about, support, host, port, open_, typer.echo)
