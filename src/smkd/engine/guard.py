"""Steps that were skipped because a loss or a gradient was not finite: which, why, and how many in a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smkd import distributed
from smkd.engine.log import RunLog
from smkd.engine.step import StepResult


class Guard:
    """Keeps what steps report on the device until a line of the log is due.

    Args:
        max_skips: so many in a row end the run.
        images_of: numbers of the images of a step, over all processes.
    """

    def __init__(self, max_skips: int, images_of: Callable[[int], list[int]]) -> None:
        self.max_skips, self.images_of = max_skips, images_of
        self.pending: list[tuple[int, Tensor, dict[str, Tensor]]] = []
        self.row = self.longest = 0

    @property
    def exhausted(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return self.longest >= self.max_skips

    def note(self, step: int, result: StepResult) -> None:
        """Keep one step, counted from 0; the device is not waited for."""
        self.pending.append((step, result.skipped, result.losses))

    def report(self, log: RunLog) -> int:
        """Write a record for each skipped step since the last report; how many there were."""
        if not self.pending:
            return 0
        rows = [torch.stack([skipped, *(~value.isfinite() for value in losses.values())])
                for _, skipped, losses in self.pending]  # fmt: skip
        found = distributed.mean(torch.stack(rows).float()).cpu() > 0
        for (step, _, losses), (skipped, *terms) in zip(self.pending, found.tolist(), strict=True):
            self.row = self.row + 1 if skipped else 0
            self.longest = max(self.longest, self.row)
            if skipped:
                broken = [name for name, is_broken in zip(losses, terms, strict=True) if is_broken]
                log.write("skipped", step + 1, {"terms": broken or ["gradient"], "images": self.images_of(step)})
        self.pending.clear()
        return int(found[:, 0].sum())

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "row": self.row,
            "pending": [
                (step, skipped.cpu(), {name: value.cpu() for name, value in losses.items()})
                for step, skipped, losses in self.pending
            ],
        }

    def resume(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from `state`, from a new count: what made the run stop may have been changed."""
        self.row = 0 if state["row"] >= self.max_skips else int(state["row"])
        self.pending = [
            (int(step), skipped.to(device), {name: value.to(device) for name, value in losses.items()})
            for step, skipped, losses in state["pending"]
        ]
