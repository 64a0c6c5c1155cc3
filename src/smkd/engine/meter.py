"""Running means of an epoch, and the numbers it ends with."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smkd import distributed
from smkd.config.schema import RunConfig
from smkd.engine.clusters import cluster_agreement
from smkd.engine.runlog import RunLog
from smkd.engine.step import StepResult
from smkd.errors import SmkdError


class Meter:
    """Running means of one epoch; reads the device only when a log line is due."""

    def __init__(self, log: RunLog, config: RunConfig, epoch: int, steps: int, out: Path) -> None:
        self.log, self.config, self.epoch, self.steps, self.out = log, config, epoch, steps, out
        self.note = ""
        self.skipped = 0
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
            "epoch_loss": self.epoch_loss, "skipped": self.skipped, "seconds": now - self.started,
            "seconds_of_line": now - self.since,
        }  # fmt: skip

    def resume(self, states: list[dict[str, Any]], device: torch.device) -> None:
        """Go on within an epoch.

        Args:
            states: `state` of each process that was there; with another number of them their sums are shared evenly.
            device: of the numbers that a step reports.
        """
        world, rank, now = distributed.world_size(), distributed.rank(), time.perf_counter()
        first = own = states[0]
        if len(states) == world:
            own = states[rank]
            assigned, labels = own["assigned"], own["labels"]
            self.sums = {name: value.to(device) for name, value in own["sums"].items()}
        else:
            assigned, labels = (torch.cat([state[key] for state in states]).chunk(world)[rank]
                                for key in ("assigned", "labels"))  # fmt: skip
            self.sums = {
                name: torch.stack([state["sums"][name] for state in states]).mean(0).to(device)
                for name in first["sums"]
            }
        self.assigned, self.labels = [assigned.to(device)], [labels]
        self.empty, self.count = dict(own["empty"]), int(own["count"])
        self.epoch_loss, self.skipped = list(first["epoch_loss"]), int(own["skipped"])
        self.started, self.since = now - first["seconds"], now - first["seconds_of_line"]

    def record(self, step: int, result: StepResult, lr: float) -> None:
        """Add one step; write a line if it is time."""
        for name, value in result.losses.items():
            self.sums[name] = self.sums.get(name, 0) + value
        for name, count in result.empty.items():
            self.empty[name] = self.empty.get(name, 0) + count
        self.assigned.append(result.assigned)
        self.labels.append(result.labels)
        self.count += 1
        done = step + 1
        if done % self.config.log_every == 0 or done % self.steps == 0:
            self._flush(done, lr)

    def _flush(self, step: int, lr: float) -> None:
        means = {name: float(distributed.mean(value)) / self.count for name, value in self.sums.items()}
        broken = [name for name, value in means.items() if not math.isfinite(value)]
        if broken:
            raise SmkdError(
                f"the loss is no longer finite ({', '.join(broken)}) near step {step}; the last checkpoint in "
                f"'{self.out}' is unharmed; try precision=fp32, a lower optim.lr, or head.fixed_norm=true"
            )
        speed = self.count * self.config.batch_size / (time.perf_counter() - self.since)
        empty = {f"empty_{name}": count for name, count in self.empty.items()}
        self.log.write("train", step, {**means, "lr": lr, "images_per_second": round(speed, 1), **empty})
        self.note = f"epoch {self.epoch + 1} loss {means['loss']:.3f} {speed:.0f} images/s"
        self.epoch_loss.append(means["loss"])
        self._restart()

    def close(self) -> dict[str, float]:
        """Numbers of the whole epoch."""
        seconds = time.perf_counter() - self.started
        assigned = distributed.gather(torch.cat(self.assigned), dim=0).cpu().numpy()
        labels = distributed.gather(torch.cat(self.labels), dim=0).numpy()
        scores = {
            "loss": float(np.mean(self.epoch_loss)),
            **cluster_agreement(assigned, labels),
            "images_per_second": round(self.steps * self.config.batch_size / seconds, 1),
            "seconds": round(seconds, 2),
        }
        if self.skipped:
            scores["skipped_images"] = self.skipped
            self.log.say(f"epoch {self.epoch + 1}: {self.skipped} unreadable images were replaced")
        self.log.say(
            f"epoch {self.epoch + 1}/{self.config.epochs}: loss {scores['loss']:.4f}, nmi {scores['nmi']:.3f}, "
            f"{scores['images_per_second']:.0f} images/s"
        )
        return scores
