"""Start a run on one device in this process, or on several through PyTorch's elastic agent."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from smkd.config.schema import RunConfig
from smkd.engine import run_folder
from smkd.engine.device import pick_device
from smkd.engine.train import Evaluator, train
from smkd.engine.watch import SIGNALS
from smkd.errors import ConfigError, SmkdError, Stopped


def launch(config: RunConfig, evaluator: Evaluator | None = None) -> Path:
    """Run a training; `devices=N` starts N processes here, torchrun's own processes just join.

    Raises:
        ConfigError: several nodes without torchrun, or more GPUs than there are.
        Stopped: a signal or the time ended it between two steps.
        SmkdError: what a worker reported.
    """
    under_torchrun = "RANK" in os.environ
    if config.num_nodes > 1 and not under_torchrun:
        raise ConfigError(
            f"num_nodes={config.num_nodes} must be started on each machine by torchrun: "
            "torchrun --nnodes N --nproc-per-node D -m smkd ..."
        )
    if config.devices == 1 or under_torchrun:
        return train(config, evaluator)

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    pick_device(config.accelerator)  # fail here, once, if it is not there
    # the agent would print its own account of a failure around our one line
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=config.devices, run_id="smkd", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, start_method="spawn",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "error"
        try:
            with _signals_go_on():
                stops: dict[int, Stopped | None] = elastic_launch(settings, _worker)(config, evaluator, said)
        except ChildFailedError as error:
            if said.exists():
                raise SmkdError(said.read_text(encoding="utf-8")) from error
            raise SmkdError(f"a worker process failed: {error.get_first_failure()[1].message}") from error
    if stops[0] is not None:
        raise stops[0]
    return run_folder.locate(config)


@contextlib.contextmanager
def _signals_go_on() -> Iterator[None]:
    """Hand signals on to the workers, which stop between two steps; the agent would kill them after a while."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    from torch.distributed.elastic.multiprocessing import api as agent

    own = agent._terminate_process_handler
    before = {number: signal.signal(number, _hand_on) for number in SIGNALS}
    # the agent installs this one when it starts the workers; only newer versions of PyTorch have a setting for that
    agent._terminate_process_handler = _hand_on
    try:
        yield
    finally:
        agent._terminate_process_handler = own
        for number, handler in before.items():
            signal.signal(number, handler)


def _hand_on(signum: int, frame: FrameType | None) -> None:
    for worker in multiprocessing.active_children():
        if worker.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signum)


def _worker(config: RunConfig, evaluator: Evaluator | None, said: Path) -> Stopped | None:
    """Train; a user's error is left in a file, and the exit code makes the agent stop the other workers."""
    try:
        train(config, evaluator)
    except Stopped as stop:
        return stop
    except SmkdError as error:
        said.write_text(str(error), encoding="utf-8")
        sys.exit(2)
    return None
