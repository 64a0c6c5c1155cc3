"""`smkd bench`: how fast training is on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smkd.cli.output import JSON, write_json
from smkd.cli.verb import verb
from smkd.errors import ConfigError

if TYPE_CHECKING:
    from smkd.engine.bench import Bench


@verb()
def bench(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name or YAML file.")] = "mini-imagenet-distill",
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings, such as batch_size=8 data=photos.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 10,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result here."), JSON] = None,
    against: Annotated[Path | None, typer.Option(help="Earlier --json file to print ratios to.")] = None,
) -> None:
    """Images a second, where a step's time goes, FLOPs, share of the machine's ceiling, memory.

    Without data= the views are noise on the device; with it, images go through the loader.
    """
    from smkd import api
    from smkd.engine.bench import bench as measure
    from smkd.engine.runlog import console
    from smkd.viz.tables import rich_table

    earlier = None if against is None else _read(against)
    found = measure(api.resolve(recipe, settings or []), steps)
    if json_file is not None:
        write_json(json_file, found.as_dict())
    console.print(
        f"{found.recipe}, batch {found.batch_size}, {found.parameters / 1e6:.1f} M parameters, {found.data}; "
        f"{found.device}, {found.precision}, PyTorch {found.torch}, {found.threads} threads"
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
