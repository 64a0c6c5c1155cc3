"""Start a run on one device in this process, or on several devices in a process each.

The first SIGTERM, SIGUSR1 or Ctrl-C is passed on to these processes, which finish their step, save and end; that may
take as long as a step does, so it is waited for. A second one ends them at once, as does a first one before the first
step. Once one of them has ended, the others get `PATIENCE` seconds to end as well.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch
import torch.distributed as dist

from smkd import distributed
from smkd.config.run_config import RunConfig
from smkd.device import pick_device
from smkd.engine import run_folder
from smkd.engine.evaluator import Evaluator
from smkd.engine.stopping import Listener
from smkd.engine.train import train
from smkd.errors import ConfigError, SmkdError, Stopped
from smkd.machine import cores
from smkd.processes import (
    GUARD,
    allowed,
    deaths_named,
    end_at_interrupts,
    end_where_unguarded,
    end_with_parent,
    interrupts_later,
    show_warning,
)

HOST = "127.0.0.1"
SAID = "error"
"""File of the first process that failed: its exit code, and its message from the second line on."""
PATIENCE = 4.0
"""Seconds that a process has to end once another has, or once it is told to, before it is killed."""


def launch(config: RunConfig, evaluator: Evaluator | None = None) -> Path:
    """Run a training; `devices=N` starts N processes here, torchrun's own processes just join.

    Returns:
        The run folder.

    Raises:
        ConfigError: several nodes without torchrun, more GPUs than there are, or a folder that holds other things.
        Stopped: a signal or the time ended it between two steps.
        SmkdError: what one of the processes reported, or how it ended.
    """
    end_where_unguarded()
    check_folder(config)
    joins = distributed.place() is not None
    if config.num_nodes > 1 and not joins:
        raise ConfigError(
            f"num_nodes={config.num_nodes} must be started on each machine by torchrun: "
            "torchrun --nnodes N --nproc-per-node D -m smkd ..."
        )
    if config.devices == 1 or joins:
        return _train(config, evaluator)
    if not allowed(config.devices):
        raise ConfigError(f"devices={config.devices}: a daemon process may start no others; use devices=1 there")
    pick_device(config.accelerator)  # fail here, once, if it is not there
    _train_together(config, evaluator)
    return run_folder.run_path(config)


def check_folder(config: RunConfig) -> None:
    """Raise `ConfigError` unless a run has a folder of its own, which holds nothing that it reads."""
    out = run_folder.run_path(config)
    if not out.is_dir():
        return  # a file is refused with the other settings
    others = sorted(each.name for each in out.iterdir() if each.name[0] != ".")
    if others and not (out / "config.yaml").exists():
        raise ConfigError(f"out={out} holds other things ('{others[0]}') and no run; choose another out=")
    read = {
        "data.root": config.data.root, "data.split_file": config.data.split_file,
        "init": config.init if config.overwrite else None,
    }  # fmt: skip
    for key, place in read.items():
        if place is not None and place.exists() and (out.resolve() in (place.resolve(), *place.resolve().parents)):
            raise ConfigError(f"out={out} holds {key}={place}, which the run reads; choose another out=")


def _train(config: RunConfig, evaluator: Evaluator | None) -> Path:
    """Train in this process; where it is one of several, the first that fails is the only one to say so."""
    try:
        with deaths_named():
            return train(config, evaluator)
    except SmkdError as error:
        if not distributed.fails_first():
            sys.exit(error.exit_code)
        raise
    except RuntimeError as error:
        # the others lose the one that failed
        if not distributed.fails_first():
            sys.exit(SmkdError.exit_code)
        if said := distributed.lost_connection(error):
            raise SmkdError(said) from error
        raise


class _PassedOn(Listener):
    """Passes the first signal on to the workers."""

    def __init__(self, workers: Sequence[SpawnProcess]) -> None:
        super().__init__()
        self.workers = workers

    def heard(self, number: int) -> None:
        for worker in self.workers:
            if worker.pid is not None and worker.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, number)


def _train_together(config: RunConfig, evaluator: Evaluator | None) -> None:
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    context = multiprocessing.get_context("spawn")
    in_lines = warnings.showwarning is show_warning
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workers = [
            context.Process(target=_worker, args=(config, evaluator, folder, rank, store.port, in_lines))
            for rank in range(config.devices)
        ]
        signals = _PassedOn(workers)
        try:
            _begin_tracker()
            with interrupts_later():
                for worker in workers:
                    worker.start()
            with signals:
                ended = _first_end(workers)
                if any(code is not None and code > SmkdError.exit_code for code in ended):
                    _join(workers)  # they stop together
        finally:
            _stop(workers)
        if signals.received and any(ended) and not (folder / SAID).exists():
            signal.raise_signal(signals.received)  # it ended them before their first step
        _report(ended, folder, is_asked=bool(signals.received))


def _first_end(workers: Sequence[SpawnProcess]) -> list[int | None]:
    """Exit codes, once one of the workers has failed or all have ended; None of one that goes on."""
    while True:
        ended = [worker.exitcode for worker in workers]
        # as they were a moment ago: to wait for none at all would never end
        running = [worker.sentinel for worker, code in zip(workers, ended, strict=True) if code is None]
        if any(ended) or not running:
            return ended
        wait(running)


def _begin_tracker() -> None:
    """Start Python's own process that clears up behind workers that were stopped, without its warning that it did."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join([*([before] if before else []), "ignore:resource_tracker"])
    try:
        resource_tracker.ensure_running()
    finally:
        os.environ.pop("PYTHONWARNINGS") if before is None else os.environ.update(PYTHONWARNINGS=before)


def _stop(workers: Sequence[SpawnProcess]) -> None:
    started = [worker for worker in workers if worker.pid is not None]
    for worker in started:
        worker.terminate()
    _join(started)
    for worker in started:
        worker.kill()
        worker.join()


def _join(workers: Sequence[SpawnProcess]) -> None:
    until = time.monotonic() + PATIENCE
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))


def _report(ended: Sequence[int | None], folder: Path, is_asked: bool) -> None:
    """Raise what went wrong, if anything did; `ended` are the exit codes before the others were stopped."""
    failed = {rank: code for rank, code in enumerate(ended) if code}
    if not failed:
        return
    for rank, code in failed.items():
        if code < 0 and not is_asked:
            name = signal.Signals(-code).name
            raise SmkdError(f"process {rank} of {len(ended)} was killed ({name}; out of memory?)")
    if (folder / SAID).exists():
        number, _, said = (folder / SAID).read_text(encoding="utf-8").partition("\n")
        raise SmkdError(said) if int(number) == SmkdError.exit_code else Stopped(said, int(number))
    rank = min(failed)
    if not (folder / f"{rank}.started").exists():
        raise ConfigError(f"devices={len(ended)} starts this script anew in each process: {GUARD}")
    trace = folder / f"{rank}.trace"
    told = trace.read_text(encoding="utf-8") if trace.exists() else f"exit code {failed[rank]}"
    raise SmkdError(f"process {rank} of {len(ended)} failed: {told.strip().splitlines()[-1]}") from RuntimeError(told)


def _threads_each(processes: int) -> int:
    """PyTorch's threads of each of several processes, which share the cores."""
    return min(torch.get_num_threads(), max(1, cores() // processes))


def _worker(config: RunConfig, evaluator: Evaluator | None, folder: Path, rank: int, port: int, in_lines: bool) -> None:
    """Train as one of several; what goes wrong is left in a file, and the exit code makes the parent stop the rest."""
    end_with_parent()
    end_at_interrupts()
    if in_lines:
        warnings.showwarning = show_warning
    torch.set_num_threads(_threads_each(config.devices))
    (folder / f"{rank}.started").touch()
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(config.devices),
        "LOCAL_WORLD_SIZE": str(config.devices), "MASTER_ADDR": HOST, "MASTER_PORT": str(port),
        # the parent holds the store that they meet in
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    try:
        _train(config, evaluator)
    except SmkdError as error:
        said = f"{error.exit_code}\n{error}"
        (folder / SAID).write_text(said, encoding="utf-8", errors="backslashreplace")
        sys.exit(error.exit_code)
    except Exception:  # a mistake of this package: the parent raises its last line, with the traceback behind it
        (folder / f"{rank}.trace").write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")
        sys.exit(1)
