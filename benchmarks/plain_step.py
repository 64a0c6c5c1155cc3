"""One training step written plainly, after the published code: all logits written out, loops over pairs of images.

The slow, obvious twin of `smkd.engine.step.Learner.step`; benchmarks/step.py compares their speed, tests/test_step.py
their losses, gradients and weights. Without stochastic depth, since the two draw it in another order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from smkd.data.loader import Views
from smkd.engine.optim import Rates, grouped
from smkd.engine.step import Learner
from smkd.models.head import ProjectionHead
from smkd.models.vit import patch_attention


class PlainStep:
    """Steps of a learner's networks and centres, with an optimiser of its own.

    Args:
        learner: in float32; its own optimiser stays unused.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.optimizer = torch.optim.AdamW(
            [{"params": list(group.named.values())} for group in grouped(learner.pair.student, learner.config)],
            lr=0.0, weight_decay=0.0, foreach=False, fused=False,
        )  # fmt: skip

    def __call__(self, views: Views, rates: Rates) -> float:
        """Forward, backward and all updates; the loss."""
        pair, config = self.learner.pair, self.learner.config
        for group in self.optimizer.param_groups:
            group["lr"] = rates.lr
        self.optimizer.param_groups[0]["weight_decay"] = rates.weight_decay
        self.optimizer.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            loss = self._loss(views, rates)
            loss.backward()
        for name, parameter in pair.student.named_parameters():
            if parameter.grad is None:
                continue
            norm = parameter.grad.norm()
            if config.optim.clip_norm and norm > config.optim.clip_norm:
                parameter.grad *= config.optim.clip_norm / (norm + 1e-6)
            if rates.last_layer_frozen and "last_layer" in name:
                parameter.grad = None
        self.optimizer.step()
        with torch.no_grad():
            student = dict(pair.student.named_parameters())
            for name, parameter in pair.teacher.named_parameters():
                parameter.mul_(rates.teacher_momentum).add_((1 - rates.teacher_momentum) * student[name])
        return float(loss.detach())

    def _loss(self, views: Views, rates: Rates) -> Tensor:
        pair, objective = self.learner.pair, self.learner.objective
        config = objective.config
        count, batch = views.global_views.shape[:2]
        flat = views.global_views.flatten(0, 1)
        with torch.no_grad():
            seen = pair.teacher.backbone(flat, attention=True)
            tokens_t = seen.patches.unflatten(0, (count, batch))
            attention = patch_attention(seen.attention, seen.patches.shape[1]).unflatten(0, (count, batch))
            logits_t = pair.teacher.head(seen.cls)[0].unflatten(0, (count, batch))
            patches_t = patch_logits(pair.teacher.head, seen.patches).unflatten(0, (count, batch))
            p = ((logits_t - objective.cls_center) / rates.cls_temperature).softmax(-1)
            patch_p = ((patches_t - objective.patch_center) / rates.patch_temperature).softmax(-1)
        seen = pair.student.backbone(flat, views.masks.flatten(0, 1))
        tokens_s = seen.patches.unflatten(0, (count, batch))
        local = pair.student.backbone(views.local_views.flatten(0, 1)).cls
        z = pair.student.head(torch.cat([seen.cls, local]))[0].unflatten(0, (-1, batch))
        z = z / config.student_temperature
        patch_z = patch_logits(pair.student.head, seen.patches).unflatten(0, (count, batch))
        patch_z = patch_z / config.student_temperature

        same = views.labels[:, None] == views.labels[None, :] if config.labels else torch.eye(batch, dtype=torch.bool)
        terms = []
        for q in range(count):
            for v in range(len(z)):
                if v < count and config.labels:
                    different = same & ~torch.eye(batch, dtype=torch.bool)
                    terms += [cross_entropy(p[q, i], z[v, j])[None] for i, j in different.nonzero().tolist()]
                elif v != q:
                    terms.append(cross_entropy(p[q], z[v]))
        total = config.cls.weight * torch.cat(terms).mean()
        if config.mim.weight:
            hidden = views.masks.flatten(2).float()
            each = (cross_entropy(patch_p, patch_z) * hidden).sum(-1) / hidden.sum(-1).clamp(min=1)
            total = total + config.mim.weight * each.mean()
        if config.patch.weight:
            terms = []
            for s in range(count):
                for t in range(count):
                    if s == t:
                        continue
                    for i, j in same.nonzero().tolist():
                        similarity = F.cosine_similarity(tokens_t[t, i][:, None], tokens_s[s, j][None], dim=-1)
                        matched = patch_z[s, j][similarity.argmax(dim=1)]
                        terms.append((attention[t, i] * cross_entropy(patch_p[t, i], matched)).sum())
            total = total + config.patch.weight * torch.stack(terms).mean()
        with torch.no_grad():
            objective.cls_center.lerp_(logits_t.mean((0, 1)), 1 - config.cls_center_momentum)
            objective.patch_center.lerp_(patches_t.mean((0, 1, 2)), 1 - config.patch_center_momentum)
        return total


def cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    """Along the last axis."""
    return -(targets * logits.log_softmax(dim=-1)).sum(dim=-1)


def patch_logits(head: ProjectionHead, tokens: Tensor) -> Tensor:
    """[images, patches, dim] -> [images, patches, patch prototypes]."""
    _, factors = head(tokens[:1, 0], tokens.flatten(0, 1))
    assert factors is not None
    return (factors.embedded @ factors.prototypes.T).unflatten(0, tokens.shape[:2])
