"""`smkd data`: list and describe the data sets, and prepare them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from smkd.cli.output import PREPARED
from smkd.cli.verb import verb
from smkd.errors import DataError
from smkd.progress import bars

if TYPE_CHECKING:
    from smkd.prepare.run import Size

data_app = typer.Typer(help="Prepare the benchmarks, and look at data sets.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Data set (see `smkd data list`).")]


@data_app.command("list")
@verb()
def list_datasets() -> None:
    """List the data sets that can be prepared."""
    from smkd.prepare.registry import BENCHMARKS

    width = max(map(len, BENCHMARKS))
    for name, facts in BENCHMARKS.items():
        counts = facts.counts.values()
        classes = "/".join(f"{split.classes:,}" for split in counts)
        typer.echo(
            f"{name:{width}}  {classes} classes, {sum(split.images for split in counts):,} images: {facts.needs}"
        )


@data_app.command()
@verb()
def info(name: Name) -> None:
    """Splits, sources and licence of one data set."""
    from smkd.prepare.registry import benchmark

    facts = benchmark(name)
    typer.echo(f"{facts.title} ({facts.paper})")
    for split, size in facts.counts.items():
        groups = len({entry.group for entry in facts.classes if entry.split == split and entry.group})
        typer.echo(
            f"  {split:5}  {size.classes:5,} classes  {size.images:9,} images{f'  {groups} groups' if groups else ''}"
        )
    typer.echo(f"Split: {facts.rule}.\nNeeds {facts.needs}.\nLicence: {facts.licence}")
    for download in facts.downloads:
        typer.echo(f"File: {download.url}  {download.digest}")
    for page in sorted({download.page for download in facts.downloads}):
        typer.echo(f"Page: {page}")


@data_app.command()
@verb("stopped; the same command goes on from here")
def prepare(
    name: Name,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="ROOT", help="New folder for train/, val/ and test/."), PREPARED
    ],
    archive: Annotated[
        list[Path] | None, typer.Option(help="The archive, if it is not to be downloaded; Omniglot has two.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="ILSVRC-12's train folder or tar; or a copy of miniImageNet.")
    ] = None,
    lists: Annotated[Path | None, typer.Option(help="Folder of miniImageNet's train.csv, val.csv, test.csv.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Resize to a square of so many pixels, or 'original'. miniImageNet: 480.")
    ] = None,
    link: Annotated[bool, typer.Option("--link", help="tieredImageNet: links to the source, no copies.")] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that write; one for each core if not given.")
    ] = None,
) -> None:
    """Turn published archives into train/, val/ and test/. The same command goes on after an interruption."""
    from smkd.prepare.run import Request
    from smkd.prepare.run import prepare as run

    request = Request(name, out, tuple(archive or ()), source, lists, _size(size), link, processes)
    with bars() as on_progress:
        digest = run(request, on_progress, lambda line: typer.echo(f"warning: {line}", err=True))
    typer.echo(f"prepared {name} in {out} (dataset.json sha256 {digest})")


def _size(text: str | None) -> Size | None:
    if text is None:
        return None
    if text == "original":
        original: Literal["original"] = "original"
        return original
    if not text.isdecimal():
        raise DataError(f"--size {text}: give a number of pixels, or 'original'")
    return int(text)
