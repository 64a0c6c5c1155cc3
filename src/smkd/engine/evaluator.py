"""What measures a run meanwhile: each process extracts from its share of the images, the first one scores."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL.Image import Image

from smkd import distributed
from smkd.config.run_config import RunConfig
from smkd.engine.stopping import Interrupted, Watch
from smkd.models.vit import VisionTransformer

INTERVAL = " ci95"
"""Ends the name of half the width of a score's 95 % interval."""


def scores_in_words(scores: Mapping[str, float]) -> str:
    """Scores, with their intervals where they have one."""
    said = []
    for name, value in scores.items():
        if not name.endswith(INTERVAL):
            interval = scores.get(f"{name}{INTERVAL}")
            said.append(f"{name} {value:.2f}" + ("" if interval is None else f" ± {interval:.2f}"))
    return ", ".join(said)


class Evaluator(Protocol):
    """Measures a backbone on validation classes."""

    def check(self, config: RunConfig) -> None:
        """Fail early if the validation that the configuration asks for cannot be done."""

    def extract(self, backbone: VisionTransformer, config: RunConfig, device: torch.device) -> Any:
        """What the backbone gives for the images of this process (`distributed.share`), on the CPU; not None."""

    def score(self, shares: Sequence[Any], config: RunConfig) -> dict[str, float]:
        """From what each process extracted, in rank order: names and numbers, the first of which selects the best."""

    def pictures(self, backbone: VisionTransformer, config: RunConfig, device: torch.device) -> dict[str, Image]:
        """What the log shows beside the scores, by name; may be empty."""


def measure_together(
    evaluator: Evaluator, backbone: VisionTransformer, config: RunConfig, device: torch.device, watch: Watch
) -> dict[str, float] | None:
    """Measure a backbone over all processes.

    Args:
        evaluator: what is measured.
        backbone: in evaluation mode, on `device`, equal in all processes.
        config: of the run.
        device: of this process.
        watch: hears the signals that cut it short.

    Returns:
        What the first process scored; None in the others.

    Raises:
        Interrupted: in all processes, if a signal came to one of them.
    """
    share = scores = None
    with contextlib.suppress(Interrupted), watch.interruptible():
        share = evaluator.extract(backbone, config, device)
    if distributed.largest(int(share is None)):
        raise Interrupted
    shares = distributed.gather_on_first(share)
    with contextlib.suppress(Interrupted), watch.interruptible():
        scores = None if shares is None else evaluator.score(shares, config)
    if distributed.largest(int(shares is not None and scores is None)):
        raise Interrupted
    return scores
