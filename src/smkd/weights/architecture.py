"""The architecture of a ViT, read from the shapes of its weights; and checks that weights are plain finite floats."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

import torch

from smkd.config.schema import HeadConfig, ModelConfig
from smkd.errors import CheckpointError
from smkd.files import listed
from smkd.models.block import Block
from smkd.models.head import ProjectionHead
from smkd.models.vit import SIZES, VisionTransformer, check_sizes
from smkd.weights.attention_heads import known_heads
from smkd.weights.rename import State

WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Architecture:
    """The parts of a ViT that its weights depend on. The image side is not one: it only sets the stored positions."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    register_tokens: int
    layer_scale: bool
    rotary: bool
    mlp_dim: int
    swiglu: bool

    @staticmethod
    def of(config: ModelConfig) -> Architecture:
        """That of a configured backbone."""
        dim, depth, heads = SIZES[config.size]
        return Architecture(
            config.embed_dim or dim, config.depth or depth, config.num_heads or heads, config.patch_size,
            config.register_tokens, config.layer_scale is not None, config.rotary,
            config.mlp_dim or 4 * (config.embed_dim or dim), config.swiglu,
        )  # fmt: skip

    def configured(self, base: ModelConfig, image_size: int) -> ModelConfig:
        """The configuration of this ViT; stochastic depth stays that of `base`."""
        named = {sizes: name for name, sizes in SIZES.items()}
        size = named.get((self.embed_dim, self.depth, self.num_heads))
        own = {} if size else {"embed_dim": self.embed_dim, "depth": self.depth, "num_heads": self.num_heads}
        return ModelConfig.model_validate({
            "size": size or base.size, **own, "patch_size": self.patch_size, "image_size": image_size,
            "drop_path": base.drop_path, "layer_scale": 1.0 if self.layer_scale else None,
            "register_tokens": self.register_tokens, "rotary": self.rotary, "swiglu": self.swiglu,
            "mlp_dim": None if self.mlp_dim == 4 * self.embed_dim else self.mlp_dim,
        })  # fmt: skip

    def __str__(self) -> str:
        extras = [f"{self.register_tokens} registers"] * bool(self.register_tokens) + ["LayerScale"] * self.layer_scale
        extras += ["rotary positions"] * self.rotary + ["SwiGLU"] * self.swiglu
        extras += [f"MLPs of {self.mlp_dim}"] * (self.mlp_dim != 4 * self.embed_dim)
        return ", ".join([
            f"{self.embed_dim} channels, {self.depth} blocks, {self.num_heads} heads, patches of {self.patch_size}",
            *extras,
        ])  # fmt: skip

    def settings(self, other: Architecture) -> str:
        """The settings, as words, that turn another architecture into this one."""
        mine, theirs = asdict(self), asdict(other)
        words = {key: value for key, value in mine.items() if value != theirs[key]}
        if "layer_scale" in words:
            words["layer_scale"] = 1.0 if self.layer_scale else "null"
        words |= {key: str(words[key]).lower() for key in ("rotary", "swiglu") if key in words}
        return " ".join(f"model.{key}={value}" for key, value in words.items())


def read_architecture(
    weights: State, file: str, heads: int | None, rotary_side: int | None
) -> tuple[Architecture, int]:
    """Architecture and native image side of a backbone under our names.

    Args:
        weights: dense tensors.
        file: what messages call it.
        heads: number of attention heads, where it is known; else that of published ViTs of the size, or a guess.
        rotary_side: image side to note down where positions are rotary, as those suit any; None if they are stored.

    Raises:
        CheckpointError: it is a ViT of a kind that this package does not have.
    """
    dim, depth = size_of(weights, file)
    patch = weights["patch_embed.proj.weight"].shape[2]
    rotary = rotary_side is not None
    count = known_heads(dim, depth, rotary, file).number if heads is None else heads
    if dim % count:
        raise CheckpointError(f"'{file}': {dim} channels are not divisible by {count} heads")
    mlp_dim, swiglu = _mlp(weights, dim)
    architecture = Architecture(
        embed_dim=dim, depth=depth, num_heads=count, patch_size=patch, register_tokens=_registers(weights, file),
        layer_scale="blocks.0.ls1.gamma" in weights, rotary=rotary, mlp_dim=mlp_dim, swiglu=swiglu,
    )  # fmt: skip
    return architecture, (grid_side(weights, file) if rotary_side is None else max(1, rotary_side // patch)) * patch


def size_of(weights: State, file: str) -> tuple[int, int]:
    """Channels and blocks of a backbone under our names.

    Raises:
        CheckpointError: it is a ViT of a kind that this package does not have.
    """
    _refuse_other_kinds(weights, file)
    filters = weights.get("patch_embed.proj.weight", torch.empty(0))
    if filters.ndim != 4 or filters.shape[1] != 3 or filters.shape[2] != filters.shape[3]:
        raise CheckpointError(
            f"'{file}': patch_embed.proj.weight is {list(filters.shape)}; only square patches of three colours fit"
        )
    numbers = {int(match[1]) for match in (re.match(r"blocks\.([0-9]{1,9})\.", name) for name in weights) if match}
    depth = max(numbers, default=-1) + 1
    if not 0 < depth <= len(weights):
        raise CheckpointError(f"'{file}' lacks blocks: it has {len(numbers)}, numbered up to {depth - 1}")
    return filters.shape[0], depth


def check_described(weights: State, model: ModelConfig, file: str) -> None:
    """Refuse weights that do not fit the settings beside them, before a network of these settings is made.

    Args:
        weights: dense tensors of floats.
        model: the settings that came with them.
        file: what messages call both.

    Raises:
        CheckpointError: they do not fit together.
    """
    told = Architecture.of(model)
    found, side = read_architecture(weights, file, told.num_heads, model.image_size if model.rotary else None)
    if found != told or (side != model.image_size and not model.rotary):
        words = found.settings(told) or f"model.image_size={side}"
        raise CheckpointError(f"'{file}': its weights do not fit its settings; the weights have {words}")
    mask = {"mask_token": (1, 1, found.embed_dim)} if "mask_token" in weights else {}
    check_shapes(weights, weight_shapes(model) | mask, file)


def check_shapes(
    weights: State, expected: Mapping[str, tuple[int, ...]], file: str,
    allow_missing: Collection[str] = (), hint: str = "",
) -> None:  # fmt: skip
    """Refuse a backbone that has other weights than ours of its architecture; the mask token may be there.

    Raises:
        CheckpointError: weights are missing, have no place here, or another shape; names them.
    """
    if unexpected := sorted(weights.keys() - expected.keys() - {"mask_token"}):
        raise CheckpointError(
            f"'{file}' is another kind of ViT: its backbone also has {len(unexpected)} weights that ours has no place "
            f"for: {listed(unexpected)}"
        )
    if missing := sorted(expected.keys() - weights.keys() - set(allow_missing)):
        raise CheckpointError(f"'{file}' lacks {len(missing)} weights of the backbone: {listed(missing)}{hint}")
    for name, shape in expected.items():
        if name in weights and tuple(weights[name].shape) != shape:
            raise CheckpointError(
                f"'{file}' is another kind of ViT: {name} is {list(weights[name].shape)}, ours is {list(shape)}"
            )


def weight_fault(value: torch.Tensor) -> str:
    """What is wrong with a tensor of weights, in words; empty for a dense tensor of floats."""
    if value.is_nested or value.layout != torch.strided:
        return "sparse or nested; weights should be dense"
    if value.device.type == "meta":
        return "without numbers (a 'meta' tensor)"
    if value.dtype not in WEIGHT_TYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHT_TYPES)
        return f"{str(value.dtype).removeprefix('torch.')}; weights should be {names}"
    return ""


def check_finite(weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse weights that are NaN or infinite.

    Args:
        weights: dense tensors of floats, by name.
        where: what messages call the file or network.

    Raises:
        CheckpointError: one is not finite; names it.
    """
    for name, value in weights.items():
        bad = value.numel() - int(value.isfinite().sum())
        if bad:
            raise CheckpointError(f"'{where}': {bad} of {value.numel()} numbers of {name} are NaN or infinite")


def _mlp(weights: State, dim: int) -> tuple[int, bool]:
    """Hidden channels of the first block's MLP, and whether it is gated; the usual where it is missing."""
    first, second = (weights.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    if first is None or second is None or first.ndim != 2 or second.ndim != 2:
        return 4 * dim, False
    return second.shape[1], len(first) == 2 * second.shape[1]


def _registers(weights: State, file: str) -> int:
    if "reg_token" not in weights:
        return 0
    registers = weights["reg_token"]
    if registers.ndim != 3:
        raise CheckpointError(f"'{file}': reg_token is {list(registers.shape)}, expected [1, tokens, channels]")
    return registers.shape[1]


def grid_side(weights: State, file: str) -> int:
    """Patches along a side of the image that the stored positions are for."""
    if "pos_embed" not in weights:
        raise CheckpointError(f"'{file}' lacks pos_embed")
    positions = weights["pos_embed"]
    count = positions.shape[-2] if positions.ndim > 1 else 0
    for patches in (count - 1, count):
        if patches and math.isqrt(patches) ** 2 == patches:
            return math.isqrt(patches)
    raise CheckpointError(f"'{file}': {count} positions are no square of patches, with or without a [CLS] token")


def weight_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a configured backbone, which is not made, without the mask token.

    Raises:
        ConfigError: sizes that do not divide.
    """
    told, patch = Architecture.of(model), model.patch_size
    dim, side = told.embed_dim, model.image_size // patch
    check_sizes(model.image_size, patch, dim, told.num_heads, rotary=told.rotary)
    with torch.device("meta"):
        block = Block(dim, told.num_heads, 0.0, model.layer_scale, mlp_dim=told.mlp_dim, swiglu=told.swiglu)
    shapes = {
        "cls_token": (1, 1, dim), "pos_embed": (1, 1 + side**2, dim), "reg_token": (1, told.register_tokens, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,),
        **{
            f"blocks.{number}.{name}": tuple(value.shape)
            for number in range(told.depth) for name, value in block.state_dict().items()
        },
        "norm.weight": (dim,), "norm.bias": (dim,),
    }  # fmt: skip
    absent = ["pos_embed"] * told.rotary + ["reg_token"] * (not told.register_tokens)
    return {name: shape for name, shape in shapes.items() if name not in absent}


def fresh_weights(model: ModelConfig, depth: int) -> State:
    """A backbone as training begins; the blocks are copies of one, which is all that is built."""
    one = VisionTransformer.from_config(model.model_copy(update={"depth": 1})).state_dict()
    start = "blocks.0."
    return {
        name.replace(start, f"blocks.{number}.") if name.startswith(start) else name: value
        for name, value in one.items()
        for number in (range(depth) if name.startswith(start) else [0])
    }


def head_config(head: State, dim: int, base: HeadConfig) -> HeadConfig | None:
    """Configuration of a projection head under our names; None if its parts do not fit together.

    Args:
        head: its weights.
        dim: channels that it takes.
        base: what weights do not say.
    """
    layers = {int(name.split(".")[1]): value for name, value in head.items() if name.endswith(".weight")}
    second = head.get("last_layer2.weight_v")
    changes = {
        "num_prototypes": len(head["last_layer.weight_v"]), "bottleneck_dim": head["last_layer.weight_v"].shape[1],
        "num_patch_prototypes": None if second is None else len(second), "layers": len(layers),
    }  # fmt: skip
    if len(layers) > 1:
        changes["hidden_dim"] = len(layers[min(layers)])
    found = base.model_copy(update=changes)
    return found if head_shapes(dim, found) == {name: tuple(value.shape) for name, value in head.items()} else None


def head_shapes(dim: int, config: HeadConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a configured projection head on `dim` channels."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in ProjectionHead(dim, config).state_dict().items()}


def with_positions_of_cls(positions: torch.Tensor) -> torch.Tensor:
    """Stored positions with a zero for [CLS] in front, if it has none of its own."""
    if math.isqrt(positions.shape[-2]) ** 2 != positions.shape[-2]:
        return positions
    return torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)


def _refuse_other_kinds(weights: State, file: str) -> None:
    no_positions = "pos_embed" not in weights
    kinds = {
        "relative positions": no_positions and any(name.endswith("_bias_table") for name in weights),
        "a distillation token": "dist_token" in weights,
        "no [CLS] token": "cls_token" not in weights,
    }
    for kind, found in kinds.items():
        if found:
            raise CheckpointError(f"'{file}' holds a ViT with {kind}; this package has none of that kind")
