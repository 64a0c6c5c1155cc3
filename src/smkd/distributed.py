"""Rank, size and reductions over processes; with one process everything is a no-op."""

from __future__ import annotations

import os
import sys
import time
import uuid
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from smkd.errors import ConfigError

T = TypeVar("T")

LIMIT = timedelta(minutes=30)
"""How long tensors of a step wait for another process, before the run ends with an error."""
PATIENCE = timedelta(days=1)
"""How long the others wait while one process validates or saves. One that dies is noticed at once all the same."""


class Place(NamedTuple):
    """The place of a process among those that were started together.

    Attributes:
        rank: its number among all of them.
        size: how many they are.
        local_rank: its number on this machine.
    """

    rank: int
    size: int
    local_rank: int


class _Host:
    """The group for what lies on the host, which waits for `PATIENCE`; none with one process."""

    group: Any = None


class _Failure:
    """Which of the processes fails first: the store that they met in outlives the group."""

    store: Any = None
    is_first: bool | None = None


def place() -> Place | None:
    """This process's place by torchrun's variables; None for a single process (RANK missing or empty).

    Raises:
        ConfigError: a variable is missing, or no number that could be.
    """
    if not os.environ.get("RANK", "").strip():
        return None
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name, "").strip():
            raise ConfigError(
                f"RANK={os.environ['RANK']} is set but {name} is not: start with torchrun, which sets all of them, "
                "or unset RANK to use one process"
            )
    size = _number("WORLD_SIZE", 1, None)
    _number("MASTER_PORT", 1, 2**16)
    return Place(_number("RANK", 0, size), size, local_rank())


def local_rank() -> int:
    """Number of this process on its machine, 0 if it is by itself; raises `ConfigError` if it is no number."""
    return _number("LOCAL_RANK", 0, None) if os.environ.get("LOCAL_RANK", "").strip() else 0


def _number(name: str, least: int, end: int | None) -> int:
    text = os.environ[name].strip()
    if not text.isdecimal() or int(text) < least or (end is not None and int(text) >= end):
        expected = f"a whole number from {least}" + ("" if end is None else f" to {end - 1}")
        raise ConfigError(f"{name}={text}: should be {expected}; torchrun sets it, or unset RANK to use one process")
    return int(text)


def initialise(device: torch.device) -> None:
    """Join the process group that torchrun's variables describe, if there are any.

    Raises:
        ConfigError: a variable is wrong, or the others cannot be reached.
    """
    here = place()
    if here is None or dist.is_initialized():
        return
    # what lies on the CPU stays there: the device is not waited for
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        if (store := _store_of_starter(LIMIT)) is None:
            dist.init_process_group(backend, timeout=LIMIT)
        else:
            part = dist.PrefixStore(_agreed_word(store, here), store)  # type: ignore[attr-defined]
            dist.init_process_group(backend, timeout=LIMIT, store=part, rank=here.rank, world_size=here.size)
        _Host.group = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).split("\n")[0]
        raise ConfigError(f"cannot join the other processes at {where} (MASTER_ADDR, MASTER_PORT): {reason}") from error
    _Failure.store, _Failure.is_first = dist.distributed_c10d._get_default_store(), None


def shutdown() -> None:
    """Leave the process group, if there is one; on the way out of an error, the others can know before they notice."""
    if isinstance(sys.exc_info()[1], Exception):
        fails_first()
    if dist.is_initialized():
        _Host.group = None
        dist.destroy_process_group()


def fails_first() -> bool:
    """Whether this process, which has failed, is the first of its group to fail: the one that says why.

    Where they have not met yet and there is no store of torchrun's, each is.
    """
    if _Failure.is_first is None:
        key = f"smkd failed {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        try:
            store = _Failure.store or _store_of_starter(timedelta(seconds=5))
            _Failure.is_first = store is None or store.add(key, 1) == 1
        except RuntimeError:  # the store is gone, and with it the process that held it
            _Failure.is_first = False
    return _Failure.is_first


def _store_of_starter(wait: timedelta) -> Any:
    """The store that torchrun (or `devices=N`) holds over all restarts; None where the first process holds one."""
    try:
        if place() is None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return None
    except ConfigError:
        return None
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(*where, None, False, wait)  # type: ignore[attr-defined]


def _agreed_word(store: Any, here: Place) -> str:
    """A word that the processes of this start share and no earlier one had; they meet in the part of the store that
    it names.

    A restart finds what the start before it left in the store, and the restarts that torchrun counts differ between
    machines. So each process asks with a word of its own, which the first one answers until all have heard it.

    Raises:
        RuntimeError: the others do not come within `LIMIT`.
    """
    own = uuid.uuid4().hex
    if here.rank > 0:
        store.set(f"asks/{here.rank}", own)
        agreed = str(store.get(f"answer/{own}").decode())
        store.set(f"{agreed}/heard/{here.rank}", "")
        return agreed
    until = time.monotonic() + LIMIT.total_seconds()
    missing = set(range(1, here.size))
    while missing:
        for rank in [each for each in missing if store.check([f"asks/{each}"])]:
            store.set(f"answer/{store.get(f'asks/{rank}').decode()}", own)
            if store.check([f"{own}/heard/{rank}"]):
                missing.remove(rank)
        if time.monotonic() > until:
            raise RuntimeError(f"process {min(missing)} of {here.size} did not come within {LIMIT}")
        time.sleep(0.01)
    return own


def lost_connection(error: BaseException) -> str | None:
    """What has become of another process, if an error says that it went away in the midst of an exchange."""
    said = str(error)
    if not isinstance(error, dist.DistError) and "gloo/transport" not in said:
        return None
    if "timed out" in said.lower():
        return f"another process of this run did not answer within {LIMIT.total_seconds() / 60:g} minutes"
    return "another process of this run ended without a word (killed? out of memory?)"


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
    dist.all_gather_object(values, value, group=_Host.group)
    return values


def gather_on_first(value: T) -> list[T] | None:
    """A value from each process, in rank order, in the first process; None in the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values, group=_Host.group)
    return values


def share(count: int) -> range:
    """Which of so many things this process does: equal parts up to one, in rank order."""
    return range(rank() * count // world_size(), (rank() + 1) * count // world_size())


def mean(x: Tensor) -> Tensor:
    """Mean over processes; no gradient flows through."""
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def sum_int(value: int) -> int:
    """Sum of a number over processes; the device is not waited for."""
    if world_size() == 1:
        return value
    total = torch.tensor(value)
    dist.all_reduce(total, group=_Host.group)
    return int(total)


def largest(value: int) -> int:
    """Largest of a number over processes; the device is not waited for."""
    if world_size() == 1:
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_Host.group)
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
        dist.barrier(group=_Host.group)
