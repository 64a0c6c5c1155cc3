"""The whole objective: teacher distributions with their centres, the terms, and their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smkd import distributed, extensions
from smkd.config.schema import HeadConfig, ObjectiveConfig
from smkd.device import to_device
from smkd.models.head import PatchLogits
from smkd.models.pair import Outputs
from smkd.objectives import cls, patch
from smkd.objectives.passes import Pass, passes_of
from smkd.objectives.patch_entropy import Matches, Targets, matched_entropy


class Losses(NamedTuple):
    """Scalars of one pass: its share of the step's, so those of all passes of a step add up.

    Attributes:
        total: sum of the weighted terms.
        terms: each weighted term by its name.
        empty: names of the terms that found no valid pair for this device's images and so are exactly zero here.
    """

    total: Tensor
    terms: dict[str, Tensor]
    empty: tuple[str, ...]


class Objective(nn.Module):
    """Weighs the terms and keeps the centres of the teacher's logits as state.

    Args:
        config: terms and weights.
        head: numbers of prototypes.

    Raises:
        ConfigError: a matching or term that the configuration names cannot be imported.
    """

    cls_center: Tensor
    patch_center: Tensor

    def __init__(self, config: ObjectiveConfig, head: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.match = extensions.matchings.load(config.patch.matching)
        self.others = {name: extensions.terms.load(name) for name, weight in config.terms.items() if weight > 0}
        self.register_buffer("cls_center", torch.zeros(head.num_prototypes))
        self.register_buffer("patch_center", torch.zeros(head.num_patch_prototypes or head.num_prototypes))
        self._cls_means: list[Tensor] = []
        self._patch_means: list[Tensor] = []

    def passes(self, labels: Sequence[Tensor], images: Sequence[Tensor | None] | None = None) -> list[Pass]:
        """The passes of an optimiser step, as `forward` takes them.

        Args:
            labels: for each pass int64 [batch] on the CPU, classes of this device's images.
            images: for each pass int64 [batch] on the CPU, numbers of the images. Two entries with one number are
                the same image and no pair. None if all of a pass differ.
        """
        config = self.config
        numbers = [None] * len(labels) if images is None else images
        return passes_of(labels, numbers, paired=config.labels, pooled=config.labels and config.pairs == "global")

    def forward(
        self, student: Outputs, teacher: Outputs, masks: Tensor, labels: Tensor, *,
        cls_temperature: float, patch_temperature: float, this: Pass | None = None,
    ) -> Losses:  # fmt: skip
        """Losses of a pass; after the last one of a step, the centres move towards the teacher's mean logits.

        Args:
            student: outputs for masked global views and for local views.
            teacher: outputs for the same global views, unmasked.
            masks: bool [global, batch, rows, columns] on the CPU.
            labels: int64 [batch] on the CPU.
            cls_temperature, patch_temperature: of the teacher's distributions.
            this: which pass of a step it is, of `passes`; None for a step of this pass alone.
        """
        this = this or self.passes([labels])[0]
        student, teacher = _float32(student), _float32(teacher)
        config = self.config
        with torch.autocast(student.cls.device.type, enabled=False):
            terms: dict[str, Tensor] = {}
            counts: dict[str, int] = {}
            if config.cls.weight > 0:
                terms["cls"], counts["cls"] = self._cls(student, teacher, this, cls_temperature)
            if config.mim.weight > 0:
                mean, counts["mim"] = self._mim(student, teacher, masks.flatten(2), patch_temperature)
                terms["mim"] = mean / this.passes
            if config.patch.weight > 0:
                terms["patch"], counts["patch"] = self._patch(student, teacher, this, patch_temperature)
            if config.supervised.weight > 0:
                terms["supervised"] = _supervised(student, labels) / this.passes
            for name, term in self.others.items():
                mean, counts[name] = term(student, teacher, masks, labels)
                terms[name] = mean / this.passes
            weighted = {name: self._weight(name) * term for name, term in terms.items()}
            self._move_centers(teacher, last=this.last)
        empty = tuple(name for name, count in counts.items() if count == 0)
        return Losses(torch.stack(list(weighted.values())).sum(), weighted, empty)

    def _weight(self, term: str) -> float:
        if term in self.others:
            return self.config.terms[term]
        weight: float = getattr(self.config, term).weight
        return weight

    def _cls(self, student: Outputs, teacher: Outputs, this: Pass, temperature: float) -> tuple[Tensor, int]:
        targets = _distribution(teacher.cls, self.cls_center, temperature)  # [global, batch, prototypes]
        z = student.cls / self.config.student_temperature  # [global, batch, prototypes]
        local = z[:0] if student.local_cls is None else student.local_cls / self.config.student_temperature
        if not self.config.labels:
            total, count = cls.same_image(targets, z, local)
            return this.share(total, count * this.passes), count
        if this.devices > 1:
            targets = distributed.gather(targets, dim=1)  # [global, images, prototypes]
        pairs = this.pairs(own=False)
        total, count = cls.same_class(targets, z, local, pairs, this.start, with_own_views=self.config.cls.same_image)
        views = len(targets) * len(z)
        within_images = (count - views * int(pairs.sum())) * this.passes * this.devices
        in_step = views * sum(int(partners.sum()) for partners in this.partners) + within_images
        return this.share(total, in_step), count

    def _mim(self, student: Outputs, teacher: Outputs, masks: Tensor, temperature: float) -> tuple[Tensor, int]:
        assert student.patches is not None
        assert teacher.patches is not None
        matches = patch.match_masked(masks, student.patches.embedded.device)
        embedded = teacher.patches.embedded[matches.teacher]  # [masked, dim]
        targets = self._targets(embedded, teacher.patches.prototypes, temperature)
        one_by_one = torch.arange(matches.terms, device=matches.teacher.device)
        of_student = one_by_one if student.only_masked else matches.student
        matches = matches._replace(student=of_student, teacher=one_by_one)
        return self._entropy(student.patches, targets, matches), matches.terms

    def _patch(self, student: Outputs, teacher: Outputs, this: Pass, temperature: float) -> tuple[Tensor, int]:
        teacher = _of_all_devices(teacher) if this.devices > 1 else teacher
        assert student.patches is not None
        assert student.tokens is not None
        assert teacher.patches is not None
        assert teacher.tokens is not None
        config, views = self.config.patch, len(student.tokens)
        own = config.same_image or config.matching == "reference"
        attention = teacher.attention if config.weighting == "attention" else None
        pairs = this.pairs(own=own)
        matches = patch.no_matches(student.tokens.device)
        if bool(pairs.any()):
            matches = self.match(student.tokens, teacher.tokens, pairs, attention)
        targets = self._targets(teacher.patches.embedded, teacher.patches.prototypes, temperature)
        entropy = self._entropy(student.patches, targets, matches)
        weighted = attention is not None
        in_step = views * (views - 1) * sum(
            patch.image_terms(partners, config.matching, own=own, weighted=weighted) for partners in this.partners
        )  # fmt: skip
        # the matches carry the mean over this device's terms of this pass
        return this.share(entropy * matches.terms, in_step), matches.terms

    def _targets(self, embedded: Tensor, prototypes: Tensor, temperature: float) -> Targets:
        return Targets(embedded, prototypes, self.patch_center, temperature)

    def _entropy(self, student: PatchLogits, targets: Targets, matches: Matches) -> Tensor:
        return matched_entropy(student.embedded, student.prototypes, targets, matches, self.config.student_temperature)

    @torch.no_grad()
    def _move_centers(self, teacher: Outputs, *, last: bool) -> None:
        """Move the centres once a step, by the mean over passes and devices; its passes use the same centres."""
        config = self.config
        self._cls_means.append(teacher.cls.mean(dim=(0, 1)))  # [prototypes]
        if teacher.patches is not None:
            # the mean of the logits is the logit of the mean
            mean = teacher.patches.embedded.float().mean(dim=0)  # [dim]
            self._patch_means.append(teacher.patches.prototypes.float() @ mean)  # [patch prototypes]
        if last:
            _move(self.cls_center, self._cls_means, config.cls_center_momentum)
            _move(self.patch_center, self._patch_means, config.patch_center_momentum)


def _move(center: Tensor, means: list[Tensor], momentum: float) -> None:
    """Move a centre by the mean of the passes' means, each of equally many rows; without passes it stays."""
    if means:
        center.lerp_(distributed.mean(torch.stack(means).mean(dim=0)), 1 - momentum)
        means.clear()


def _supervised(student: Outputs, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the classifier over global views and images."""
    assert student.classes is not None
    logits = student.classes.flatten(0, 1)  # [global * batch, classes]
    return nn.functional.cross_entropy(logits, to_device(labels.repeat(len(student.classes)), logits.device))


def _of_all_devices(teacher: Outputs) -> Outputs:
    """The teacher's patches with those of the other devices' images: [global, images, ...] for [global, batch, ...]."""
    assert teacher.patches is not None
    assert teacher.tokens is not None
    views, batch, patches, _ = teacher.tokens.shape
    embedded = teacher.patches.embedded.view(views, batch, patches, -1)
    return teacher._replace(
        patches=teacher.patches._replace(embedded=distributed.gather(embedded, dim=1).flatten(0, 2)),
        tokens=distributed.gather(teacher.tokens, dim=1),
        attention=None if teacher.attention is None else distributed.gather(teacher.attention, dim=1),
    )


def _float32(outputs: Outputs) -> Outputs:
    """All but the factors of patch logits, which stay in the precision of matrix products."""
    return Outputs(*(x.float() if isinstance(x, Tensor) else x for x in outputs))  # type: ignore[arg-type]


def _distribution(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """[..., prototypes] -> the same."""
    return ((logits - center) / temperature).softmax(dim=-1)
