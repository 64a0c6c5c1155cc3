"""Multi-head self-attention, its [CLS] row on request, and rotary positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines for the patch tokens, [patches, head dim] each."""
ELEMENTS_AT_ONCE = 2**22
"""Of attention maps, in a backward pass on the CPU."""


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
        mix = _Bfloat16OnCpu.apply if _is_slow(q) else F.scaled_dot_product_attention
        out: Tensor = self.proj(mix(q, k, v).transpose(1, 2).flatten(2))
        return out

    def _row(self, q: Tensor, k: Tensor) -> Tensor:
        scores = (q[:, :, :1] * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [images, heads, 1, tokens]
        row: Tensor = scores[:, :, 0].float().softmax(dim=-1)  # [images, heads, tokens]
        return row


def _is_slow(q: Tensor) -> bool:
    """Whether PyTorch's backward pass of attention takes several times as long as its matrix products."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and torch.is_grad_enabled()


class _Bfloat16OnCpu(torch.autograd.Function):
    """PyTorch's attention with a backward pass of whole matrix products, 1.5 to 10 times as fast in bfloat16 on a CPU.

    Scores, softmax and its gradient are in float32, as in PyTorch's. Nothing of the size of an attention map is kept:
    the scores are computed again, of some images at a time.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        images, heads, tokens = q.shape[:3]
        grads = [torch.empty_like(each) for each in (q, k, v)]
        step = max(1, ELEMENTS_AT_ONCE // (heads * tokens**2))
        for start in range(0, images, step):
            some = slice(start, start + step)
            parts = _map_gradients(*(each[some].flatten(0, 1) for each in (q, k, v, gradient)))
            for grad, part in zip(grads, parts, strict=True):
                grad[some] = part.unflatten(0, (-1, heads))
        return grads[0], grads[1], grads[2]


def _map_gradients(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, all [maps, tokens, head dim], from that of what they mix."""
    scale = q.shape[-1] ** -0.5
    scores = q.float().mul_(scale) @ k.float().mT  # [maps, tokens, tokens]
    weights = scores.softmax(dim=-1)
    by_weights = gradient.float() @ v.float().mT
    by_scores = torch.ops.aten._softmax_backward_data(by_weights, weights, -1, weights.dtype).mul_(scale).to(q.dtype)
    return by_scores @ k, by_scores.mT @ q, weights.to(q.dtype).mT @ gradient


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys [images, heads, tokens, head dim] with their last tokens, the patches, turned."""
    cosines, sines = rotation
    places = cosines.shape[0]
    others, patches = x[:, :, :-places], x[:, :, -places:]  # [images, heads, other or patch tokens, head dim]
    first, second = patches.chunk(2, dim=-1)  # [images, heads, patches, half of head dim]
    turned = patches * cosines + torch.cat([-second, first], dim=-1) * sines
    return torch.cat([others, turned.to(x.dtype)], dim=2)
