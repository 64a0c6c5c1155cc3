"""`smkd adapt`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smkd.cli.fewshot import AttentionHeads
from smkd.cli.output import RUN
from smkd.cli.training import STOPPED, Overrides
from smkd.cli.verb import is_first_rank, verb

if TYPE_CHECKING:
    from smkd.adaptation import Adapted


@verb(STOPPED)
def adapt(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Labelled images, such as a folder of class folders.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder."), RUN],
    backbone: Annotated[
        str,
        typer.Option(
            metavar="RUN_OR_FILE", help="Run folder, checkpoint, weights of another project, or hf:owner/name."
        ),
    ],
    heads: AttentionHeads = None,
    settings: Overrides = None,
) -> None:
    """Phase 2 on your own few images from any backbone, and whether held-out images gain. The same command resumes."""
    from smkd.adaptation import adapt

    adapted = adapt(data, out, backbone, settings or [], heads)
    if is_first_rank():
        for line in [*report(adapted), *next_commands(adapted, data)]:
            typer.echo(line)


def report(adapted: Adapted) -> list[str]:
    """What came of it, a line each."""
    if adapted.epoch:
        lines = [f"best: after epoch {adapted.epoch}, in {adapted.run}"]
    else:
        lines = [f"adapting did not help: the backbone as it was is the best, and is what {adapted.run} keeps"]
    lines += _classes(adapted) if adapted.held_out == "classes" else _images(adapted)
    if adapted.split == "val":
        lines.append(
            "there is no test split: these also chose the checkpoint, which makes them look better than new ones"
        )
    return lines


def next_commands(adapted: Adapted, data: str) -> list[str]:
    """What to type now."""
    run = shlex.quote(str(adapted.run))
    folder = Path(data) / "train" if (Path(data) / "train").is_dir() else Path(data)
    own = adapted.held_out == "images" and folder.is_dir()
    support = shlex.quote(str(folder)) if own else "SUPPORT_DIR"
    return [f"next: smkd fit {support} -o clf.smkd --backbone {run}", "      smkd predict clf.smkd IMAGE..."]


def _classes(adapted: Adapted) -> list[str]:
    from smkd.fewshot.accuracy import Result, compare_results

    lines = []
    for before, after in zip(adapted.before, adapted.after, strict=True):
        assert isinstance(before, Result)
        assert isinstance(after, Result)
        line = f"{len(before.class_names)} held-out classes, {before.way}-way {before.shot}-shot: {before} %"
        if adapted.epoch:
            change = compare_results(before, after)
            line += f" -> {after} %, {change.difference:+.2f} ± {change.ci95:.2f} on the same episodes"
        lines += [line, before.without] if before.without else [line]
    return lines


def _images(adapted: Adapted) -> list[str]:
    import numpy as np

    from smkd.fewshot import intervals

    before, after = np.asarray(adapted.before), np.asarray(adapted.after)

    def shown(right: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> str:
        low, high = intervals.of_share(int(right.sum()), len(right))
        return f"{100 * right.mean():.1f} % ({100 * low:.1f} to {100 * high:.1f})"

    line = f"{len(before)} held-out images: {shown(before)}"
    if adapted.epoch:
        gain = intervals.of_paired_gain(before, after)
        line += f" -> {shown(after)}, {gain.points:+.1f} ({gain.low:+.1f} to {gain.high:+.1f}) on the same images"
    return [line]
