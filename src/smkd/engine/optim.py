"""The optimiser: parameter groups, clipping of each tensor, and the frozen last layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from smkd import distributed


def parameter_groups(model: nn.Module) -> list[dict[str, list[nn.Parameter]]]:
    """Two groups: decayed, and (biases and one-dimensional tensors) not decayed; frozen parameters in neither."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if is_decayed(name, parameter) else plain).append(parameter)
    return [{"params": decayed}, {"params": plain}]


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter."""
    return not name.endswith(".bias") and parameter.ndim != 1


def make_optimizer(model: nn.Module, device: torch.device) -> torch.optim.AdamW:
    """AdamW, fused where the device has it; rates are set each step by `set_rates`."""
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameter_groups(model), lr=0.0, weight_decay=0.0, fused=fused)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Learning rate of both groups, weight decay of the first."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


@torch.no_grad()
def not_finite(loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Whether a loss or the norm of a gradient is infinite or NaN, on any process; bool [], on the device."""
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
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
    factors = (limit / (torch.stack(torch._foreach_norm(grads)) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, factors.unbind())


def drop_last_layer_gradients(model: nn.Module) -> None:
    """Leave the prototypes out of this step: no update, no decay, no optimiser state."""
    for name, parameter in model.named_parameters():
        if "last_layer" in name:
            parameter.grad = None
