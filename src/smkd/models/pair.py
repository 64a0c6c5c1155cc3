"""Student and teacher: their forward passes over views, and the teacher's moving average."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from smkd.config.schema import RunConfig
from smkd.models.head import PatchLogits, ProjectionHead
from smkd.models.vit import VisionTransformer, patch_attention
from smkd.transfer import to_device


class Outputs(NamedTuple):
    """What a network says about views; axes [views, batch, ...].

    Attributes:
        cls: logits of the global views' [CLS], [global, batch, prototypes].
        patches: logits of their patches; None if not needed.
        tokens: backbone patch tokens, [global, batch, patches, dim]; None if not needed.
        attention: weights of the patches by the [CLS] attention, [global, batch, patches]; None if not needed.
        local_cls: logits of the local views' [CLS], [local, batch, prototypes]; student only.
        classes: logits of the supervised classifier, [global, batch, classes]; student only, None if there is none.
    """

    cls: Tensor
    patches: PatchLogits | None = None
    tokens: Tensor | None = None
    attention: Tensor | None = None
    local_cls: Tensor | None = None
    classes: Tensor | None = None


class Network(nn.Module):
    """Backbone and head; the student may also own the supervised classifier."""

    def __init__(self, backbone: VisionTransformer, head: ProjectionHead, num_classes: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.classifier = nn.Linear(backbone.embed_dim, num_classes) if num_classes else None

    def forward(
        self, global_views: Tensor, masks: Tensor | None = None, local_views: Tensor | None = None, *,
        patches: bool, tokens: bool = False, attention: bool = False, rows: Tensor | None = None,
    ) -> Outputs:  # fmt: skip
        """One pass over the global views and one over the local views.

        Args:
            global_views: [global, batch, 3, size, size].
            masks: bool [global, batch, rows, columns], or None.
            local_views: [local, batch, 3, size, size], or None.
            patches: also give patch logits.
            tokens: also give the backbone's patch tokens.
            attention: also give the attention weights of the patches.
            rows: the masked patches, counted over [global, batch, patches], if logits of no others are needed.
        """
        shape = global_views.shape[:2]
        flat_masks = None if masks is None else masks.flatten(0, 1)
        seen = self.backbone(global_views.flatten(0, 1), flat_masks, attention=attention)
        cls = seen.cls
        if local_views is not None and len(local_views):
            cls = torch.cat([cls, self.backbone(local_views.flatten(0, 1)).cls])
        chosen = None
        if patches:
            chosen = seen.patches.flatten(0, 1)
            chosen = chosen if rows is None else chosen[rows]
        logits, patch_logits = self.head(cls, chosen)
        logits = logits.unflatten(0, (-1, shape[1]))
        weights = None
        if attention:
            weights = patch_attention(seen.attention, seen.patches.shape[1]).unflatten(0, shape)
        return Outputs(
            cls=logits[: shape[0]],
            patches=patch_logits,
            tokens=seen.patches.unflatten(0, shape) if tokens else None,
            attention=weights,
            local_cls=logits[shape[0] :] if len(logits) > shape[0] else None,
            classes=None if self.classifier is None else self.classifier(seen.cls).unflatten(0, shape),
        )


class StudentTeacher(nn.Module):
    """The pair. The teacher starts as the student's copy, gets no gradients and no mask token.

    Args:
        config: model, head and which outputs the objective needs.
        num_classes: training classes, for the supervised term.
    """

    def __init__(self, config: RunConfig, num_classes: int) -> None:
        super().__init__()
        objective = config.objective
        supervised = num_classes if objective.supervised.weight > 0 else 0
        self.needs_tokens = objective.patch.weight > 0
        self.needs_patches = objective.mim.weight > 0 or self.needs_tokens
        self.needs_attention = objective.patch.weight > 0 and objective.patch.weighting == "attention"
        self.student = _network(config, student=True, num_classes=supervised)
        self.student.backbone.recompute = config.recompute
        self.teacher = _network(config, student=False)
        self.teacher.load_state_dict(self._shared(self.student.state_dict()))
        self.teacher.requires_grad_(False)

    def teacher_outputs(self, global_views: Tensor) -> Outputs:
        """The teacher sees the unmasked global views, so there is a target for every patch."""
        with torch.inference_mode():
            outputs: Outputs = self.teacher(
                global_views, patches=self.needs_patches, tokens=self.needs_tokens, attention=self.needs_attention
            )
        return outputs

    def student_outputs(self, student: nn.Module, global_views: Tensor, masks: Tensor, local_views: Tensor) -> Outputs:
        """The student sees masked global views and plain local ones.

        Args:
            student: `self.student`, or its wrapper for several devices.
            masks: bool [global, batch, rows, columns] on the CPU.
        """
        device, rows = global_views.device, None
        if not self.needs_tokens:  # masked-patch prediction alone looks at no other patches
            rows = to_device(masks.flatten().nonzero()[:, 0], device)
        outputs: Outputs = student(
            global_views, to_device(masks, device), local_views,
            patches=self.needs_patches, tokens=self.needs_tokens, rows=rows,
        )  # fmt: skip
        return outputs

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, for every parameter that both have."""
        student = dict(self.student.named_parameters())
        names = [name for name, _ in self.teacher.named_parameters()]
        torch._foreach_lerp_(list(self.teacher.parameters()), [student[name].detach() for name in names], 1 - momentum)

    def _shared(self, student_state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: student_state[name] for name in self.teacher.state_dict()}


def _network(config: RunConfig, *, student: bool, num_classes: int = 0) -> Network:
    backbone = VisionTransformer.from_config(
        config.model, drop_path=config.model.drop_path if student else 0.0, mask_token=student
    )
    return Network(backbone, ProjectionHead(backbone.embed_dim, config.head), num_classes)
