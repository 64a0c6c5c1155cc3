"""Accuracies that a run's own files know of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smkd.config.schema import RunConfig
from smkd.interop import jsontext
from smkd.interop.header import Score

NO_ACCURACY = ("kind", "step", "time", "epoch", "accuracy")
"""What a validation's record holds besides an accuracy per number of shots."""


def run_of(file: Path) -> Path | None:
    """The run folder that a checkpoint is in; None if it is in none."""
    run = file.parent.parent
    return run if file.parent.name == "checkpoints" and (run / "config.yaml").is_file() else None


def found_scores(run: Path, config: RunConfig, *, digest: str, step: int) -> tuple[Score, ...]:
    """What was measured with one checkpoint of a run.

    Args:
        run: its folder. Validations are in `metrics.jsonl`; evaluations are the files of `smkd eval --json` in the
            folder or one below it, as far as they were made from this checkpoint.
        config: of the run.
        digest: SHA-256 of the checkpoint's file.
        step: of the checkpoint.
    """
    scores = [*_validations(run / "metrics.jsonl", config, step), *_evaluations(run, digest)]
    return tuple(dict.fromkeys(scores))


def _validations(file: Path, config: RunConfig, step: int) -> Iterator[Score]:
    protocol = config.validation
    conditions = f"{protocol.head}, {_queries(protocol.query)}, {protocol.episodes} episodes, " + (
        f"resize {protocol.resize}, crop {protocol.crop}"
    )
    for _, record in jsontext.records(file) if file.is_file() else ():
        if record is not None and record.get("kind") == "validation" and record.get("step") == step:
            for name, value in record.items():
                if name not in NO_ACCURACY and _is_number(value):
                    yield Score(name, float(value), None, config.data.name, protocol.split, conditions)


def _evaluations(run: Path, digest: str) -> Iterator[Score]:
    for file in sorted([*run.glob("*.json"), *run.glob("*/*.json")]):
        results = _object(file.read_text(encoding="utf-8", errors="replace")).get("results")
        for record in results if isinstance(results, list) else ():
            if isinstance(record, dict) and record.get("checkpoint_sha256") == digest:
                if not all(_is_number(record.get(key)) for key in ("way", "shot", "mean", "ci95")):
                    continue
                conditions = f"{record.get('head')}, {_queries(record.get('query'))}, " + (
                    f"{record.get('episodes')} episodes, {record.get('transform')}"
                )
                yield Score(
                    f"{record['way']}-way {record['shot']}-shot", float(record["mean"]), float(record["ci95"]),
                    str(record.get("dataset")), str(record.get("split")), conditions,
                )  # fmt: skip


def _queries(query: object) -> str:
    return "all other images as queries" if query == "all" else f"{query} queries a class"


def _object(text: str) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    try:
        value = jsontext.parsed(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
