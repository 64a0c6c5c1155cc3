"""Which backbone a verb works with, and `smkd backbones`, which lists those that have a name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from smkd.cli.output import say_table
from smkd.cli.verb import verb
from smkd.files import expanded
from smkd.processes import is_first_rank

if TYPE_CHECKING:
    from smkd.weights.catalogue import NamedBackbone

BackboneOption = Annotated[
    str | None,
    typer.Option(
        "--backbone", metavar="NAME_OR_FILE", show_default="SMKD_BACKBONE, or dinov2-small",
        help="Name of `smkd backbones`, run folder, file, weights of another project, hf:owner/name, or 'pixels'.",
    ),
]  # fmt: skip


def chosen(backbone: str | None) -> str:
    """The backbone to work with: the one that is given, or the user's default, which is said in a line.

    So is what is about to be fetched.
    """
    from smkd.config.user import default_backbone
    from smkd.weights.catalogue import find

    source, why = backbone, ""
    if source is None:
        default = default_backbone()
        source = str(expanded(default.source))
        why = f", {f'as {default.told_by} says' if default.told_by else 'as no --backbone is given'}"
    known = find(source)
    if is_first_rank() and (why or (known is not None and not known.here)):
        typer.echo(f"backbone: {known or source}{why}{'' if known is None else f'; {_state(known)}'}")
    return source


def _state(known: NamedBackbone) -> str:
    if known.here:
        return "already here"
    return "to be fetched once" if known.repository else "to be fetched by hand"


@verb()
def list_backbones() -> None:
    """List the published backbones that --backbone and init= take by name; which of them are here."""
    from smkd.weights.catalogue import CATALOGUE

    rows = [["name", "parameters", "patch", "licence", "size", "here", "from"]]
    for known in CATALOGUE.values():
        rows.append([
            known.name, f"{known.parameters:g} M", str(known.model.patch_size),
            known.licence + " (gated)" * known.gated, "-" if known.megabytes is None else f"{known.megabytes} MB",
            "yes" if known.here else "no", known.page,
        ])  # fmt: skip
    say_table(rows)
    unseen = ", ".join(known.name for known in CATALOGUE.values() if not known.seen)
    typer.echo(f"\nAll but {unseen}\nhave seen images of the classes that miniImageNet and tieredImageNet test on.")
