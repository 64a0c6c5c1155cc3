"""The whole objective: teacher distributions with their centres, the terms, and their weighted sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from smkd import distributed
from smkd.config.schema import HeadConfig, ObjectiveConfig
from smkd.models.head import PatchLogits
from smkd.models.pair import Outputs
from smkd.objectives import cls, mim, patch
from smkd.objectives.matched import Matches, Targets, matched_entropy
from smkd.transfer import to_device


class Losses(NamedTuple):
    """Scalars of one pass.

    Attributes:
        total: sum of the weighted terms.
        terms: each weighted term by its name.
        empty: names of the terms that found no valid pair in the batch and so are exactly zero.
    """

    total: Tensor
    terms: dict[str, Tensor]
    empty: tuple[str, ...]


class Objective(nn.Module):
    """Weighs the terms and keeps the centres of the teacher's logits as state.

    Args:
        config: terms and weights.
        head: numbers of prototypes.
    """

    cls_center: Tensor
    patch_center: Tensor

    def __init__(self, config: ObjectiveConfig, head: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("cls_center", torch.zeros(head.num_prototypes))
        self.register_buffer("patch_center", torch.zeros(head.num_patch_prototypes or head.num_prototypes))

    def forward(
        self, student: Outputs, teacher: Outputs, masks: Tensor, labels: Tensor, *,
        cls_temperature: float, patch_temperature: float, images: Tensor | None = None,
    ) -> Losses:  # fmt: skip
        """Losses of a batch; afterwards the centres move towards the teacher's mean logits.

        Args:
            student: outputs for masked global views and for local views.
            teacher: outputs for the same global views, unmasked.
            masks: bool [global, batch, rows, columns] on the CPU.
            labels: int64 [batch] on the CPU.
            cls_temperature, patch_temperature: of the teacher's distributions.
            images: int64 [batch] on the CPU, number of each image: one that is there twice is not another image of its
                class. None if all differ.
        """
        student, teacher = _float32(student), _float32(teacher)
        config = self.config
        kin = self._kin(labels, images)
        with torch.autocast(student.cls.device.type, enabled=False):
            terms: dict[str, Tensor] = {}
            counts: dict[str, int] = {}
            if config.cls.weight > 0:
                terms["cls"], counts["cls"] = self._cls(student, teacher, kin, cls_temperature)
            if config.mim.weight > 0:
                terms["mim"], counts["mim"] = self._mim(student, teacher, masks.flatten(2), patch_temperature)
            if config.patch.weight > 0:
                terms["patch"], counts["patch"] = self._patch(student, teacher, kin, patch_temperature)
            if config.supervised.weight > 0:
                assert student.classes is not None
                logits = student.classes.flatten(0, 1)
                truth = to_device(labels.repeat(len(student.classes)), logits.device)
                terms["supervised"] = nn.functional.cross_entropy(logits, truth)
            weighted = {name: getattr(config, name).weight * term for name, term in terms.items()}
            self._move_centers(teacher)
        empty = tuple(name for name, count in counts.items() if count == 0)
        return Losses(torch.stack(list(weighted.values())).sum(), weighted, empty)

    def _kin(self, labels: Tensor, images: Tensor | None) -> Tensor:
        """int64 [batch, 2]: class and number of each image; without labels every image is a class of its own."""
        places = torch.arange(len(labels)) + distributed.rank() * len(labels)
        return torch.stack([labels if self.config.labels else places, places if images is None else images], dim=1)

    def _cls(self, student: Outputs, teacher: Outputs, labels: Tensor, temperature: float) -> tuple[Tensor, int]:
        targets = _distribution(teacher.cls, self.cls_center, temperature)
        z = student.cls / self.config.student_temperature
        local = z[:0] if student.local_cls is None else student.local_cls / self.config.student_temperature
        if not self.config.labels:
            total, count = cls.same_image(targets, z, local)
            return total / max(count, 1), count
        all_labels, start = labels, 0
        if self.config.pairs == "global":
            targets, all_labels = distributed.gather(targets, dim=1), distributed.gather(labels, dim=0)
            start = distributed.rank() * len(labels)
        pairs = _same_label_pairs(all_labels, labels, start, own=False)
        total, count = cls.same_class(targets, z, local, pairs, start, with_own_views=self.config.cls.same_image)
        return self._mean(total, count)

    def _mim(self, student: Outputs, teacher: Outputs, masks: Tensor, temperature: float) -> tuple[Tensor, int]:
        assert student.patches is not None
        assert teacher.patches is not None
        matches = mim.match_masked(masks, student.patches.embedded.device)
        targets = self._targets(teacher.patches.embedded[matches.teacher], teacher.patches.prototypes, temperature)
        one_by_one = torch.arange(len(targets.embedded), device=targets.embedded.device)
        only_masked = len(student.patches.embedded) == matches.terms
        matches = matches._replace(student=one_by_one if only_masked else matches.student, teacher=one_by_one)
        return self._entropy(student.patches, targets, matches), matches.terms

    def _patch(self, student: Outputs, teacher: Outputs, labels: Tensor, temperature: float) -> tuple[Tensor, int]:
        assert student.patches is not None
        assert student.tokens is not None
        assert teacher.patches is not None
        assert teacher.tokens is not None
        config = self.config.patch
        embedded, tokens = teacher.patches.embedded, teacher.tokens
        attention = teacher.attention if config.weighting == "attention" else None
        if config.matching == "reference":
            matches = patch.match_reference(student.tokens, tokens, labels[:, 0], attention, labels[:, 1])
            targets = self._targets(embedded, teacher.patches.prototypes, temperature)
            return self._entropy(student.patches, targets, matches), matches.terms
        all_labels, start = labels, 0
        if self.config.pairs == "global":
            views, _, patches, _ = tokens.shape
            tokens = distributed.gather(tokens, dim=1)
            embedded = distributed.gather(embedded.view(views, len(labels), patches, -1), dim=1).flatten(0, 2)
            attention = None if attention is None else distributed.gather(attention, dim=1)
            all_labels = distributed.gather(labels, dim=0)
            start = distributed.rank() * len(labels)
        pairs = _same_label_pairs(all_labels, labels, start, own=config.same_image)
        matches = patch.match_paper(student.tokens, tokens, pairs, attention)
        targets = self._targets(embedded, teacher.patches.prototypes, temperature)
        # the matches carry the mean over this device's terms
        return self._mean(self._entropy(student.patches, targets, matches) * matches.terms, matches.terms)

    def _targets(self, embedded: Tensor, prototypes: Tensor, temperature: float) -> Targets:
        return Targets(embedded, prototypes, self.patch_center, temperature)

    def _entropy(self, student: PatchLogits, targets: Targets, matches: Matches) -> Tensor:
        return matched_entropy(student.embedded, student.prototypes, targets, matches, self.config.student_temperature)

    def _mean(self, total: Tensor, count: int) -> tuple[Tensor, int]:
        """Mean over this device's summands, or over those of all devices when pairs are global.

        In the second case the devices' results average to the mean of one device with the whole batch.
        """
        if self.config.pairs == "global":
            count = distributed.sum_int(count, total.device)
            return total * distributed.world_size() / max(count, 1), count
        return total / max(count, 1), count

    @torch.no_grad()
    def _move_centers(self, teacher: Outputs) -> None:
        config = self.config
        self.cls_center.lerp_(distributed.mean(teacher.cls.mean(dim=(0, 1))), 1 - config.cls_center_momentum)
        if teacher.patches is not None:
            # the mean of the logits is the logit of the mean
            mean = teacher.patches.prototypes.float() @ teacher.patches.embedded.float().mean(dim=0)
            self.patch_center.lerp_(distributed.mean(mean), 1 - config.patch_center_momentum)


def _float32(outputs: Outputs) -> Outputs:
    """All but the factors of patch logits, which stay in the precision of matrix products."""
    return Outputs(*(x.float() if isinstance(x, Tensor) else x for x in outputs))  # type: ignore[arg-type]


def _distribution(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    return ((logits - center) / temperature).softmax(dim=-1)


def _same_label_pairs(all_labels: Tensor, labels: Tensor, start: int, *, own: bool) -> Tensor:
    """bool [images, batch]: other images of the same class, by rows of `_kin`; an image with itself only if `own`."""
    of_class, of_image = (all_labels[:, None] == labels[None, :]).unbind(dim=2)
    pairs = of_class & ~of_image
    images = torch.arange(len(labels))
    pairs[start + images, images] = own
    return pairs
