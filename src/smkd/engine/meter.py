"""Running means of an epoch, and the numbers it ends with."""

from __future__ import annotations

import math
import time
from pathlib import Path

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
    """Running means of one epoch over all devices; reads the device only when a log line is due.

    Args:
        log: where the lines go.
        config: of the run.
        epoch: counted from 0.
        steps: of the epoch.
        out: the run folder, for the message about a loss that is not finite.
    """

    def __init__(self, log: RunLog, config: RunConfig, epoch: int, steps: int, out: Path) -> None:
        self.log, self.config, self.epoch, self.steps, self.out = log, config, epoch, steps, out
        self.note = ""
        self.skipped = 0
        self.assigned: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.epoch_loss: list[float] = []
        self._restart()

    def _restart(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.empty: dict[str, int] = {}
        self.count = 0
        self.since = time.perf_counter()

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
        total = torch.stack(list(self.sums.values()))  # [losses]
        means = dict(zip(self.sums, (distributed.mean(total) / self.count).tolist(), strict=True))
        broken = [name for name, value in means.items() if not math.isfinite(value)]
        if broken:
            raise SmkdError(
                f"the loss is no longer finite ({', '.join(broken)}) near step {step}; the last checkpoint in "
                f"'{self.out}' is unharmed; try precision=fp32, a lower optim.lr, or head.fixed_norm=true"
            )
        speed = self.count * self.config.batch_size / (time.perf_counter() - self.since)
        # a term that some device found empty may be missing in the counts of this one
        counts = {name: distributed.sum_int(self.empty.get(name, 0), total.device) for name in self.sums}
        empty = {f"empty_{name}": count for name, count in counts.items() if count}
        self.log.write("train", step, {**means, "lr": lr, "images_per_second": round(speed, 1), **empty})
        self.note = f"epoch {self.epoch + 1} loss {means['loss']:.3f} {speed:.0f} images/s"
        self.epoch_loss.append(means["loss"])
        self._restart()

    def close(self, seconds: float) -> dict[str, float]:
        """Numbers of the whole epoch, over all devices.

        Args:
            seconds: how long it took.
        """
        assigned = distributed.gather(torch.cat(self.assigned), dim=0).cpu().numpy()
        labels = distributed.gather(torch.cat(self.labels), dim=0).numpy()
        # with one class for all there is nothing to agree with
        agreement = cluster_agreement(assigned, labels) if labels.min() < labels.max() else {}
        scores = {
            "loss": float(np.mean(self.epoch_loss)),
            **agreement,
            "images_per_second": round(self.steps * self.config.batch_size / seconds, 1),
            "seconds": round(seconds, 2),
        }
        skipped = distributed.sum_int(self.skipped, self.assigned[0].device)
        if skipped:
            scores["skipped_images"] = skipped
            self.log.say(f"epoch {self.epoch + 1}: {skipped} unreadable images were replaced")
        nmi = f"nmi {agreement['nmi']:.3f}, " if agreement else ""
        self.log.say(
            f"epoch {self.epoch + 1}/{self.config.epochs}: loss {scores['loss']:.4f}, {nmi}"
            f"{scores['images_per_second']:.0f} images/s"
        )
        return scores
