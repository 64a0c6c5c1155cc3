"""A transformer block: attention, the MLP of each token, LayerScale and stochastic depth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines for the patch tokens, [patches, head dim] each."""


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


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def _split(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        # [images, tokens, 3 * dim] -> three of [images, heads, tokens, head dim]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        return q, k, v

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """[images, tokens, dim] -> the same; with rotary positions the patch tokens come last."""
        return self._mixed(*self._split(x, rotation))

    def cls_row(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Attention of the first token to all tokens, softmax in float32: [images, heads, tokens]."""
        q, k, _ = self._split(x, rotation)
        return self._row(q, k)

    def with_row(self, x: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor]:
        """What `forward` and `cls_row` give, with the projections computed once."""
        q, k, v = self._split(x, rotation)
        return self._mixed(q, k, v), self._row(q, k)

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out

    def _row(self, q: Tensor, k: Tensor) -> Tensor:
        scores = (q[:, :, :1] * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [images, heads, 1, tokens]
        row: Tensor = scores[:, :, 0].float().softmax(dim=-1)  # [images, heads, tokens]
        return row


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


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys [images, heads, tokens, head dim] with their last tokens, the patches, turned."""
    cosines, sines = rotation
    places = cosines.shape[0]
    others, patches = x[:, :, :-places], x[:, :, -places:]  # [images, heads, other or patch tokens, head dim]
    first, second = patches.chunk(2, dim=-1)  # [images, heads, patches, half of head dim]
    turned = patches * cosines + torch.cat([-second, first], dim=-1) * sines
    return torch.cat([others, turned.to(x.dtype)], dim=2)
