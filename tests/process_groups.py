"""Several processes that join one group after another, for tests of runs over several processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

HOST = "127.0.0.1"


def join_group(port: int, rank: int, size: int) -> None:
    """Let the next run in this process be one of `size` that meet at a port."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip


def _begin(work: Callable[..., None], rank: int, ports: list[int], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    work(rank, ports, *arguments)


def run_processes(
    work: Callable[..., None], count: int, groups: int, *arguments: Any, patience: float = 60
) -> list[int | None]:
    """Run `work(rank, ports, *arguments)` in `count` processes, with a port for each group; their exit codes.

    Each has `patience` seconds to end after the one before it.
    """
    stores = [dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False) for _ in range(groups)]  # type: ignore[attr-defined]
    ports = [store.port for store in stores]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["smkd.engine.launch", "smkd.api"])
    workers = [context.Process(target=_begin, args=(work, rank, ports, arguments)) for rank in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(patience)
        worker.kill()
        worker.join()
    return [worker.exitcode for worker in workers]
