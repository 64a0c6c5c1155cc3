"""Student and teacher shared out to the devices (FSDP2): each keeps a part of every weight, gradient and moment.

A block's weights are put together where it runs, and taken apart again behind it; the weights outside the blocks, for
the whole forward and backward pass. Checkpoints hold whole tensors, so they do not tell how a run was shared out.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from smkd import distributed
from smkd.errors import ConfigError
from smkd.models.pair import StudentTeacher
from smkd.models.vit import VisionTransformer

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PARTS = "torch.distributed.tensor"
"""The module of shared out tensors. It takes a second to load, which only a run that shares out should wait for."""


def share_out(pair: StudentTeacher, device: torch.device, autocast: torch.dtype | None) -> None:
    """Leave each process its part of student and teacher, on its device; no device ever holds the whole of them.

    Args:
        pair: networks on the CPU, the same in all processes.
        device: of this process.
        autocast: type of matrix products.

    Raises:
        ConfigError: a device or a precision that cannot do it.
    """
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"shard=full works on CUDA and the CPU, not on {device.type}; use shard=none")
    if autocast == torch.float16:
        raise ConfigError("shard=full does not scale the losses of float16, which precision=auto takes here; "
                          "use precision=fp32, or shard=none")  # fmt: skip
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # nothing here or in the objective changes an output in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for network in (pair.student, pair.teacher):
        for block in network.backbone.blocks:
            fully_shard(block, mesh=mesh)
            register_fsdp_forward_method(block, "cls_attention")
        fully_shard(network, mesh=mesh)
    # no backward pass takes the teacher's weights outside its blocks apart again
    pair.teacher.register_forward_hook(_taken_apart)


def _taken_apart(network: Any, *_: object) -> None:
    network.reshard()


def _is_part(value: object) -> TypeGuard[DTensor]:
    """Whether it is this process's part of a tensor; before the module is loaded there is none."""
    return PARTS in sys.modules and isinstance(value, sys.modules[PARTS].DTensor)


def is_shared_out(network: nn.Module) -> bool:
    """Whether each process holds only a part of a network's weights."""
    return any(_is_part(each) for each in network.parameters())


def whole(state: Any) -> Any:
    """Nested dictionaries, lists and tuples with each tensor whole; all processes call it, for the first one.

    One tensor is put together at a time and kept on the CPU by the first process; the others get None for it. What is
    not shared out stays as it is.
    """
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(whole, state))
    if not _is_part(state):
        return state
    full: Tensor = state.full_tensor()
    return full.detach().cpu() if distributed.is_main() else None


def part_like(value: Any, own: Tensor) -> Any:
    """This process's part of a whole tensor, shared out as `own` of the same shape is; anything else as it is."""
    if not _is_part(own) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    here = value.to(own.device)
    return distribute_tensor(here, own.device_mesh, own.placements, src_data_rank=None)


def whole_backbone(backbone: VisionTransformer, device: torch.device) -> VisionTransformer:
    """A backbone as a process evaluates it: itself, or a whole copy where it is shared out. All processes call it."""
    if not is_shared_out(backbone):
        return backbone
    weights = {name: each.full_tensor() if _is_part(each) else each for name, each in backbone.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        return VisionTransformer.with_weights(backbone.config, weights).to(device)


@torch.no_grad()
def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds of each tensor, as ordinary tensors in the same memory."""
    return [each.to_local() if _is_part(each) else each for each in tensors]


@torch.no_grad()
def norms(tensors: list[Tensor]) -> Tensor:
    """The norm of each whole tensor, [tensors]; they are shared out all or none."""
    found = torch.stack(torch._foreach_norm(local_parts(tensors)))  # [tensors]
    if not _is_part(tensors[0]):
        return found
    of_parts = distributed.gather(found[None], dim=0)  # [processes, tensors]
    joined: Tensor = torch.linalg.vector_norm(of_parts, dim=0, dtype=torch.float64)  # [tensors]
    return joined.to(found.dtype)
