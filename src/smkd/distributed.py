"""Rank, size and reductions over processes; with one process everything is a no-op."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor


def initialise(device: torch.device) -> None:
    """Join the process group that torchrun's variables describe, if there are any."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


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
    if dist.get_backend() == "nccl":
        sent = sent.cuda()
    parts = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(parts, sent)
    return torch.cat(parts, dim=dim).to(x.device)


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


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()
