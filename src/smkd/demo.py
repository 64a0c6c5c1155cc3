"""`smkd demo`: both phases on the embedded patterns, then a table, results.json and report.html."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from smkd import api
from smkd.config.run_config import RunConfig
from smkd.data.datasets import open_split
from smkd.engine.log import console
from smkd.errors import ConfigError
from smkd.fewshot.accuracy import Result
from smkd.files import expanded, explained, written_aside
from smkd.viz import figures
from smkd.viz.figures import accuracy_bars, attention_grid, loss_curves, views_grid
from smkd.viz.measured import rich_table
from smkd.viz.report import ReportSection, write_report

LOSS_CURVES = (
    "They rise in steps with the teacher's temperature, which grows each epoch and softens the targets: a loss can "
    "fall no lower than the entropy of its targets. Accuracy on unseen classes is what tells progress."
)
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

    results = {
        "raw_pixels": api.evaluate("pixels", first),
        "random": api.evaluate(api.random_backbone(first), first),
    }
    api.pretrain(first)
    results["phase1"] = api.evaluate(api.load(runs[0]), first)
    api.distill(second)
    results["phase2"] = api.evaluate(api.load(runs[1]), second)

    with explained(out, ConfigError, option="--out"):
        _write_results(out / "results.json", results)
        _write_report(out / "report.html", results, first, second, runs)
    console.print(rich_table(_table(results)))
    console.print(_protocol(second))
    console.print(f"{out}/report.html, {out}/results.json; {time.perf_counter() - started:.0f} s")
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


def _write_report(
    path: Path, results: dict[str, list[Result]], first: RunConfig, second: RunConfig, runs: Sequence[Path]
) -> None:
    bars = {NAMES[name]: {row.shot: (row.mean, row.ci95) for row in rows} for name, rows in results.items()}
    train, unseen = open_split(first.data, "train"), open_split(first.data, "test")
    # one image of every eighth training class, one of every other unseen class
    of_train = range(0, len(train), 8 * len(train) // len(train.class_names))
    of_test = range(0, len(unseen), 2 * len(unseen) // len(unseen.class_names))
    backbones = {
        "random": api.random_backbone(first),
        "phase 1": api.load(runs[0]),
        "phase 2": api.load(runs[1]),
    }
    sections = [
        ReportSection(
            "Accuracy on unseen classes",
            _protocol(second),
            _table(results),
            [(accuracy_bars(bars), "Accuracy and interval")],
        ),
        ReportSection(
            "Which classes are hard",
            f"After phase 2, {results['phase2'][-1].way}-way {results['phase2'][-1].shot}-shot.",
            figures=[
                (figures.episode_distribution(results["phase2"][-1]), "Accuracy of single episodes"),
                (
                    figures.confusion(results["phase2"][-1]),
                    "Queries of a class (row) given to another (column)",
                ),
            ],
        ),
        ReportSection(
            "Losses", LOSS_CURVES, figures=[(loss_curves({"phase 1": runs[0], "phase 2": runs[1]}), "Weighted terms")]
        ),
        ReportSection(
            "What the student sees",
            "Training patterns with their views; dark patches are hidden from the student, never from the teacher.",
            figures=[(views_grid(train, first, list(of_train)), "Image, global views with masks, local views")],
        ),
        ReportSection(
            "Where the networks look",
            "Unseen patterns and the last block's [CLS] attention over their patches, heads averaged.",
            figures=[(attention_grid(backbones, unseen, first, list(of_test)), "Attention of [CLS]")],
        ),
        ReportSection("Commands", preformatted=f"smkd demo -o {path.parent}\nsmkd eval {runs[1]}"),
    ]
    write_report(
        path,
        "smkd demo",
        "Two phases on embedded patterns, from images to accuracy on unseen classes.",
        sections,
    )
