"""Vision Transformer that takes masks, any image size, and hands out its [CLS] attention on request.

State-dict names are those of timm and DINO (`patch_embed.proj`, `blocks.0.attn.qkv`, ...).
Dosovitskiy et al., ICLR 2021; register tokens: Darcet et al., ICLR 2024; LayerScale: Touvron et al., ICCV 2021.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smkd.config.schema import ModelConfig
from smkd.errors import ConfigError

SIZES = {  # embed_dim, depth, num_heads
    "debug": (32, 2, 2),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
NORM_EPS = 1e-6


class Tokens(NamedTuple):
    """Output of the backbone after the final norm.

    Attributes:
        cls: [images, dim].
        patches: [images, patches, dim], row by row of the patch grid.
        attention: [images, heads, 1 + registers + patches], the [CLS] row of the last block's attention after
            softmax; None unless asked for.
    """

    cls: Tensor
    patches: Tensor
    attention: Tensor | None


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[images, 3, height, width] -> [images, dim, rows, columns]."""
        out: Tensor = self.proj(images)
        return out


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        """[images, tokens, dim] -> the same."""
        q, k, v = self._split(x)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out

    def cls_row(self, x: Tensor) -> Tensor:
        """Attention of the first token to all tokens, softmax in float32: [images, heads, tokens]."""
        q, k, _ = self._split(x)
        scores = (q[:, :, :1] * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        row: Tensor = scores[:, :, 0].float().softmax(dim=-1)
        return row


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> the same."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> the same."""
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a residual branch of an image with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """[images, ...] -> the same; kept branches are scaled up so that the mean stays."""
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, drop_path: float, layer_scale: float | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, 4 * dim)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[images, tokens, dim] -> the same."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return x

    def cls_attention(self, x: Tensor) -> Tensor:
        """[CLS] row of this block's attention for its input x: [images, heads, tokens]."""
        return self.attn.cls_row(self.norm1(x))


class VisionTransformer(nn.Module):
    """The backbone.

    Args:
        image_size: native side in pixels; sets the stored position embedding.
        patch_size: side of a patch in pixels.
        embed_dim, depth, num_heads: size of the network.
        drop_path: stochastic depth of the last block, growing linearly from 0 at the first.
        layer_scale: initial LayerScale, or None for none.
        register_tokens: extra tokens between [CLS] and the patches.
        mask_token: own the token that stands in for masked patches (the student does).

    Raises:
        ConfigError: sizes that do not divide.
    """

    def __init__(
        self, *, image_size: int = 224, patch_size: int = 16, embed_dim: int = 384, depth: int = 12,
        num_heads: int = 6, drop_path: float = 0.0, layer_scale: float | None = None, register_tokens: int = 0,
        mask_token: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if embed_dim % num_heads:
            raise ConfigError(f"model.embed_dim={embed_dim} is not divisible by model.num_heads={num_heads}")
        if image_size % patch_size:
            raise ConfigError(f"model.image_size={image_size} is not divisible by model.patch_size={patch_size}")
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.grid = image_size // patch_size
        self.register_tokens = register_tokens
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, embed_dim))
        if register_tokens:
            self.reg_token = nn.Parameter(torch.zeros(1, register_tokens, embed_dim))
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate, layer_scale) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self._initialise()

    @staticmethod
    def from_config(config: ModelConfig, *, drop_path: float = 0.0, mask_token: bool = False) -> VisionTransformer:
        """Backbone of a named size, with the size's numbers replaced where the configuration gives its own."""
        dim, depth, heads = SIZES[config.size]
        return VisionTransformer(
            image_size=config.image_size, patch_size=config.patch_size, embed_dim=config.embed_dim or dim,
            depth=config.depth or depth, num_heads=config.num_heads or heads, drop_path=drop_path,
            layer_scale=config.layer_scale, register_tokens=config.register_tokens, mask_token=mask_token,
        )  # fmt: skip

    def forward(self, images: Tensor, masks: Tensor | None = None, *, attention: bool = False) -> Tokens:
        """Tokens of the last block.

        Args:
            images: [images, 3, height, width]; sides are cut down to whole patches.
            masks: bool [images, rows, columns], True replaces the patch by the mask token.
            attention: also compute the [CLS] row of the last block's attention.
        """
        x = self.embed(images, masks)
        last = len(self.blocks) - 1
        row = None
        for number, block in enumerate(self.blocks):
            if attention and number == last:
                assert isinstance(block, Block)
                row = block.cls_attention(x)
            x = block(x)
        return self._tokens(x, row)

    def last_blocks(self, images: Tensor, blocks: int) -> list[Tokens]:
        """Tokens, with attention, of the last blocks, earlier block first; the final norm is applied to each."""
        x = self.embed(images)
        first = len(self.blocks) - blocks
        if first < 0:
            raise ConfigError(f"features.blocks={blocks}, but the backbone has {len(self.blocks)} blocks")
        outputs = []
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            row = block.cls_attention(x) if number >= first else None
            x = block(x)
            if number >= first:
                outputs.append(self._tokens(x, row))
        return outputs

    def embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Tokens before the first block: [images, 1 + registers + patches, dim].

        A masked patch keeps its own position: the mask token replaces its content only.
        """
        x = self.patch_embed(images)
        x = x.flatten(2).transpose(1, 2)
        if masks is not None:
            x = torch.where(masks.flatten(1).unsqueeze(-1), self.mask_token.to(x.dtype), x)
        positions = self.positions(*images.shape[-2:])
        cls = (self.cls_token + positions[:, :1]).expand(x.shape[0], -1, -1)
        parts = [cls, x + positions[:, 1:]]
        if self.register_tokens:
            parts.insert(1, self.reg_token.expand(x.shape[0], -1, -1))
        return torch.cat(parts, dim=1)

    def positions(self, height: int, width: int) -> Tensor:
        """Position embedding for an image of that many pixels, [1, 1 + patches, dim]; [CLS] first, never changed.

        Bicubic by the scale factor (n + 0.1) / native, as DINO and the reference do; the stored embedding itself
        only for a square image with the native number of patches.
        """
        rows, columns = height // self.patch_size, width // self.patch_size
        if rows * columns == self.grid**2 and height == width:
            return self.pos_embed
        native = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        factor = ((rows + 0.1) / self.grid, (columns + 0.1) / self.grid)
        grid = F.interpolate(native, scale_factor=factor, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def _tokens(self, x: Tensor, attention: Tensor | None) -> Tokens:
        x = self.norm(x)
        return Tokens(x[:, 0], x[:, 1 + self.register_tokens :], attention)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.pos_embed, *([self.reg_token] if self.register_tokens else [])):
            nn.init.trunc_normal_(token, std=0.02)


def patch_attention(attention: Tensor, patches: int) -> Tensor:
    """Weights of the patches from a [CLS] attention row: heads averaged, other entries dropped, sum 1.

    Args:
        attention: [images, heads, 1 + registers + patches].
        patches: number of patches.

    Returns:
        [images, patches].
    """
    weights = attention.mean(dim=1)[:, -patches:]
    # all attention may rest on [CLS] itself
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
