"""Student and teacher: their forward passes over views, and the teacher's moving average."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from smkd import extensions
from smkd.config.run_config import RunConfig
from smkd.config.schema import ObjectiveConfig
from smkd.device import to_device
from smkd.errors import ConfigError
from smkd.models.head import PatchLogits, ProjectionHead
from smkd.models.vit import VisionTransformer, patch_attention

OPTIONAL = ("patches", "tokens", "attention")
"""Outputs that are made where something asks for them."""


class Outputs(NamedTuple):
    """Outputs of a network for views; axes [views, batch, ...].

    Attributes:
        cls: logits of the global views' [CLS], [global, batch, prototypes].
        patches: logits of their patches; None if not needed.
        tokens: backbone patch tokens, [global, batch, patches, dim]; None if not needed.
        attention: weights of the patches by the [CLS] attention, [global, batch, patches]; None if not needed.
        local_cls: logits of the local views' [CLS], [local, batch, prototypes]; student only.
        classes: logits of the supervised classifier, [global, batch, classes]; student only, None if there is none.
        only_masked: `patches` holds the masked patches alone, in the order of the masks.
        features: the backbone's [CLS], [global, batch, dim]; teacher only.
        frozen: what enters the first trained block, [global * batch, tokens, dim]; None if all blocks are trained.
    """

    cls: Tensor
    patches: PatchLogits | None = None
    tokens: Tensor | None = None
    attention: Tensor | None = None
    local_cls: Tensor | None = None
    classes: Tensor | None = None
    only_masked: bool = False
    features: Tensor | None = None
    frozen: Tensor | None = None


class Request(NamedTuple):
    """What a network should return beside the logits of [CLS].

    Attributes:
        patches: logits of the patches.
        tokens: the backbone's patch tokens.
        attention: weights of the patches by the [CLS] attention.
        masked: int64 [masked] on the device, places of the masked patches among [global, batch, patches], if logits
            of no others are needed.
        features: the backbone's [CLS].
        frozen: what enters the first trained block, if blocks are frozen.
    """

    patches: bool = False
    tokens: bool = False
    attention: bool = False
    masked: Tensor | None = None
    features: bool = False
    frozen: bool = False


class FrozenTokens(NamedTuple):
    """What the teacher has computed in the frozen blocks, which student and teacher share.

    Attributes:
        tokens: what enters the first trained block, of the views without masks, [global * batch, tokens, dim].
        masked_views: int64 [views] on the device, which of the global * batch views have a masked patch: these are
            computed anew.
    """

    tokens: Tensor
    masked_views: Tensor


class Network(nn.Module):
    """Backbone and head; the student may also own the supervised classifier."""

    def __init__(self, backbone: VisionTransformer, head: ProjectionHead, num_classes: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.classifier = nn.Linear(backbone.embed_dim, num_classes) if num_classes else None

    def forward(
        self, global_views: Tensor, request: Request, masks: Tensor | None = None, local_views: Tensor | None = None,
        known: FrozenTokens | None = None,
    ) -> Outputs:  # fmt: skip
        """One pass over the global views and one over the local views.

        Args:
            global_views: [global, batch, 3, size, size].
            request: what to return beside the logits of [CLS].
            masks: bool [global, batch, rows, columns], or None.
            local_views: [local, batch, 3, size, size], or None.
            known: what the teacher has computed in the frozen blocks, if there are any.
        """
        shape = global_views.shape[:2]
        images = global_views.flatten(0, 1)  # [global * batch, 3, size, size]
        flat_masks = None if masks is None else masks.flatten(0, 1)  # [global * batch, rows, columns]
        frozen = self._frozen(images, flat_masks, known) if self.backbone.frozen else None
        seen = self.backbone(images, flat_masks, attention=request.attention, known=frozen)
        cls = seen.cls  # [global * batch, dim]
        if local_views is not None and len(local_views):
            cls = torch.cat([cls, self.backbone(local_views.flatten(0, 1)).cls])  # [(global + local) * batch, dim]
        chosen = None
        if request.patches:
            chosen = seen.patches.flatten(0, 1)  # [global * batch * patches, dim]
            chosen = chosen if request.masked is None else chosen[request.masked]
        logits, patch_logits = self.head(cls, chosen)
        logits = logits.unflatten(0, (-1, shape[1]))  # [global + local, batch, prototypes]
        weights = None
        if request.attention:
            weights = patch_attention(seen.attention, seen.patches.shape[1]).unflatten(0, shape)
        return Outputs(
            cls=logits[: shape[0]],
            patches=patch_logits,
            tokens=seen.patches.unflatten(0, shape) if request.tokens else None,
            attention=weights,
            local_cls=logits[shape[0] :] if len(logits) > shape[0] else None,
            classes=None if self.classifier is None else self.classifier(seen.cls).unflatten(0, shape),
            only_masked=request.masked is not None,
            features=seen.cls.unflatten(0, shape) if request.features else None,
            frozen=frozen if request.frozen else None,
        )

    def _frozen(self, images: Tensor, masks: Tensor | None, known: FrozenTokens | None) -> Tensor:
        """Tokens that enter the first trained block, [images, tokens, dim]; of `known` views only the masked ones run.

        It is apart from the backbone's `forward`, which may be compiled: the number of masked views differs.
        """
        if known is None or masks is None:
            return self.backbone.frozen_tokens(images, masks)
        if not len(known.masked_views):
            return known.tokens
        anew = self.backbone.frozen_tokens(images[known.masked_views], masks[known.masked_views])
        return known.tokens.index_copy(0, known.masked_views, anew.to(known.tokens.dtype))


class StudentTeacher(nn.Module):
    """Student and teacher. The teacher starts as a copy of the student, without gradients and mask token.

    Args:
        config: model, head and which outputs the objective needs.
        num_classes: training classes, for the supervised term.

    Attributes:
        idle_weights: whether the loss may reach only a part of the student's weights, as without a [CLS] term when the
            patches have prototypes of their own.

    Raises:
        ConfigError: sizes of the model that do not fit together, or a term that cannot be imported.
    """

    def __init__(self, config: RunConfig, num_classes: int) -> None:
        super().__init__()
        objective = config.objective
        supervised = num_classes if objective.supervised.weight > 0 else 0
        others = _needs_of_other_terms(objective)
        matched = objective.patch.weight > 0
        self.needs_tokens = matched or "tokens" in others
        self.needs_patches = matched or objective.mim.weight > 0 or "patches" in others
        self.needs_attention = (matched and objective.patch.weighting == "attention") or "attention" in others
        # masked-patch prediction alone looks at the masked patches alone
        self.needs_all_patches = matched or "patches" in others
        apart = config.head.num_patch_prototypes is not None
        cls_learns = objective.cls.weight > 0 or (self.needs_patches and not apart)
        self.idle_weights = bool(others) or not cls_learns or (apart and not self.needs_patches)
        self.student = _network(config, student=True, num_classes=supervised)
        self.student.backbone.recompute = config.recompute
        self.teacher = _network(config, student=False)
        self.teacher.load_state_dict(self._shared(self.student.state_dict()))
        self.teacher.requires_grad_(False)

    def teacher_outputs(self, global_views: Tensor) -> Outputs:
        """The teacher sees the unmasked global views, so there is a target for every patch.

        Args:
            global_views: [global, batch, 3, size, size].
        """
        request = Request(
            patches=self.needs_patches, tokens=self.needs_tokens, attention=self.needs_attention, features=True,
            frozen=self.student.backbone.frozen > 0,
        )  # fmt: skip
        with torch.inference_mode():
            outputs: Outputs = self.teacher(global_views, request)
        return outputs

    def student_outputs(
        self, student: nn.Module, global_views: Tensor, masks: Tensor, local_views: Tensor,
        frozen: Tensor | None = None,
    ) -> Outputs:  # fmt: skip
        """The student sees masked global views and plain local ones.

        Args:
            student: `self.student`, or its wrapper for several devices.
            global_views: [global, batch, 3, size, size].
            masks: bool [global, batch, rows, columns] on the CPU.
            local_views: [local, batch, 3, size, size].
            frozen: the teacher's `Outputs.frozen` of the same views, which the student then does not compute again.
        """
        device, masked, known = global_views.device, None, None
        if frozen is not None:
            masked_views = masks.flatten(0, 1).flatten(1).any(dim=1).nonzero()[:, 0]  # [masked views]
            # a copy, since what is made in inference mode takes part in no backward pass
            known = FrozenTokens(frozen.clone(), to_device(masked_views, device))
        if self.needs_patches and not self.needs_all_patches:
            masked = to_device(masks.flatten().nonzero()[:, 0], device)  # [masked]
        request = Request(patches=self.needs_patches, tokens=self.needs_tokens, masked=masked)
        outputs: Outputs = student(global_views, request, to_device(masks, device), local_views, known)
        return outputs

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, for every parameter that both have.

        Weights of frozen blocks are equal in both (`share_frozen`), and stay as they are to the bit.
        """
        student = dict(self.student.named_parameters())
        names = [name for name, _ in self.teacher.named_parameters()]
        torch._foreach_lerp_(list(self.teacher.parameters()), [student[name].detach() for name in names], 1 - momentum)

    @torch.no_grad()
    def share_frozen(self) -> None:
        """Give the student the teacher's weights of the frozen blocks, which the two may bring along differently."""
        backbone, own = self.student.backbone, dict(self.teacher.backbone.named_parameters())
        for name, parameter in backbone.named_parameters():
            if not parameter.requires_grad and name in own:
                parameter.copy_(own[name])

    def _shared(self, student_state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: student_state[name] for name in self.teacher.state_dict()}


def _needs_of_other_terms(objective: ObjectiveConfig) -> set[str]:
    """The outputs that terms of other packages use, by their `needs`, with 'cls' for each."""
    needs: set[str] = set()
    for name, weight in objective.terms.items():
        if weight > 0:
            asked = set(getattr(extensions.terms.load(name), "needs", ()))
            if unknown := asked - set(OPTIONAL):
                raise ConfigError(f"term '{name}' needs {min(unknown)!r}; a term may need {', '.join(OPTIONAL)}")
            needs |= asked | {"cls"}
    return needs


def _network(config: RunConfig, *, student: bool, num_classes: int = 0) -> Network:
    backbone = VisionTransformer.from_config(
        config.model, drop_path=config.model.drop_path if student else 0.0, mask_token=student
    )
    if config.model.last_trained is not None:
        backbone.freeze(config.model.last_trained)
    return Network(backbone, ProjectionHead(backbone.embed_dim, config.head), num_classes)
