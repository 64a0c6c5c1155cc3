"""Vision Transformer that takes masks, any image size, and hands out its [CLS] attention on request.

State-dict names are those of timm and DINO (`patch_embed.proj`, `blocks.0.attn.qkv`, ...).
Dosovitskiy et al., ICLR 2021; register tokens: Darcet et al., ICLR 2024; LayerScale: Touvron et al., ICCV 2021;
rotary positions: Siméoni et al., arXiv 2508.10104 (DINOv3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smkd.config.schema import ModelConfig
from smkd.errors import ConfigError
from smkd.models.attention import Rotation
from smkd.models.block import LAYER_NORM_EPS, Block

SIZES = {  # embed_dim, depth, num_heads
    "debug": (32, 2, 2),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
ROTARY_NORM_EPS = 1e-5
ROTARY_BASE = 100.0


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
    """Non-overlapping patches to tokens.

    The weights are those of a convolution. It would give the same and take up to four times as long on a CPU.
    """

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[images, 3, height, width] -> [images, patches, dim]; pixels beyond whole patches are cut off."""
        side = self.proj.kernel_size[0]
        rows, columns = images.shape[2] // side, images.shape[3] // side
        whole = images[:, :, : rows * side, : columns * side]
        patches = whole.unflatten(2, (rows, side)).unflatten(
            4, (columns, side)
        )  # [images, 3, rows, side, columns, side]
        pixels = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [images, patches, 3 * side * side]
        return F.linear(pixels, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """The backbone.

    Args:
        image_size: native side in pixels; sets the stored position embedding.
        patch_size: side of a patch in pixels.
        embed_dim, depth, num_heads: size of the network.
        drop_path: stochastic depth of the last block, growing linearly from 0 at the first.
        layer_scale: initial LayerScale, or None for none.
        register_tokens: extra tokens between [CLS] and the patches.
        rotary: positions by turning queries and keys, not by a stored embedding; norms with epsilon 1e-5 (DINOv3).
        mlp_dim: hidden channels of an MLP; None is 4 x embed_dim.
        swiglu: gated MLPs.
        mask_token: own the token that stands in for masked patches (the student does).

    Attributes:
        frozen: how many first blocks stay as they are, with all that comes before them; see `freeze`.
        config: what the network was made from; `from_config` of it makes one with the same weights' names and shapes
            that computes the same from them in evaluation.

    Raises:
        ConfigError: sizes that do not divide.
    """

    def __init__(
        self, *, image_size: int = 224, patch_size: int = 16, embed_dim: int = 384, depth: int = 12,
        num_heads: int = 6, drop_path: float = 0.0, layer_scale: float | None = None, register_tokens: int = 0,
        rotary: bool = False, mlp_dim: int | None = None, swiglu: bool = False, mask_token: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(image_size, patch_size, embed_dim, num_heads, rotary=rotary)
        self.config = ModelConfig(
            image_size=image_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads,
            drop_path=drop_path, layer_scale=layer_scale, register_tokens=register_tokens, rotary=rotary,
            mlp_dim=mlp_dim, swiglu=swiglu,
        )  # fmt: skip
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.rotary_dim = embed_dim // num_heads if rotary else 0
        self.grid = image_size // patch_size
        self.register_tokens = register_tokens
        self.recompute = False
        """Keep only the input of each block for the backward pass, which runs the block again."""
        self.frozen = 0
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if not rotary:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, embed_dim))
        if register_tokens:
            self.reg_token = nn.Parameter(torch.zeros(1, register_tokens, embed_dim))
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        eps = ROTARY_NORM_EPS if rotary else LAYER_NORM_EPS
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, rate, layer_scale, eps, mlp_dim=mlp_dim, swiglu=swiglu) for rate in rates
        )
        self.norm = nn.LayerNorm(embed_dim, eps=eps)
        self._initialise()

    @classmethod
    def from_config(cls, config: ModelConfig, *, drop_path: float = 0.0, mask_token: bool = False) -> Self:
        """Backbone of a named size, with the size's numbers replaced where the configuration gives its own.

        Args:
            config: its `drop_path` is not looked at: only a student in training has stochastic depth.
            drop_path: stochastic depth of the last block.
            mask_token: own the token that stands in for masked patches.

        Raises:
            ConfigError: sizes that do not divide.
        """
        dim, depth, heads = SIZES[config.size]
        made = cls(
            image_size=config.image_size, patch_size=config.patch_size, embed_dim=config.embed_dim or dim,
            depth=config.depth or depth, num_heads=config.num_heads or heads, drop_path=drop_path,
            layer_scale=config.layer_scale, register_tokens=config.register_tokens,
            rotary=config.rotary, mlp_dim=config.mlp_dim, swiglu=config.swiglu, mask_token=mask_token,
        )  # fmt: skip
        # which blocks a run trains is nothing that the network is made of
        made.config = config.model_copy(update={"train_blocks": "all"})
        return made

    @classmethod
    def with_weights(cls, config: ModelConfig, weights: Mapping[str, Tensor]) -> Self:
        """Backbone of a configuration with these weights, all of them and no others, in evaluation mode.

        Args:
            config: see `from_config`.
            weights: copied; with a mask token if it has one.

        Raises:
            ConfigError: sizes that do not divide.
        """
        with torch.device("meta"):  # to draw weights takes as long as to read a file
            made = cls.from_config(config, mask_token="mask_token" in weights)
        for module in made.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))
        made.load_state_dict(dict(weights))
        return made.eval()

    def freeze(self, last: int) -> None:
        """Train the last blocks and the final norm alone; the others run without gradients and stochastic depth.

        Args:
            last: how many.

        Raises:
            ConfigError: there are not so many.
        """
        depth = len(self.blocks)
        if last > depth:
            raise ConfigError(f"model.train_blocks=last:{last}: the backbone has {depth} blocks")
        self.frozen = depth - last
        for name, parameter in self.named_parameters():
            if layer_of(name, depth) <= self.frozen:
                parameter.requires_grad_(False)
        for block in self.blocks[: self.frozen]:
            assert isinstance(block, Block)
            block.drop_path.rate = 0.0

    @torch.no_grad()
    def frozen_tokens(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """What enters the first trained block of a backbone with frozen ones: [images, 1 + registers + patches, dim].

        Args: see `forward`.
        """
        x, rotation = self.embed(images, masks), self.rotation(*images.shape[-2:])
        for block in self.blocks[: self.frozen]:
            x = block(x, rotation)
        return x

    def forward(
        self, images: Tensor, masks: Tensor | None = None, *, attention: bool = False, known: Tensor | None = None
    ) -> Tokens:
        """Tokens of the last block, after the final norm.

        Args:
            images: float [images, 3, height, width], normalised; sides are cut down to whole patches.
            masks: bool [images, rows, columns], True replaces the patch by the mask token.
            attention: also compute the [CLS] row of the last block's attention.
            known: the `frozen_tokens` of these images and masks, if they are computed already.
        """
        if known is not None:
            x = known
        else:
            x = self.frozen_tokens(images, masks) if self.frozen else self.embed(images, masks)
        rotation = self.rotation(*images.shape[-2:])
        last = len(self.blocks) - 1
        row = None
        for number, block in enumerate(self.blocks[self.frozen :], self.frozen):
            if attention and number == last:
                assert isinstance(block, Block)
                row = block.cls_attention(x, rotation)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, use_reentrant=False)
            else:
                x = block(x, rotation)
        return self._tokens(x, row)

    def last_blocks(self, images: Tensor, blocks: int | Sequence[int]) -> list[Tokens]:
        """Tokens, with attention, of chosen blocks; the final norm is applied to each. No block after them is run.

        Args:
            images: float [images, 3, height, width], normalised.
            blocks: which, in the order wanted (`block_numbers`); or how many last ones, earlier block first.

        Raises:
            ConfigError: there is no such block.
        """
        wanted = block_numbers(range(-blocks, 0) if isinstance(blocks, int) else blocks, len(self.blocks))
        x = self.embed(images)
        rotation = self.rotation(*images.shape[-2:])
        found: dict[int, Tokens] = {}
        for number, block in enumerate(self.blocks, 1):
            if number > max(wanted):
                break
            assert isinstance(block, Block)
            if number in wanted:
                x, row = block.with_attention(x, rotation)
                found[number] = self._tokens(x, row)
            else:
                x = block(x, rotation)
        return [found[number] for number in wanted]

    def embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Tokens before the first block: [images, 1 + registers + patches, dim].

        A masked patch keeps its own position: the mask token replaces its content only.
        """
        x = self.patch_embed(images)  # [images, patches, dim]
        if masks is not None:
            x = torch.where(masks.flatten(1).unsqueeze(-1), self.mask_token.to(x.dtype), x)
        cls: Tensor = self.cls_token
        if not self.rotary_dim:
            positions = self.positions(*images.shape[-2:])
            cls, x = cls + positions[:, :1], x + positions[:, 1:]  # [1, 1, dim], [images, patches, dim]
        parts = [cls.expand(x.shape[0], -1, -1), x]
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
        return resized_positions(self.pos_embed, rows, columns)

    def rotation(self, height: int, width: int) -> Rotation | None:
        """Rotary positions for an image of that many pixels; None if positions are stored.

        The centre of a patch is at -1 to 1 along each axis; its angles are 2 pi times that, times 100^-f for the
        frequencies f in [0, 1). The first quarter of a head's channels turns with the third by the row, the second
        with the fourth by the column.
        """
        if not self.rotary_dim:
            return None
        device = self.cls_token.device
        steps = torch.arange(self.rotary_dim // 4, device=device, dtype=torch.float32) / (self.rotary_dim // 4)
        # a quarter of the head's channels; below, [rows, quarter] and [columns, quarter]
        frequencies = 2 * math.pi * ROTARY_BASE**-steps
        rows, columns = (
            ((torch.arange(count, device=device, dtype=torch.float32) + 0.5) / count * 2 - 1)[:, None] * frequencies
            for count in (height // self.patch_size, width // self.patch_size)
        )
        grid = torch.broadcast_tensors(rows[:, None], columns[None])  # two of [rows, columns, quarter]
        angles = torch.cat([*grid, *grid], dim=-1).flatten(0, 1)  # [patches, head dim]
        return angles.cos(), angles.sin()

    def _tokens(self, x: Tensor, attention: Tensor | None) -> Tokens:
        x = self.norm(x)  # [images, 1 + registers + patches, dim]
        return Tokens(x[:, 0], x[:, 1 + self.register_tokens :], attention)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters(recurse=False):
            if name != "mask_token":
                nn.init.trunc_normal_(parameter, std=0.02)


def check_sizes(image_size: int, patch_size: int, embed_dim: int, num_heads: int, *, rotary: bool) -> None:
    """Raise `ConfigError` if sizes do not divide."""
    if embed_dim % num_heads:
        raise ConfigError(f"model.embed_dim={embed_dim} is not divisible by model.num_heads={num_heads}")
    if image_size % patch_size:
        raise ConfigError(f"model.image_size={image_size} is not divisible by model.patch_size={patch_size}")
    if rotary and embed_dim // num_heads % 4:
        raise ConfigError(f"model.rotary needs heads of a multiple of 4 channels, not of {embed_dim // num_heads}")


def layer_of(name: str, depth: int) -> int:
    """The layer of a backbone's weight: 0 before the blocks, 1 to depth for a block, depth + 1 for the final norm."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1 if name.startswith("norm.") else 0


def block_numbers(blocks: Sequence[int], depth: int) -> list[int]:
    """Blocks counted from 1, of such as may be counted from the end (-1 is the last).

    Raises:
        ConfigError: there is no such block, or one is named twice.
    """
    numbers = [depth + 1 + block if block < 0 else block for block in blocks]
    for block, number in zip(blocks, numbers, strict=True):
        if not 1 <= number <= depth:
            raise ConfigError(f"features.blocks: there is no block {block}, the backbone has {depth}")
        if numbers.count(number) > 1:
            raise ConfigError(f"features.blocks: block {number} is named twice")
    return numbers


def resized_positions(stored: Tensor, rows: int, columns: int) -> Tensor:
    """Stored positions [1, 1 + side * side, dim] for another patch grid, [1, 1 + rows * columns, dim]; [CLS] stays."""
    side = math.isqrt(stored.shape[1] - 1)
    native = stored[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, dim, side, side]
    factor = ((rows + 0.1) / side, (columns + 0.1) / side)
    grid = F.interpolate(native, scale_factor=factor, mode="bicubic")  # [1, dim, rows, columns]
    return torch.cat([stored[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def patch_attention(attention: Tensor, patches: int) -> Tensor:
    """Weights of the patches from a [CLS] attention row: heads averaged, other entries dropped, sum 1.

    Args:
        attention: [images, heads, 1 + registers + patches].
        patches: number of patches.

    Returns:
        [images, patches].
    """
    weights = attention.mean(dim=1)[:, -patches:]  # [images, patches]
    # all attention may rest on [CLS] itself
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
