"""A transformer block: the MLP of each token, LayerScale and stochastic depth around attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smkd.models.attention import Attention, Rotation

LAYER_NORM_EPS = 1e-6


class Mlp(nn.Module):
    """Two linear layers with GELU between them.

    Args:
        dim: channels of a token.
        hidden: channels between the layers.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> the same."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwiGlu(nn.Module):
    """Gated MLP (Shazeer, arXiv 2002.05202): SiLU of one half of the first layer's channels times the other half.

    Args:
        dim: channels of a token.
        hidden: channels of each half.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> the same."""
        gate, value = self.fc1(x).chunk(2, dim=-1)  # [..., hidden] each
        out: Tensor = self.fc2(F.silu(gate) * value)
        return out


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al., ICCV 2021).

    Args:
        dim: channels.
        initial: value of all factors at the start.
    """

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> the same."""
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., ECCV 2016): in training, drop a residual branch of an image at random.

    Args:
        rate: probability of dropping, below 1.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """[images, ...] -> the same; kept branches are scaled up so that the mean stays."""
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate  # [images, 1, ...]
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self, dim: int, num_heads: int, drop_path: float, layer_scale: float | None, eps: float = LAYER_NORM_EPS, *,
        mlp_dim: int | None = None, swiglu: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = (SwiGlu if swiglu else Mlp)(dim, mlp_dim or 4 * dim)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """[images, tokens, dim] -> the same."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), rotation)))
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return x

    def with_attention(self, x: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor]:
        """What `forward` and `cls_attention` give; the row costs next to nothing."""
        mixed, row = self.attn.with_row(self.norm1(x), rotation)
        x = x + self.drop_path(self.ls1(mixed))
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return x, row

    def cls_attention(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """[CLS] row of this block's attention for its input x: [images, heads, tokens]."""
        return self.attn.cls_row(self.norm1(x), rotation)
