"""A run over two processes: what each draws on its device, and that the log speaks of both."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from smkd import api
from smkd.data.loader import Views
from smkd.engine.optim import Rates
from smkd.engine.step import Learner, StepResult
from smkd.engine.train import train

pytestmark = pytest.mark.slow

WORDS = (
    "devices=2", "accelerator=cpu", "precision=fp32", "epochs=2", "batch_size=8", "data.limit_per_class=1",
    "validation.every=0", "log_every=2", "model.drop_path=0.5",
)  # fmt: skip


def work(rank: int, port: int, folder: str) -> None:
    """One of the two processes: a run whose steps are written down."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    seen: list[tuple[list[float], dict[str, float]]] = []
    real = Learner.step

    def step(self: Learner, views: Iterable[Views], rates: Rates, *batches: Any) -> StepResult:
        with torch.random.fork_rng(devices=[]):
            drawn = torch.rand(4).tolist()
        result = real(self, views, rates, *batches)
        seen.append((drawn, {name: float(value) for name, value in result.losses.items()}))
        return result

    Learner.step = step  # type: ignore[method-assign]
    train(api.resolve("debug-pretrain", [f"out={folder}/run", *WORDS]))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    made = tmp_path_factory.mktemp("two")
    mp.spawn(work, (port, str(made)), nprocs=2)
    return made


def steps_of(folder: Path) -> list[list[tuple[list[float], dict[str, float]]]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_every_step_of_every_process_draws_its_own_numbers(folder: Path) -> None:
    """Else both devices would drop the same branches of their images."""
    drawn = [tuple(numbers) for steps in steps_of(folder) for numbers, _ in steps]
    assert len(set(drawn)) == len(drawn) == 2 * 2 * 8


def test_logged_losses_are_means_over_both_processes(folder: Path) -> None:
    first, second = ([losses for _, losses in steps] for steps in steps_of(folder))
    apart = [abs(a["loss"] - b["loss"]) for a, b in zip(first, second, strict=True)]
    assert max(apart) > 1e-4, "the two halves of a batch differ"
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in logged] == list(range(2, 17, 2))
    for line in logged:
        those = [*first[line["step"] - 2 : line["step"]], *second[line["step"] - 2 : line["step"]]]
        for name in ("loss", "cls", "mim"):
            assert line[name] == pytest.approx(sum(losses[name] for losses in those) / 4, rel=1e-5), name
    means = [sum(line["loss"] for line in logged[start : start + 4]) / 4 for start in (0, 4)]
    assert [line["loss"] for line in lines if line["kind"] == "epoch"] == pytest.approx(means, rel=1e-5)
