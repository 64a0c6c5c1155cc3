"""The MLP of a transformer block, which works on each token by itself."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


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
