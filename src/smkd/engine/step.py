"""One optimiser step, from augmented views to the teacher's update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from smkd import distributed
from smkd.config.run_config import RunConfig
from smkd.data.loader import Batch, Views
from smkd.engine import shard
from smkd.engine.collapse import TeacherAnswers
from smkd.engine.optim import (
    Rates,
    clip_each,
    drop_last_layer_gradients,
    make_optimizer,
    not_finite,
    set_rates,
    step_unless,
)
from smkd.models.pair import StudentTeacher
from smkd.objectives.objective import Losses, Objective
from smkd.objectives.passes import Pass


class StepResult(NamedTuple):
    """The result of a step; its tensors stay on the device.

    Attributes:
        losses: total and weighted terms, of the whole step on this device.
        empty: in how many passes a term found no valid pair for this device's images.
        assigned: [images] prototype of the teacher for the first global view of each image.
        labels: [images] class of each image, on the CPU.
        skipped: bool [], whether the step changed nothing because its loss or a gradient was not finite.
        answers: what the teacher says of these images.
    """

    losses: dict[str, Tensor]
    empty: dict[str, int]
    assigned: Tensor
    labels: Tensor
    skipped: Tensor
    answers: TeacherAnswers | None = None


@dataclass
class Learner:
    """Everything that learns: networks, centres, optimiser and, for float16, the loss scaler.

    The parts of a step have names in PyTorch's profiler; `smkd bench` measures the time of each.
    """

    config: RunConfig
    pair: StudentTeacher
    objective: Objective
    optimizer: torch.optim.AdamW
    student: nn.Module
    """The student as it is called: itself, or its wrapper for several devices that hold the whole of it."""
    scaler: torch.amp.GradScaler
    autocast: torch.dtype | None
    device: torch.device
    part: Callable[[str], contextlib.AbstractContextManager[object]] = record_function

    @staticmethod
    def create(config: RunConfig, num_classes: int, device: torch.device, autocast: torch.dtype | None) -> Learner:
        """A fresh learner with random weights, a pure function of the seed."""
        torch.manual_seed(config.seed)
        pair = StudentTeacher(config, num_classes)
        shared_out = config.shard == "full" and distributed.world_size() > 1
        if shared_out:
            shard.share_out(pair, device, autocast)
        pair.to(device).train()
        objective = Objective(config.objective, config.head).to(device)
        student: nn.Module = pair.student
        if distributed.world_size() > 1 and not shared_out:
            student = nn.parallel.DistributedDataParallel(
                student,
                device_ids=[device.index] if device.type == "cuda" else None,
                find_unused_parameters=pair.idle_weights,
            )
        scaler = torch.amp.GradScaler(device.type, enabled=autocast == torch.float16)
        optimizer = make_optimizer(pair.student, device, config)
        return Learner(config, pair, objective, optimizer, student, scaler, autocast, device)

    def step(self, views: Iterable[Views], rates: Rates, batches: Sequence[Batch | Views] | None = None) -> StepResult:
        """Forward and backward over all passes, then one update of student, centres and teacher.

        The result is that of one pass over all images, except that pairs form within a pass. Where the loss or a
        gradient's norm is not finite on any device, weights, centres and the optimiser's state stay as they are. The
        host does not wait for the device to know it.

        Args:
            views: the views of each pass; with `batches`, one is made at a time.
            rates: rates of the step.
            batches: the batches behind the views, with labels and numbers of their images; None takes these from
                `views`.
        """
        if batches is None:
            views = list(views)
            batches = views
        labels = [each.labels for each in batches]
        centers = [center.clone() for center in self.objective.buffers()]
        set_rates(self.optimizer, rates)
        self.optimizer.zero_grad()
        losses: dict[str, Tensor] = {}
        empty: dict[str, int] = {}
        answers: list[tuple[Tensor, Tensor]] = []
        for this, each in zip(self.objective.passes(labels, [each.images for each in batches]), views, strict=True):
            with contextlib.nullcontext() if this.last else self._gradients_stay_here():
                loss = self._forward(each, rates, answers, this)
                with self.part("backward"):
                    self.scaler.scale(loss.total).backward()
            for name, value in (("loss", loss.total), *loss.terms.items()):
                losses[name] = losses.get(name, 0) + value.detach()
            for name in loss.empty:
                empty[name] = empty.get(name, 0) + 1
        skipped = self._update(rates, losses["loss"])
        with torch.no_grad():
            for center, before in zip(self.objective.buffers(), centers, strict=True):
                center.copy_(torch.where(skipped, before, center))
        logits, features = (torch.cat(parts) for parts in zip(*answers, strict=True))
        told = TeacherAnswers(logits, centers[0], rates.cls_temperature, features)
        return StepResult(losses, empty, logits.argmax(dim=-1), torch.cat(labels), skipped, told)

    def _forward(
        self, views: Views, rates: Rates, answers: list[tuple[Tensor, Tensor]], this: Pass | None = None
    ) -> Losses:
        with self._autocast():
            with self.part("teacher"):
                targets = self.pair.teacher_outputs(views.global_views)
            with self.part("student"):
                outputs = self.pair.student_outputs(
                    self.student, views.global_views, views.masks, views.local_views, targets.frozen
                )
        assert targets.features is not None
        answers.append((targets.cls[0], targets.features[0]))  # [batch, prototypes], [batch, dim]
        with self.part("objective"):
            losses: Losses = self.objective(
                outputs, targets, views.masks, views.labels,
                cls_temperature=rates.cls_temperature, patch_temperature=rates.patch_temperature, this=this,
            )  # fmt: skip
        return losses

    def _update(self, rates: Rates, loss: Tensor) -> Tensor:
        """Clip, freeze, step, and move the teacher, in the published order; say whether it was skipped."""
        with self.part("optimizer"):
            self.scaler.unscale_(self.optimizer)
            skipped = not_finite(loss, self.pair.student.parameters())
            clip_each(self.pair.student.parameters(), self.config.optim.clip_norm)
            if rates.last_layer_frozen:
                drop_last_layer_gradients(self.pair.student)
            step_unless(self.optimizer, skipped)
            self.scaler.update()
        with self.part("ema"):
            self.pair.update_teacher(rates.teacher_momentum)
        return skipped

    def _gradients_stay_here(self) -> contextlib.AbstractContextManager[None]:
        """Skip the exchange of gradients between devices in all passes but the last.

        A student that is shared out exchanges them in each pass, since no device has room for all.
        """
        if isinstance(self.student, nn.parallel.DistributedDataParallel):
            return self.student.no_sync()
        return contextlib.nullcontext()

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def state(self) -> dict[str, object]:
        """Everything that is learned, for a checkpoint, in the first process; all call it (`shard.whole`)."""
        state: dict[str, object] = shard.whole({
            "student": self.pair.student.state_dict(),
            "teacher": self.pair.teacher.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        })  # fmt: skip
        return state
