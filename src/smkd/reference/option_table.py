"""Options of the reference's scripts, one by one: our setting for each, or why it has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smkd.config.schema import MOST_BLOCKS
from smkd.errors import ConfigError

DottedSettings = dict[str, Any]
"""Settings by their dotted names."""


@dataclass(frozen=True)
class Option:
    """The translation of one option.

    Attributes:
        default: of the reference's script.
        keys: our settings that take its value.
        convert: from its value to ours.
        meaningless: why it has no meaning here; empty if it has.
    """

    default: Any
    keys: tuple[str, ...] = ()
    convert: Callable[[Any], Any] = lambda value: value
    meaningless: str = ""


def flag(value: Any) -> bool:
    """A truth value as the reference's scripts read them."""
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "1", "on", "yes", "y", "t"):
        return True
    if str(value).lower() in ("false", "0", "off", "no", "n", "f"):
        return False
    raise ConfigError(f"'{value}' is neither true nor false")


def number(value: Any) -> float | int:
    """A whole number where it is one."""
    try:
        exact = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"'{value}' is not a number") from None
    if not math.isfinite(exact):
        raise ConfigError(f"'{value}' is not a number")
    return int(exact) if exact.is_integer() and not any(sign in str(value) for sign in ".eE") else exact


def several(value: Any) -> list[float | int]:
    """A list of numbers; also one written as Python prints it."""
    if isinstance(value, str) and value[:1] in ("(", "["):
        value = value.strip("()[]").replace(",", " ").split()
    return [number(item) for item in (value if isinstance(value, list | tuple) else [value])]


def last_blocks(value: Any) -> list[int]:
    """Block numbers of so many last blocks."""
    count = number(value)
    if not isinstance(count, int) or not 1 <= count <= MOST_BLOCKS:
        raise ConfigError(f"'{value}' is not 1 to {MOST_BLOCKS} blocks")
    return list(range(-count, 0))


def _size(value: Any) -> str:
    sizes = {"vit_tiny": "tiny", "vit_small": "small", "vit_base": "base", "deit_tiny": "tiny", "deit_small": "small"}
    if str(value) not in sizes:
        raise ConfigError(f"'{value}' is none of {', '.join(sizes)}")
    return sizes[str(value)]


def _seldom(value: Any) -> float | int:
    return 0 if value in (None, "None", "none") else number(value)


def _given(*keys: str, default: Any, convert: Callable[[Any], Any] = number) -> Option:
    return Option(default, keys, convert)


def _nothing(why: str, default: Any = None) -> Option:
    return Option(default, meaningless=why)


_MACHINE = "torchrun's variables and devices= say that here"
_WANDB = "W&B is on with wandb=true only"
_PICTURES = "training draws no pictures here"
_FEATURES = "`smkd features` writes features"
_NO_EFFECT = "has no effect in the reference either"

COMMON_OPTIONS: dict[str, Option] = {
    "arch": _given("model.size", default="vit_small", convert=_size),
    "patch_size": _given("model.patch_size", default=16),
    "num_workers": _given("num_workers", default=None),
    "p_scale": _nothing(_NO_EFFECT),
    "wp_scale": _nothing(_NO_EFFECT),
    "dist_url": _nothing(_MACHINE),
    "local_rank": _nothing(_MACHINE),
    "gpu": _nothing(_MACHINE),
    "rank": _nothing(_MACHINE),
    "world_size": _nothing(_MACHINE),
    "dist_backend": _nothing(_MACHINE),
    "checkpoint_key": _nothing("the teacher is measured; `smkd features --network student` takes the other"),
    "partition": Option("test"),
    "num_ways": Option(5),
    "evaluation_method": Option("cosine"),
    "top_k": Option(5),
    "cls_tokens": Option(True),
    "avgpool_patchtokens": Option(False),
    "weighted_avgpool_patchtokens": Option(True),
    "img_size_imagenet": Option(256),
    "img_resize_imagenet": Option(224),
    "img_size_cifar": Option(256),
    "img_resize_cifar": Option(224),
}
TRAINING_OPTIONS: dict[str, Option] = COMMON_OPTIONS | {
    "prod_mode": _nothing(_WANDB),
    "wandb_project_name": _nothing(_WANDB),
    "wandb_entity": _nothing(_WANDB),
    "out_dim": _given("head.num_prototypes", default=8192),
    "patch_out_dim": Option(8192),
    "shared_head": Option(True),
    "shared_head_teacher": Option(True),
    "norm_last_layer": _given("head.fixed_norm", default=False, convert=flag),
    "norm_in_head": Option(None),
    "act_in_head": Option("gelu"),
    "momentum_teacher": _given("optim.teacher_momentum", default=0.996),
    "warmup_teacher_temp": _given("objective.cls_temperature.start", default=0.04),
    "teacher_temp": _given("objective.cls_temperature.end", default=0.07),
    "warmup_teacher_patch_temp": _given("objective.patch_temperature.start", default=0.04),
    "teacher_patch_temp": _given("objective.patch_temperature.end", default=0.07),
    "warmup_teacher_temp_epochs": _given(
        "objective.cls_temperature.warmup_epochs", "objective.patch_temperature.warmup_epochs", default=30
    ),
    "use_fp16": _given("precision", default=True, convert=lambda value: "auto" if flag(value) else "fp32"),
    "weight_decay": _given("optim.weight_decay", default=0.04),
    "weight_decay_end": _given("optim.weight_decay_end", default=0.4),
    "clip_grad": _given("optim.clip_norm", default=3.0),
    "batch_size_per_gpu": Option(64),
    "epochs": _given("epochs", default=400),
    "freeze_last_layer": _given("optim.freeze_last_layer_epochs", default=1),
    "lr": _given("optim.lr", default=5e-4),
    "warmup_epochs": _given("optim.warmup_epochs", default=10),
    "min_lr": _given("optim.lr_end", default=1e-5),
    "optimizer": Option("adamw"),
    "drop_path": _given("model.drop_path", default=0.1),
    "global_crops_scale": _given("global_views.scale", default=[0.25, 1.0], convert=several),
    "local_crops_scale": _given("local_views.scale", default=[0.05, 0.25], convert=several),
    "global_crops_number": _given("global_views.count", default=2),
    "local_crops_number": _given("local_views.count", default=10),
    "global_crops_size": _given("global_views.size", default=224),
    "local_crops_size": _given("local_views.size", default=96),
    "data_path": Option(None),
    "output_dir": _given("out", default=None, convert=str),
    "pretrained_path": Option(None),
    "pretrained_file": Option(None),
    "saveckp_freq": _given("save_every", default=50, convert=_seldom),
    "seed": _given("seed", default=0),
    "lambda1": _given("objective.cls.weight", default=1.0),
    "lambda2": _given("objective.patch.weight", default=1.0),
    "lambda3": _given("objective.mim.weight", default=0.0),
    "supervised_loss": Option(False),
    "celoss_coefficient": Option(0.0),
    "supervised_contrastive": _given("objective.labels", default=False, convert=flag),
    "weighted_pool": _given(
        "objective.patch.weighting", default=False, convert=lambda value: "attention" if flag(value) else "mean"
    ),
    "evaluation_batch_size_per_gpu": _nothing("images are measured in batches that need no setting"),
    "evaluate_freq": _given("validation.every", default=50, convert=_seldom),
    "save_features": _nothing(_FEATURES),
    "visualization_freq": _nothing(_PICTURES),
    "image_path": _nothing(_PICTURES),
    "image_size": _nothing(_PICTURES),
    "image_threshold": _nothing(_PICTURES),
    "pred_ratio": _given("mask.ratio", default=[0.0, 0.3], convert=several),
    "pred_ratio_var": _given("mask.ratio_jitter", default=[0.0, 0.2], convert=several),
    "pred_shape": _given(
        "mask.shape", default="block", convert=lambda value: {"rand": "random"}.get(str(value), value)
    ),
    "pred_start_epoch": _given("mask.start_epoch", default=0),
    "use_masked_im_modeling": Option(True),
    "num_shots": _nothing("validation.shots takes both 1 and 5"),
    "dataset_name": _nothing("data.dataset says that, from the folder's name"),
}  # fmt: skip
EVALUATION_OPTIONS: dict[str, Option] = COMMON_OPTIONS | {
    "server": Option("mini"),
    "num_shots": _given("evaluation.shots", default=1, convert=several),
    "top_k": Option(1),
    "img_size_imagenet": Option(360),
    "img_resize_imagenet": Option(320),
    "n": _given("features.blocks", default=1, convert=last_blocks),
    "iter_num": Option(10_000),
    "seed": _given("evaluation.seed", default=0),
    "ckp_path": Option(""),
    "ckpt_filename": Option(""),
    "output_dir": _nothing("`smkd eval --json FILE` writes the results"),
    "epochs": _nothing("name the checkpoint itself"),
    "pretrained_weights": _nothing("name the checkpoint itself"),
    "batch_size_per_gpu": _nothing("images are measured in batches that need no setting"),
    "save": _nothing(_FEATURES),
    "isfile": _nothing(_FEATURES),
    "n_last_blocks": _nothing(_NO_EFFECT),
    "knn": _nothing(_NO_EFFECT),
    "both": _nothing(_NO_EFFECT),
    "num_labels": _nothing(_NO_EFFECT),
    "dataset_name": _nothing(_NO_EFFECT),
    "lr": _nothing("the classifier's settings are options of its head"),
    "loss_type": _nothing("the classifier's settings are options of its head"),
}
