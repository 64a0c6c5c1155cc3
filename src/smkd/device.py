"""The device and the precision of a run, and copies to the device that the host does not wait for."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

from smkd import distributed
from smkd.errors import ConfigError


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for; `values` may be changed or dropped at once.

    From memory that is not pinned, CUDA may first wait for all work that is queued.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def pick_device(accelerator: str) -> torch.device:
    """Device of this process: the asked-for kind, or with 'auto' the best there is.

    Raises:
        ConfigError: that kind is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator == "auto":
        accelerator = next(kind for kind, there in available.items() if there)
    if not available[accelerator]:
        there = ", ".join(kind for kind, yes in available.items() if yes)
        raise ConfigError(f"accelerator={accelerator}: there is no such device here (available: {there})")
    if accelerator != "cuda":
        return torch.device(accelerator)
    number, count = distributed.local_rank(), torch.cuda.device_count()
    if number >= count:
        raise ConfigError(f"devices: asked for GPU number {number}, but there are {count}")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def autocast_type(precision: str, device: torch.device) -> torch.dtype | None:
    """Type for autocast, or None for plain float32.

    Raises:
        ConfigError: fp16 outside CUDA.
    """
    if precision == "fp32":
        return None
    if precision == "bf16":
        return torch.bfloat16
    if precision == "fp16":
        if device.type != "cuda":
            raise ConfigError(f"precision=fp16 needs CUDA, not {device.type}; use bf16 or fp32")
        return torch.float16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else None


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step instead of handing it back page by page.

    A training step frees and asks for the same large arrays again; above 32 MB each the page faults of that cost a
    good part of the time on the CPU (benchmarks/allocator.py). Does nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 256 * 2**20)
