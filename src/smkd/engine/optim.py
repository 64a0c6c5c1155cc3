"""The optimiser: rates of a step, parameter groups, clipping, the frozen last layer, compiled backbones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from smkd import distributed
from smkd.config.run_config import RunConfig
from smkd.config.schema import TemperatureConfig
from smkd.engine import shard
from smkd.models.pair import Network, StudentTeacher
from smkd.models.vit import layer_of
from smkd.weights.rename import BACKBONE


@dataclass(frozen=True)
class Rates:
    """The rates of one optimiser step."""

    lr: float
    weight_decay: float
    teacher_momentum: float
    cls_temperature: float
    patch_temperature: float
    last_layer_frozen: bool


def line(start: float, end: float, points: int, index: int) -> float:
    """Point `index` of `points` evenly spaced ones from start to end, both included."""
    return start if points == 1 else start + (end - start) * index / (points - 1)


def cosine(start: float, end: float, steps: int, step: int, warmup_steps: int = 0) -> float:
    """Linear warm-up from 0 to `start`, then half a cosine towards `end`.

    The warm-up includes both its ends, so the first value is 0 and `start` occurs in two steps. The cosine divides by
    its number of steps, so the last value is not quite `end`.
    """
    if step < warmup_steps:
        return line(0.0, start, warmup_steps, step)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def teacher_temperature(config: TemperatureConfig, epoch: int, hold_epochs: int = 0) -> float:
    """Teacher temperature of an epoch: `hold_epochs` at the start value, a linear warm-up, then the end value."""
    if epoch < hold_epochs:
        return config.start
    epoch -= hold_epochs
    return line(config.start, config.end, config.warmup_epochs, epoch) if epoch < config.warmup_epochs else config.end


def rates_at(config: RunConfig, step: int, steps_per_epoch: int) -> Rates:
    """All rates of an optimiser step, counted from 0 over the whole run."""
    optim, objective = config.optim, config.objective
    epoch, steps = step // steps_per_epoch, config.epochs * steps_per_epoch
    return Rates(
        lr=cosine(optim.lr, optim.lr_end, steps, step, optim.warmup_epochs * steps_per_epoch),
        weight_decay=cosine(optim.weight_decay, optim.weight_decay_end, steps, step),
        teacher_momentum=cosine(optim.teacher_momentum, optim.teacher_momentum_end, steps, step),
        cls_temperature=teacher_temperature(objective.cls_temperature, epoch),
        patch_temperature=teacher_temperature(objective.patch_temperature, epoch, config.mask.start_epoch),
        last_layer_frozen=epoch < optim.freeze_last_layer_epochs,
    )


class ParameterGroup(NamedTuple):
    """Parameters of one learning rate and one weight decay.

    Attributes:
        named: the parameters by name.
        factor: by which their learning rate differs from the step's.
        decayed: whether weight decay applies to them.
    """

    named: dict[str, nn.Parameter]
    factor: float
    decayed: bool


def grouped(student: Network, config: RunConfig) -> list[ParameterGroup]:
    """The parameters that a run of this configuration trains, in the optimiser's groups and order.

    Weight decay applies to none that is a bias or has one dimension. The heads are groups of their own where they
    have a rate of their own.
    """
    own = None if config.optim.head_lr is None else config.optim.head_lr / config.optim.lr
    depth = len(student.backbone.blocks)
    frozen = -1 if config.model.last_trained is None else depth - config.model.last_trained
    groups: dict[tuple[bool, bool], ParameterGroup] = {}
    for name, parameter in student.named_parameters():
        of_head = not name.startswith(BACKBONE)
        if not of_head and layer_of(name.removeprefix(BACKBONE), depth) <= frozen:
            continue
        if config.head.fixed_norm and name.endswith("weight_g"):
            continue
        apart, factor = (True, own) if of_head and own is not None else (False, 1.0)
        decayed = is_decayed(name, parameter)
        groups.setdefault((apart, not decayed), ParameterGroup({}, factor, decayed)).named[name] = parameter
    return [groups[key] for key in sorted(groups)]


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter."""
    return not name.endswith(".bias") and parameter.ndim != 1


def make_optimizer(student: Network, device: torch.device, config: RunConfig) -> torch.optim.AdamW:
    """AdamW of the groups (`grouped`), fused where the device has it; rates are set each step by `set_rates`."""
    groups = [
        {"params": list(group.named.values()), "factor": group.factor, "decayed": group.decayed}
        for group in grouped(student, config)
    ]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=device.type in ("cpu", "cuda"))


def set_rates(optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    """Learning rates of all groups, and the weight decay of those that are decayed."""
    for group in optimizer.param_groups:
        group["lr"] = rates.lr * group["factor"]
        group["weight_decay"] = rates.weight_decay if group["decayed"] else 0.0


@torch.no_grad()
def not_finite(loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Whether a loss or the norm of a gradient is infinite or NaN, on any process; bool [], on the device."""
    norms = torch._foreach_norm(shard.local_parts(p.grad for p in parameters if p.grad is not None))
    return distributed.anywhere(~torch.stack([loss.float(), *(norm.float() for norm in norms)]).sum().isfinite())


def step_unless(optimizer: torch.optim.AdamW, skip: Tensor) -> None:
    """A step that changes neither weights nor the optimiser's state where `skip` (bool [], on the device) is true.

    An optimiser that is not fused (on MPS) moves the weights by its momentum then, as if the gradient were zero.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]  # read by the fused kernels
    else:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad = torch.where(skip, 0, parameter.grad)
    optimizer.step()


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scale each gradient whose norm exceeds `limit` down to it; 0 does nothing."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if limit <= 0 or not grads:
        return
    factors = (limit / (shard.norms(grads) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(shard.local_parts(grads), factors.unbind())


def drop_last_layer_gradients(model: nn.Module) -> None:
    """Drop the prototypes' gradients, so that this step neither updates nor decays them, nor their optimiser state."""
    for name, parameter in model.named_parameters():
        if "last_layer" in name:
            parameter.grad = None


def compile_backbones(
    pair: StudentTeacher, wanted: bool | Literal["auto"], device: torch.device, say: Callable[[str], None]
) -> None:
    """Compile the forward passes of training; 'auto' does so on CUDA, but not of networks that are shared out.

    Evaluation uses the last blocks at other sizes, and is not compiled.

    Args:
        pair: both backbones.
        wanted: the run's `compile`.
        device: of the networks.
        say: told in one line if the compiler fails at the first batch; the run then goes on without it.
    """
    if wanted is True or (wanted == "auto" and device.type == "cuda" and not shard.is_shared_out(pair)):
        for backbone in (pair.student.backbone, pair.teacher.backbone):
            _compile(backbone, say)


def _compile(module: nn.Module, say: Callable[[str], None]) -> None:
    from torch._dynamo.exc import TorchDynamoException  # takes half a second

    plain = module.forward
    # the two sizes of views are two programs; one for any size would be slower
    compiled = torch.compile(plain, dynamic=False)

    def forward(*inputs: Any, **options: Any) -> Any:
        try:
            return compiled(*inputs, **options)
        except TorchDynamoException as error:
            module.forward = plain
            cause = getattr(error, "inner_exception", error)
            reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
            say(f"torch.compile does not work here, going on without it: {reason}")
            return plain(*inputs, **options)

    module.forward = forward
