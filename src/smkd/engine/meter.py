"""Running means of an epoch, the numbers it ends with, and how well prototypes agree with the classes."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smkd import distributed
from smkd.config.run_config import RunConfig
from smkd.engine.collapse import CollapseWatch, measure_answers
from smkd.engine.guard import Guard
from smkd.engine.log import RunLog
from smkd.engine.step import StepResult

Labels = NDArray[np.int64]


def cluster_agreement(assigned: Labels, labels: Labels) -> dict[str, float]:
    """Agreement of a clustering with the classes.

    Args:
        assigned: prototype with the largest teacher logit, per image.
        labels: class per image.

    Returns:
        nmi: normalised mutual information, 0 to 1; ari: adjusted Rand index, at most 1; fmi: Fowlkes-Mallows
        index, 0 to 1; prototypes: how many different ones were assigned.
    """
    from sklearn import metrics

    return {
        "nmi": float(metrics.normalized_mutual_info_score(labels, assigned)),
        "ari": float(metrics.adjusted_rand_score(labels, assigned)),
        "fmi": float(metrics.fowlkes_mallows_score(labels, assigned)),
        "prototypes": len(np.unique(assigned)),
    }


class Meter:
    """Running means of one epoch over all devices; reads the device only when a log line is due.

    Args:
        log: where the lines go.
        config: of the run.
        epoch: counted from 0.
        steps: of the epoch.
        guard: told of each step, and asked which were skipped.
        collapse: told what the teacher answers at the lines of the log.
    """

    def __init__(
        self, log: RunLog, config: RunConfig, epoch: int, steps: int, guard: Guard, collapse: CollapseWatch
    ) -> None:
        self.log, self.config, self.epoch, self.steps = log, config, epoch, steps
        self.guard, self.collapse = guard, collapse
        self.note = ""
        self.skipped = self.skipped_steps = 0
        self.assigned: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.epoch_loss: list[float] = []
        self.started = time.perf_counter()
        self._restart()

    def _restart(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.empty: dict[str, int] = {}
        self.count = 0
        self.since = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """What this process has seen of the epoch, for a checkpoint within it."""
        now = time.perf_counter()
        return {
            "sums": {name: value.cpu() for name, value in self.sums.items()}, "empty": self.empty, "count": self.count,
            "assigned": torch.cat(self.assigned).cpu(), "labels": torch.cat(self.labels),
            "epoch_loss": self.epoch_loss, "skipped": self.skipped, "skipped_steps": self.skipped_steps,
            "seconds": now - self.started, "seconds_of_line": now - self.since,
        }  # fmt: skip

    def resume(self, states: list[dict[str, Any]], device: torch.device) -> None:
        """Go on within an epoch.

        Args:
            states: `state` of each process that was there; with another number of them their sums are shared evenly.
            device: of the numbers that a step reports.
        """
        world, rank, now = distributed.world_size(), distributed.rank(), time.perf_counter()
        first = states[0]
        own = states[rank] if len(states) == world else _shared(states, world, rank)
        self.sums = {name: value.to(device) for name, value in own["sums"].items()}
        self.assigned, self.labels = [own["assigned"].to(device)], [own["labels"]]
        self.empty, self.skipped = dict(own["empty"]), own["skipped"]
        self.count, self.skipped_steps = first["count"], first["skipped_steps"]
        self.epoch_loss = list(first["epoch_loss"])
        self.started, self.since = now - first["seconds"], now - first["seconds_of_line"]

    def record(self, step: int, result: StepResult, lr: float) -> None:
        """Add one step; write a line if it is time."""
        for name, value in result.losses.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(result.skipped, 0, value)
        for name, count in result.empty.items():
            self.empty[name] = self.empty.get(name, 0) + count
        self.assigned.append(result.assigned)
        self.labels.append(result.labels)
        self.count += 1
        self.guard.note(step, result)
        done = step + 1
        if done % self.config.log_every == 0 or done % self.steps == 0:
            self._flush(done, lr, {} if result.answers is None else measure_answers(result.answers))

    def _flush(self, step: int, lr: float, health: dict[str, float]) -> None:
        skipped = self.guard.report(self.log)
        taken = self.count - skipped
        means: dict[str, float] = {}
        if taken:
            total = torch.stack(list(self.sums.values()))  # [losses]
            means = dict(zip(self.sums, (distributed.mean(total) / taken).tolist(), strict=True))
        speed = self.count * self.config.batch_size / (time.perf_counter() - self.since)
        # a term that some device found empty may be missing in the counts of this one
        empty = {f"empty_{name}": distributed.sum_int(self.empty.get(name, 0)) for name in self.sums}
        counts = {name: count for name, count in (*empty.items(), ("skipped", skipped)) if count}
        self.log.write("train", step, {**means, **health, "lr": lr, "images_per_second": round(speed, 1), **counts})
        self.collapse.look(self.log, step, health)
        loss = f"loss {means['loss']:.3f}" if taken else "no finite loss"
        self.note = f"epoch {self.epoch + 1} {loss} {speed:.0f} images/s"
        if taken:
            self.epoch_loss.append(means["loss"])
        self.skipped_steps += skipped
        self._restart()

    def close(self) -> dict[str, float]:
        """Numbers of the whole epoch, over all devices."""
        seconds = time.perf_counter() - self.started
        assigned = distributed.gather(torch.cat(self.assigned), dim=0).cpu().numpy()
        labels = distributed.gather(torch.cat(self.labels), dim=0).numpy()
        # with one class for all there is nothing to agree with
        agreement = cluster_agreement(assigned, labels) if labels.min() < labels.max() else {}
        loss = {"loss": float(np.mean(self.epoch_loss))} if self.epoch_loss else {}
        scores = {
            **loss,
            **agreement,
            "images_per_second": round(self.steps * self.config.batch_size / seconds, 1),
            "seconds": round(seconds, 2),
        }
        if skipped := distributed.sum_int(self.skipped):
            scores["skipped_images"] = skipped
            self.log.say(f"epoch {self.epoch + 1}: {skipped} unreadable images were replaced")
        if self.skipped_steps:
            scores["skipped_steps"] = self.skipped_steps
            self.log.say(
                f"epoch {self.epoch + 1}: {self.skipped_steps} steps were skipped: loss or gradient not finite"
            )
        nmi = f"nmi {agreement['nmi']:.3f}, " if agreement else ""
        self.log.say(
            f"epoch {self.epoch + 1}/{self.config.epochs}: loss {scores.get('loss', math.nan):.4f}, {nmi}"
            f"{scores['images_per_second']:.0f} images/s"
        )
        return scores


def _shared(states: list[dict[str, Any]], world: int, rank: int) -> dict[str, Any]:
    """This process's part of what another number of processes has seen; the first one takes what is counted."""
    parts = {key: torch.cat([state[key] for state in states]).chunk(world)[rank] for key in ("assigned", "labels")}
    sums = {name: torch.stack([state["sums"][name] for state in states]).mean(dim=0) for name in states[0]["sums"]}
    counted = states if rank == 0 else []
    empty = sum((Counter(state["empty"]) for state in counted), Counter[str]())
    skipped = sum(state["skipped"] for state in counted)
    return {**parts, "sums": sums, "empty": empty, "skipped": skipped}
