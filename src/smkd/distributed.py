"""Rank, size and reductions over processes; with one process everything is a no-op."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def initialise(device: torch.device) -> None:
    """Join the process group that torchrun's variables describe, if there are any."""
    if "RANK" in os.environ and not dist.is_initialized():
        # what lies on the CPU stays there: the device is not waited for
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and talks to the user."""
    return rank() == 0


def gather(x: Tensor, dim: int) -> Tensor:
    """Tensors of equal shape from all processes, concatenated in rank order; no gradient flows through."""
    if world_size() == 1:
        return x
    sent = x.detach().contiguous()
    parts = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(parts, sent)
    return torch.cat(parts, dim=dim)


def gather_object(value: T) -> list[T]:
    """A value from each process, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def mean(x: Tensor) -> Tensor:
    """Mean over processes; no gradient flows through."""
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def sum_int(value: int, device: torch.device) -> int:
    """Sum of a number over processes."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, device=device)
    dist.all_reduce(total)
    return int(total)


def largest(value: int) -> int:
    """Largest of a number over processes; the device is not waited for."""
    if world_size() == 1:
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def anywhere(flag: Tensor) -> Tensor:
    """Whether a flag (bool, on the device) is set in any process; the device is not waited for."""
    if world_size() == 1:
        return flag
    found = flag.float()
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found > 0


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()
