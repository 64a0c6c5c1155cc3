"""Projection head from tokens to prototype logits (DINO, iBOT)."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smkd.config.schema import HeadConfig

HEAD_NORM_EPS = 1e-12


class PrototypeLayer(nn.Module):
    """Weight-normed linear layer without bias: direction and magnitude of each prototype apart.

    Args:
        dim: channels of an embedding.
        num_prototypes: rows.
        fixed_norm: keep all magnitudes at 1.
    """

    def __init__(self, dim: int, num_prototypes: int, *, fixed_norm: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=not fixed_norm)
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, dim))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def prototypes(self) -> Tensor:
        """[prototypes, dim]."""
        weight: Tensor = self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))
        return weight


class PatchLogits(NamedTuple):
    """Logits of patches, not yet multiplied out: `embedded @ prototypes.T`.

    Attributes:
        embedded: [rows, dim], of norm 1, in the precision of matrix products; a row for every patch, counted over
            [global, batch, patches], or for the masked ones only.
        prototypes: [prototypes, dim].
    """

    embedded: Tensor
    prototypes: Tensor


class ProjectionHead(nn.Module):
    """MLP, L2 norm, prototypes; [CLS] and patches share the MLP and, unless told otherwise, the prototypes.

    Caron et al., DINO, ICCV 2021, section 3.1; for patches too: Zhou et al., iBOT, ICLR 2022.

    Args:
        dim: channels of a token.
        config: sizes.
    """

    def __init__(self, dim: int, config: HeadConfig) -> None:
        super().__init__()
        sizes = [dim] + [config.hidden_dim] * (config.layers - 1) + [config.bottleneck_dim]
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise(sizes)):
            layers += ([nn.GELU()] if number else []) + [nn.Linear(before, after)]
        self.mlp = nn.Sequential(*layers)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        fixed = config.fixed_norm
        self.last_layer = PrototypeLayer(config.bottleneck_dim, config.num_prototypes, fixed_norm=fixed)
        # named as in iBOT's checkpoints
        self.last_layer2: PrototypeLayer | None = None
        if config.num_patch_prototypes is not None:
            self.last_layer2 = PrototypeLayer(config.bottleneck_dim, config.num_patch_prototypes, fixed_norm=fixed)

    def forward(self, cls: Tensor, patches: Tensor | None = None) -> tuple[Tensor, PatchLogits | None]:
        """Logits of [CLS] tokens and of patch tokens; the MLP runs once over both.

        Args:
            cls: [rows, dim].
            patches: [other rows, dim], or None.

        Returns:
            [rows, prototypes], and the patches' logits in factors.
        """
        hidden = self.mlp(cls if patches is None else torch.cat([cls, patches]))  # [all rows, bottleneck]
        # under autocast the MLP answers in the precision of matrix products, and a norm in float32
        embedded = F.normalize(hidden, dim=-1, eps=HEAD_NORM_EPS).to(hidden.dtype)
        prototypes = self.last_layer.prototypes().to(hidden.dtype)  # [prototypes, bottleneck]
        logits = F.linear(embedded[: len(cls)], prototypes)  # [rows, prototypes]
        if patches is None:
            return logits, None
        if self.last_layer2 is not None:
            prototypes = self.last_layer2.prototypes().to(hidden.dtype)
        return logits, PatchLogits(embedded[len(cls) :], prototypes)
