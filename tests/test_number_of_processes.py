"""A run that goes on with another number of processes does the same steps."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from process_groups import join_group, run_processes
from smkd import api
from smkd.data.loader import Batch, Views
from smkd.engine import checkpoint
from smkd.engine.optim import Rates
from smkd.engine.step import Learner, StepResult
from smkd.engine.train import train
from smkd.errors import Stopped

pytestmark = pytest.mark.slow

WORDS = (
    "accelerator=cpu", "precision=fp32", "epochs=2", "batch_size=8", "data.limit_per_class=1", "validation.every=0",
    "log_every=3", "model.drop_path=0", "head.num_prototypes=16", "head.hidden_dim=16", "optim.warmup_epochs=0",
)  # fmt: skip
EPOCH = 8
"""Steps."""
RUNS = {"one": [(1, 16)], "few": [(1, 3), (2, 6), (1, 16)], "many": [(1, 3), (4, 16)]}
"""Of each run, how many processes go on up to which step."""


def work(rank: int, ports: list[int], folder: str) -> None:
    """One of four processes: its share of each run, whose images and losses are written down."""
    meeting = iter(ports)
    for name, parts in RUNS.items():
        seen: list[tuple[int, dict[str, float], list[str]]] = []
        start = 0
        for size, end in parts:
            port = next(meeting)
            if rank < size:
                join_group(port, rank, size)
                go_on(Path(folder) / name, size, start, end, seen)
            start = end
        torch.save(seen, Path(folder) / f"{name}-{rank}.pt")


def go_on(out: Path, size: int, start: int, end: int, seen: list[Any]) -> None:
    """Train from one step to another, at which a signal to the first process stops the run."""
    real, done = Learner.step, start

    def step(self: Learner, views: Iterable[Views], rates: Rates, batches: list[Batch]) -> StepResult:
        nonlocal done
        held = list(views)
        result = real(self, held, rates, batches)
        seen.append((done, {name: float(value) for name, value in result.losses.items()}, digests(held)))
        done += 1
        if done == end < 2 * EPOCH and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGUSR1)
        return result

    with pytest.MonkeyPatch.context() as patch, suppress(Stopped):
        patch.setattr(Learner, "step", step)
        train(api.resolve("debug-pretrain", [f"out={out}", f"devices={size}", *WORDS]))


def digests(passes: list[Views]) -> list[str]:
    """Of all crops and masks of each image."""
    return [
        hashlib.sha256(
            b"".join(part[:, image].numpy().tobytes() for part in (each.global_views, each.local_views, each.masks))
        ).hexdigest()
        for each in passes for image in range(len(each.labels))
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("processes")
    assert run_processes(work, 4, sum(map(len, RUNS.values())), str(made)) == [0] * 4
    return made


def steps_of(folder: Path, name: str) -> dict[int, tuple[dict[str, float], list[str]]]:
    """Losses, averaged over the processes, and digests of the images in rank order, of each step of a run."""
    found: dict[int, list[tuple[dict[str, float], list[str]]]] = {}
    for rank in range(4):
        for number, losses, images in torch.load(folder / f"{name}-{rank}.pt"):
            found.setdefault(number, []).append((losses, images))
    return {
        number: (
            {key: sum(losses[key] for losses, _ in shares) / len(shares) for key in shares[0][0]},
            [image for _, images in shares for image in images],
        )
        for number, shares in found.items()
    }


@pytest.mark.parametrize("name", ["few", "many"])
def test_each_step_is_that_of_one_process(name: str, folder: Path) -> None:
    alone, several = steps_of(folder, "one"), steps_of(folder, name)
    assert several.keys() == alone.keys() == set(range(2 * EPOCH))
    for number, (losses, images) in alone.items():
        assert several[number][1] == images, f"step {number}"
        assert len(set(images)) == 8
        assert several[number][0] == pytest.approx(losses, abs=1e-5), f"step {number}"


@pytest.mark.parametrize("name", ["few", "many"])
def test_a_run_ends_with_the_weights_of_one_process(name: str, folder: Path) -> None:
    alone, several = (checkpoint.load_checkpoint(folder / each / "checkpoints" / "last.pt") for each in ("one", name))
    assert alone["step"] == several["step"] == 2 * EPOCH
    for part in ("objective", "teacher", "student"):
        torch.testing.assert_close(several[part], alone[part], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["few", "many"])
def test_records_are_those_of_one_process(name: str, folder: Path) -> None:
    lines = [
        [json.loads(line) for line in (folder / each / "metrics.jsonl").read_text().splitlines()]
        for each in ("one", name)
    ]
    for ours, theirs in zip(*lines, strict=True):
        assert lasting(theirs) == pytest.approx(lasting(ours), abs=3e-5)  # ranks of features are about 3


def lasting(record: dict[str, Any]) -> dict[str, Any]:
    """Without times, and without counts of the shares of a batch that lack a term: shares are what differs."""
    timed = ("time", "seconds", "images_per_second")
    return {key: value for key, value in record.items() if key not in timed and not key.startswith("empty_")}
