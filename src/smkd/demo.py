"""`smkd demo`: both phases on the embedded patterns, then a table, results.json and report.html."""

from __future__ import annotations

import json
import time
from pathlib import Path

from smkd import api
from smkd.config.run_config import RunConfig
from smkd.engine.log import console
from smkd.errors import ConfigError
from smkd.fewshot.accuracy import Result
from smkd.files import expanded, explained, written_aside
from smkd.report import write_report
from smkd.viz.measured import rich_table

NAMES = {
    "raw_pixels": "raw pixels",
    "random": "random weights",
    "phase1": "after phase 1",
    "phase2": "after phase 2",
}


def run_demo(out: Path, seed: int = 0) -> dict[str, list[Result]]:
    """Train both phases into `out`/phase1 and `out`/phase2, measure, and write the results there.

    The same call goes on with an interrupted demo.

    Returns:
        Results of 'raw_pixels', 'random', 'phase1' and 'phase2' on classes never seen.

    Raises:
        SmkdError: the folder cannot be used.
    """
    started = time.perf_counter()
    out = expanded(out)
    with explained(out, ConfigError, option="--out"):
        out.mkdir(parents=True, exist_ok=True)
    runs = [out / "phase1", out / "phase2"]
    first = api.resolve("patterns-pretrain", [f"out={runs[0]}", f"seed={seed}"])
    second = api.resolve("patterns-distill", [f"out={runs[1]}", f"seed={seed}", f"init={runs[0]}"])

    api.pretrain(first)
    api.distill(second)
    story = write_report(runs, out / "report.html")
    results = dict(zip(NAMES, [story.pixels, *(stage.results for stage in story.stages)], strict=True))
    with explained(out, ConfigError, option="--out"):
        _write_results(out / "results.json", results)
    console.print(rich_table(_table(results)))
    console.print(_protocol(second))
    console.print(f"{out}/report.html, {out}/results.json; {time.perf_counter() - started:.0f} s")
    console.print("next: smkd app   classifies your own photographs in the browser")
    return results


def _protocol(config: RunConfig) -> str:
    protocol = config.evaluation
    return (
        f"Embedded patterns, {protocol.split} classes never seen in training, {protocol.way}-way, {protocol.query} "
        f"queries a class, {protocol.episodes} episodes; accuracy in %, mean ± 95 % interval; seed {config.seed}."
    )


def _write_results(path: Path, results: dict[str, list[Result]]) -> None:
    numbers = {
        name: {str(row.shot): {"mean": row.mean, "ci95": row.ci95} for row in rows} for name, rows in results.items()
    }
    with written_aside(path) as aside:
        aside.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def _table(results: dict[str, list[Result]]) -> list[list[str]]:
    header = ["", *(f"{row.way}-way {row.shot}-shot" for row in results["phase2"])]
    return [header, *([NAMES[name], *(str(row) for row in rows)] for name, rows in results.items())]
