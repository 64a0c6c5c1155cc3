"""`smkd data`: list, describe, prepare and check data sets."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from smkd.cli.output import JSON, PREPARED, SHEETS, say, write_json
from smkd.cli.verb import verb
from smkd.errors import ConfigError, DataError
from smkd.files import explained, written_aside
from smkd.progress import bars, shown

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
        say(f"{name:{width}}  {classes} classes, {sum(split.images for split in counts):,} images: {facts.needs}")


@data_app.command()
@verb()
def info(name: Name) -> None:
    """Splits, sources and licence of one data set."""
    from smkd.prepare.registry import benchmark

    facts = benchmark(name)
    say(f"{facts.title} ({facts.paper})")
    for split, size in facts.counts.items():
        groups = len({entry.group for entry in facts.classes if entry.split == split and entry.group})
        say(f"  {split:5}  {size.classes:5,} classes  {size.images:9,} images{f'  {groups} groups' if groups else ''}")
    for line in (f"Split: {facts.rule}.", f"Needs {facts.needs}.", f"Licence: {facts.licence}"):
        say(line)
    for download in facts.downloads:
        say(f"File: {download.url}  {download.digest}")
    for page in sorted({download.page for download in facts.downloads}):
        say(f"Page: {page}")


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
    from smkd.prepare.run import PrepareRequest
    from smkd.prepare.run import prepare as run

    request = PrepareRequest(name, out, tuple(archive or ()), source, lists, _size(size), link, processes)
    with bars() as on_progress:
        digest = run(request, on_progress, lambda line: say(f"warning: {line}", err=True))
    say(f"prepared {name} in {out} (dataset.json sha256 {digest})")


def _size(text: str | None) -> Size | None:
    if text is None:
        return None
    if text == "original":
        original: Literal["original"] = "original"
        return original
    if not text.isdecimal():
        raise DataError(f"--size {text}: give a number of pixels, or 'original'")
    return int(text)


if TYPE_CHECKING:
    from smkd.data.color import Channels
    from smkd.data.verify import Expected, Report
    from smkd.data.verify_support import SupportReport

SHOWN = 20
"""Names of a list that are printed; all of them are in the JSON file."""
BAR = 40

Root = Annotated[str, typer.Argument(metavar="ROOT", help="Folder, table, tar shards, or hf:NAME.")]
SplitSeed = Annotated[int, typer.Option(min=0, help="Seed of the split by class, as data.split_seed.")]
SplitFile = Annotated[Path | None, typer.Option(help="CSV (class,split), as data.split_file.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column with the class, as data.label_column.")]
Processes = Annotated[int | None, typer.Option(min=1, help="Processes that read; one for each core if not given.")]


class Purpose(StrEnum):
    """What images are to be used for."""

    training = "training"
    fit = "fit"


@verb()
def verify(
    root: Root,
    purpose: Annotated[
        Purpose,
        typer.Option("--for", help="training: splits, leakage, sizes. fit: what `smkd fit` needs."),
    ] = Purpose.training,
    dataset: Annotated[str | None, typer.Option(help="What it should be, such as cifar-fs; else dataset.json.")] = None,
    crop: Annotated[int, typer.Option(min=1, help="Side in pixels that images should have at least.")] = 224,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything found here."), JSON] = None,
    sheets: Annotated[Path | None, typer.Option(help="Folder for a contact sheet (PNG) of each split."), SHEETS] = None,
    processes: Processes = None,
    split_seed: SplitSeed = 0,
    split_file: SplitFile = None,
    label_column: LabelColumn = None,
) -> None:
    """Check counts, unreadable images, leakage between splits and sizes; exit code 1 if something is wrong."""
    if purpose is Purpose.fit:
        of_training = {
            "--dataset": dataset, "--sheets": sheets, "--split-seed": split_seed or None, "--split-file": split_file,
            "--label-column": label_column,
        }  # fmt: skip
        for option, value in of_training.items():
            if value is not None:
                raise ConfigError(f"{option} has no effect with --for fit; leave it out")
        _verify_support(Path(root), json_file, processes)
        return
    from smkd.data.datasets import dataset_spec
    from smkd.data.sources import open_dataset, opened_once
    from smkd.data.verify import verify as check
    from smkd.prepare.registry import BENCHMARKS, published_repeats
    from smkd.processes import default_jobs

    name = dataset or _prepared_name(root) or "folder"
    spec = dataset_spec(name)
    source = open_dataset(root, split_seed=split_seed, split_file=split_file, label_column=label_column)
    say(source.description)  # at once: looking at every image may take a while
    expected = _published(name) if name in BENCHMARKS else None
    with opened_once():
        report = check(
            source, name, spec, crop=crop, expected=expected, published_repeats=published_repeats(name),
            prepared=_prepared_files(root), jobs=processes or default_jobs(), track=shown,
        )  # fmt: skip
        if json_file is not None:
            write_json(json_file, report.as_dict())
        if sheets is not None:
            from smkd.viz.contact import contact_sheet

            with explained(sheets, ConfigError, option="--sheets"), written_aside(sheets, folder=True) as aside:
                for split in report.splits:
                    sheet = contact_sheet(source.open(split), f"{Path(root).name} {split}")
                    sheet.save(aside / f"{split}.png")
    for line in report_lines(report):
        say(line)
    if sheets is not None:
        for split in report.splits:
            say(f"contact sheet: {sheets / f'{split}.png'}")
    if report.problems:
        raise typer.Exit(1)


def _verify_support(folder: Path, json_file: Path | None, processes: int | None) -> None:
    from smkd.classify.pictures import support_images
    from smkd.data.verify_support import verify_support
    from smkd.processes import default_jobs

    images = support_images(folder)
    report = verify_support(images, str(folder), processes or default_jobs(), shown)
    if json_file is not None:
        write_json(json_file, report.as_dict())
    for line in support_lines(report):
        typer.echo(line)
    if report.problems:
        raise typer.Exit(1)


@verb()
def stats(
    root: Root,
    processes: Processes = None,
    split_seed: SplitSeed = 0,
    split_file: SplitFile = None,
    label_column: LabelColumn = None,
) -> None:
    """Mean and standard deviation of each channel over all pixels of the training images."""
    from smkd.data.inspect import image_statistics
    from smkd.data.sources import open_dataset
    from smkd.processes import default_jobs

    source = open_dataset(root, split_seed=split_seed, split_file=split_file, label_column=label_column)
    say(source.description)
    found = image_statistics(source.open("train"), processes or default_jobs(), shown)
    left_out = f", {found.unreadable} unreadable ones left out" if found.unreadable else ""
    say(f"train: {found.images} images, {found.pixels} pixels{left_out}; red, green, blue on the 0-1 scale")
    say(f"mean  {_numbers(found.mean)}")
    say(f"std   {_numbers(found.std)}")
    mean, std = (",".join(f"{value:.4f}" for value in values) for values in (found.mean, found.std))
    say(f"for a run:    data.mean=[{mean}] data.std=[{std}]")
    say(f"for DATASETS: DatasetSpec(({mean.replace(',', ', ')}), ({std.replace(',', ', ')}))")


def report_lines(report: Report) -> list[str]:
    """A report as text, without its first line, the source."""
    lines = ["", f"{'split':<7}{'classes':>8}{'images':>9}  {'per class':<12}shorter side (median)"]
    for split, facts in report.splits.items():
        low, high = facts.per_class
        of_class = str(low) if low == high else f"{low}-{high}"
        side = facts.shorter_side
        sides = "-" if side is None else f"{side[0]}-{side[2]} ({side[1]})"
        lines.append(f"{split:<7}{facts.classes:>8}{facts.images:>9}  {of_class:<12}{sides}")
    for split, facts in report.splits.items():
        lines += ["", f"{split}, images by shorter side in pixels:"]
        most = max(facts.sizes.values(), default=1)
        lines += [f"  {name:>12}  {n:>8}  {'#' * max(1, BAR * n // most)}" for name, n in facts.sizes.items()]
    if report.mean is not None and report.std is not None:
        lines += ["", "channels (red, green, blue, 0-1 scale)   mean                   std"]
        lines.append(f"  {'of the training images':<38} {_numbers(report.mean)}   {_numbers(report.std)}")
        used = f"used for {report.dataset}"
        lines.append(f"  {used:<38} {_numbers(report.used_mean)}   {_numbers(report.used_std)}")
    unreadable = [line for facts in report.splits.values() for line in facts.unreadable]
    lines += _section("unreadable", unreadable)
    lines += _section("the same picture in different splits", [" = ".join(group) for group in report.leaked])
    lines += _section("the same picture more than once in a split", [" = ".join(group) for group in report.repeated])
    lines += _section("known of the published benchmark to be the same picture", [" = ".join(g) for g in report.known])
    lines += ["", *(f"warning: {line}" for line in report.warnings), *(f"problem: {line}" for line in report.problems)]
    total = sum(facts.images for facts in report.splits.values())
    return lines if report.problems else [*lines, f"no problems found in {total} images"]


def support_lines(report: SupportReport) -> list[str]:
    """A report on a support folder as text."""
    counts = list(report.classes.values())
    lines = [f"{report.source}: {len(counts)} classes, {sum(counts)} images, {min(counts)} to {max(counts)} per class"]
    lines += _section("unreadable", report.unreadable)
    lines += _section("the same picture in different classes", [" = ".join(group) for group in report.shared])
    lines += _section("the same picture more than once in a class", [" = ".join(group) for group in report.repeated])
    lines += ["", *(f"warning: {line}" for line in report.warnings), *(f"problem: {line}" for line in report.problems)]
    return lines if report.problems else [*lines, f"nothing keeps `smkd fit` from {sum(counts)} images"]


def _section(title: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = [f"  and {len(names) - SHOWN} more (--json lists all)"] if len(names) > SHOWN else []
    return ["", f"{title}:", *(f"  {name}" for name in names[:SHOWN]), *more]


def _numbers(values: Channels) -> str:
    return "  ".join(f"{value:.4f}" for value in values)


def _prepared_name(root: str) -> str | None:
    """Name in the `dataset.json` of a prepared folder, if there is one."""
    from smkd.prepare.manifest import FILE_NAME, read_manifest

    return read_manifest(Path(root)).identity.name if (Path(root) / FILE_NAME).is_file() else None


def _prepared_files(root: str) -> dict[str, str] | None:
    """SHA-256 of each file that the folder's `dataset.json` names, if there is one."""
    from smkd.prepare.manifest import FILE_NAME, read_manifest

    if not (Path(root) / FILE_NAME).is_file():
        return None
    return {name: digest for name, (_, digest) in read_manifest(Path(root)).files.items()}


def _published(name: str) -> Expected:
    from smkd.prepare.registry import class_list

    counts: dict[str, dict[str, int]] = {}
    for entry in class_list(name):
        counts.setdefault(entry.split, {})[entry.folder] = entry.images
    return counts
