"""Two processes with half of a batch each learn what one process learns from the whole batch."""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from smkd import distributed
from smkd.config.loading import check
from smkd.config.schema import RunConfig
from smkd.data.loader import Views
from smkd.engine.schedules import rates_at
from smkd.engine.step import Learner

IMAGES = 8
OBJECTIVES: dict[str, dict[str, Any]] = {
    "phase1": {"labels": False, "mim": {"weight": 1.0}},
    "phase1-patch": {"labels": False, "patch": {"weight": 1.0}},
    "phase2": {
        "labels": True, "cls": {"same_image": True}, "patch": {"weight": 1.0, "weighting": "attention"},
        "mim": {"weight": 0.5},
    },
    "phase2-others": {
        "labels": True, "patch": {"weight": 1.0, "weighting": "attention", "same_image": False},
    },
}  # fmt: skip
# whether an image's partners in other halves of the batch count
CHANGED_BY_LOCAL_PAIRS = ("phase2", "phase2-others")


def make_config(name: str, pairs: str) -> RunConfig:
    return check(
        {
            "phase": "distill", "epochs": 10, "batch_size": IMAGES, "seed": 3,
            "model": {"size": "debug", "patch_size": 8, "image_size": 16, "drop_path": 0.0},
            "head": {"num_prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16},
            "global_views": {"count": 2, "size": 16, "scale": [0.25, 1.0]},
            "local_views": {"count": 2, "size": 8, "scale": [0.05, 0.25]},
            "objective": {**OBJECTIVES[name], "pairs": pairs},
            # no warm-up: the one step has the full learning rate, a hundred times the tolerance
            "optim": {"lr": 1e-3, "warmup_epochs": 0, "freeze_last_layer_epochs": 0, "teacher_momentum": 0.9},
            "validation": {"resize": 16, "crop": 16},
            "evaluation": {"resize": 16, "crop": 16},
        }
    )  # fmt: skip


def one_step(name: str, pairs: str, part: slice) -> dict[str, dict[str, Tensor]]:
    """Losses, student, teacher and centres after a step on a part of the batch."""
    config = make_config(name, pairs)
    torch.manual_seed(0)
    # three images of class 0 lie across the halves, class 3 is alone
    labels = torch.tensor([0, 0, 1, 2, 0, 1, 3, 2])
    masks = torch.rand(2, IMAGES, 2, 2) < 0.4
    views = Views(
        torch.randn(2, IMAGES, 3, 16, 16)[:, part], torch.randn(2, IMAGES, 3, 8, 8)[:, part],
        masks[:, part], labels[part],
    )  # fmt: skip
    learner = Learner.create(config, 4, torch.device("cpu"), None)
    start = {key: value.clone() for key, value in learner.pair.student.state_dict().items()}
    result = learner.step([views], rates_at(config, 0, 10))
    student = {key: value.clone() for key, value in learner.pair.student.state_dict().items()}
    moved = {key: (value - start[key]).abs().max() for key, value in student.items()}
    return {
        "losses": {key: value.detach() for key, value in result.losses.items()},
        "student": student,
        "teacher": learner.pair.teacher.state_dict(),
        "centers": dict(learner.objective.named_buffers()),
        "moved": moved,
    }


def broken_step(rank: int) -> dict[str, Any]:
    """A step in which the second process alone has a pixel that is not a number."""
    config = make_config("phase2", "local")
    learner = Learner.create(config, 4, torch.device("cpu"), None)
    pixels = torch.randn(2, IMAGES // 2, 3, 16, 16)
    pixels[0, 0, 0, 0, 0] = torch.nan if rank == 1 else 0
    views = Views(pixels, torch.randn(2, IMAGES // 2, 3, 8, 8), torch.rand(2, IMAGES // 2, 2, 2) < 0.4,
                  torch.tensor([0, 1, 1, 0]))  # fmt: skip
    parts = (learner.pair, learner.objective)
    before = [value.clone() for part in parts for value in part.state_dict().values()]
    result = learner.step([views], rates_at(config, 0, 10))
    after = [value for part in parts for value in part.state_dict().values()]
    return {"skipped": bool(result.skipped), "kept": all(map(torch.equal, before, after))}


def work(rank: int, port: int, folder: str) -> None:
    """One of the two processes: a step for each setting, written to a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.initialise(torch.device("cpu"))
    try:
        assert distributed.world_size() == 2
        half = slice(rank * IMAGES // 2, (rank + 1) * IMAGES // 2)
        results = {(n, p): one_step(n, p, half) for n in OBJECTIVES for p in ("global", "local")}
        torch.save(results, Path(folder) / f"{rank}.pt")
        torch.save(broken_step(rank), Path(folder) / f"broken-{rank}.pt")
    finally:
        distributed.shutdown()


@functools.cache
def whole_batch(name: str) -> dict[str, dict[str, Tensor]]:
    return one_step(name, "global", slice(None))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


Results = dict[tuple[str, str], dict[str, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """Results of both processes, started once for all settings."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(work, (free_port(), str(folder)), nprocs=2)
    for rank in range(2):
        assert torch.load(folder / f"broken-{rank}.pt") == {"skipped": True, "kept": True}
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def averaged_losses(two: list[Results], name: str, pairs: str) -> dict[str, Tensor]:
    first, second = (results[name, pairs]["losses"] for results in two)
    return {key: (first[key] + second[key]) / 2 for key in first}


def without_keys(name: str, value: Tensor) -> Tensor:
    """The keys' bias moves every score of a row alike, so its gradient is rounding noise that Adam blows up."""
    if name.endswith("attn.qkv.bias"):
        query, _, values = value.chunk(3)
        return torch.cat([query, values])
    return value


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_are_one(name: str, two: list[Results]) -> None:
    alone = whole_batch(name)
    for key, value in averaged_losses(two, name, "global").items():
        torch.testing.assert_close(value, alone["losses"][key], rtol=0, atol=1e-5, msg=key)
    for results in two:
        for part in ("student", "teacher", "centers"):
            for key, value in results[name, "global"][part].items():
                expected = without_keys(key, alone[part][key])
                torch.testing.assert_close(
                    without_keys(key, value), expected, rtol=0, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
                )
    # the step was long enough for a wrong gradient to show
    assert min(float(value) for value in alone["moved"].values()) > 2e-4
    assert float(alone["centers"]["cls_center"].abs().max()) > 1e-3


@pytest.mark.parametrize("name", CHANGED_BY_LOCAL_PAIRS)
def test_local_pairs_are_fewer(name: str, two: list[Results]) -> None:
    alone = whole_batch(name)
    local = averaged_losses(two, name, "local")
    assert abs(float(local["cls"] - alone["losses"]["cls"])) > 1e-4
    assert abs(float(local["patch"] - alone["losses"]["patch"])) > 1e-4
    apart = [
        float((without_keys(key, value) - without_keys(key, alone["student"][key])).abs().max())
        for key, value in two[0][name, "local"]["student"].items()
    ]
    assert max(apart) > 1e-4


def test_without_labels_local_pairs_are_all_there_are(two: list[Results]) -> None:
    for name in ("phase1", "phase1-patch"):
        for key, value in averaged_losses(two, name, "local").items():
            torch.testing.assert_close(value, averaged_losses(two, name, "global")[key], rtol=0, atol=1e-6)
