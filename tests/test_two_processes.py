"""Two processes with half of a batch each learn what one process learns from the whole batch."""

from __future__ import annotations

import functools
import os
import socket
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from smkd import distributed
from smkd.data.loader import Views
from smkd.engine.collapse import CollapseWatch
from smkd.engine.guard import Guard
from smkd.engine.log import RunLog
from smkd.engine.meter import Meter
from smkd.engine.optim import rates_at
from smkd.engine.step import Learner, StepResult
from whole_steps import ACROSS, IMAGES, SUBSETS, WITHIN, Outcome, assert_same, config_of, learned, one_step, only

pytestmark = pytest.mark.slow

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
HEADS: dict[str, dict[str, Any]] = {"shared": {}, "separate": {"num_patch_prototypes": 24}}
# each leaves a part of a separate head without gradients
LEAVE_WEIGHTS_OUT = ("cls", "mim", "supervised")
SUBSET_NAMES = ["+".join(terms) for terms in SUBSETS]

Case = tuple[str, str]


@functools.cache
def cases() -> dict[Case, tuple[Any, tuple[int, ...]]]:
    """Configuration and labels of each step that the two processes do."""
    found = {
        (n, p): (config_of({**OBJECTIVES[n], "pairs": p}), ACROSS) for n in OBJECTIVES for p in ("global", "local")
    }
    for name, terms in zip(SUBSET_NAMES, SUBSETS, strict=True):
        for head, settings in HEADS.items():
            found[name, head] = config_of(only(terms), head=settings), ACROSS
    for name in OBJECTIVES:
        found[name, "accumulate"] = config_of({**OBJECTIVES[name], "pairs": "global"}, accumulate=2), WITHIN
    for name in LEAVE_WEIGHTS_OUT:
        found[name, "accumulate"] = config_of(only((name,)), head=HEADS["separate"], accumulate=2), WITHIN
    return found


def broken_step(rank: int) -> dict[str, Any]:
    """A step in which the second process alone has a pixel that is not a number."""
    config = config_of({**OBJECTIVES["phase2"], "pairs": "local"})
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
    """One of the two processes: all steps, and an epoch of the meter, written to a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.initialise(torch.device("cpu"))
    try:
        assert distributed.world_size() == 2
        of_two = {"devices": 2}
        results = {
            case: one_step(config.model_copy(update=of_two), labels, rank=rank, world=2)
            for case, (config, labels) in cases().items()
        }
        torch.save(({key: tuple(result) for key, result in results.items()}, measured(rank)), f"{folder}/{rank}.pt")
        torch.save(broken_step(rank), f"{folder}/broken-{rank}.pt")
    finally:
        distributed.shutdown()


def measured(rank: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Log lines and closing numbers of an epoch in which the two processes saw different things."""
    lines: list[dict[str, Any]] = []

    class Lines(RunLog):
        def __init__(self) -> None:
            pass

        def write(self, kind: str, step: int, values: Any) -> None:
            lines.append(values)

        def say(self, line: str) -> None:
            pass

    config = config_of({"mim": {"weight": 1.0}}, log_every=2)
    meter = Meter(Lines(), config, 0, 2, Guard(9, lambda _: []), CollapseWatch(config))
    for number, empty in enumerate(({"mim": 1}, {"cls": 2}) if rank else ({}, {"cls": 1})):
        losses = {
            name: torch.tensor(value + rank + number) for name, value in (("loss", 5.0), ("cls", 3.0), ("mim", 2.0))
        }
        zeros = torch.zeros(4, dtype=torch.long)
        meter.record(number, StepResult(losses, empty, zeros, zeros, torch.tensor(False)), 0.1)
    meter.skipped = 3 + rank
    return lines, meter.close()


@functools.cache
def whole_batch(case: Case) -> Outcome:
    config, labels = cases()[case]
    return one_step(config.model_copy(update={"accumulate": 1}), labels)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What both processes wrote, started once for all settings."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(work, (free_port(), str(folder)), nprocs=2)
    for rank in range(2):
        assert torch.load(folder / f"broken-{rank}.pt") == {"skipped": True, "kept": True}
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def two(saved: list[Any]) -> dict[Case, tuple[Outcome, Outcome]]:
    return {case: (Outcome(*saved[0][0][case]), Outcome(*saved[1][0][case])) for case in saved[0][0]}


def together(first: Outcome, second: Outcome) -> Outcome:
    """Losses averaged as the log does; gradients and centres are the same on both."""
    for ours, theirs in ((first.gradients, second.gradients), (first.centers, second.centers)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    return first._replace(losses={key: (first.losses[key] + second.losses[key]) / 2 for key in first.losses})


Both = dict[Case, tuple[Outcome, Outcome]]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_are_one(name: str, two: Both) -> None:
    alone = whole_batch((name, "global"))
    assert_same(together(*two[name, "global"]), alone)
    # gradients are large enough for a wrong one to show
    assert learned(alone) == set(alone.gradients)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", SUBSET_NAMES)
def test_every_subset_of_terms(name: str, head: str, two: Both) -> None:
    alone = whole_batch((name, head))
    assert alone.losses.keys() == {"loss", *name.split("+")}
    assert_same(together(*two[name, head]), alone)
    assert learned(alone) == {key for key, gradient in alone.gradients.items() if gradient is not None}


@pytest.mark.parametrize("name", [*OBJECTIVES, *LEAVE_WEIGHTS_OUT])
def test_two_processes_with_two_passes_are_one_pass(name: str, two: Both) -> None:
    assert_same(together(*two[name, "accumulate"]), whole_batch((name, "accumulate")))


@pytest.mark.parametrize("name", CHANGED_BY_LOCAL_PAIRS)
def test_local_pairs_are_fewer(name: str, two: Both) -> None:
    alone, local = whole_batch((name, "global")), together(*two[name, "local"])
    assert abs(float(local.losses["cls"] - alone.losses["cls"])) > 1e-4
    assert abs(float(local.losses["patch"] - alone.losses["patch"])) > 1e-4
    apart = [
        float((local.gradients[key] - gradient).abs().max())
        for key, gradient in alone.gradients.items() if gradient is not None
    ]  # fmt: skip
    assert max(apart) > 1e-4


def test_without_labels_local_pairs_are_all_there_are(two: Both) -> None:
    for name in ("phase1", "phase1-patch"):
        assert_same(together(*two[name, "local"]), together(*two[name, "global"]))


def test_a_device_without_pairs_says_so(two: Both) -> None:
    """Of different images of one class, the first half of the batch holds two, the second none."""
    halves = ACROSS[: IMAGES // 2], ACROSS[IMAGES // 2 :]
    assert [len(set(half)) for half in halves] == [3, 4]
    assert [outcome.empty for outcome in two["phase2-others", "local"]] == [{}, {"patch": 1}]
    assert [outcome.empty for outcome in two["phase2-others", "global"]] == [{}, {}]


def test_an_epoch_is_measured_over_both_processes(saved: list[Any]) -> None:
    for _, (lines, scores) in saved:
        assert len(lines) == 1
        assert {name: lines[0][name] for name in ("loss", "cls", "mim")} == {"loss": 6.0, "cls": 4.0, "mim": 3.0}
        assert {name: value for name, value in lines[0].items() if name.startswith("empty")} == {
            "empty_cls": 3, "empty_mim": 1
        }  # fmt: skip
        assert scores["loss"] == 6.0
        assert scores["skipped_images"] == 7


def test_an_epoch_goes_on_with_another_number_of_processes() -> None:
    class Silent(RunLog):
        def __init__(self) -> None:
            pass

    def meter() -> Meter:
        config = config_of({"mim": {"weight": 1.0}}, log_every=9)
        return Meter(Silent(), config, 0, 9, Guard(9, lambda _: []), CollapseWatch(config))

    states = []
    for rank in range(2):
        seen = meter()
        zeros = torch.zeros(4, dtype=torch.long)
        loss = {"loss": torch.tensor(2.0 + rank)}
        seen.record(0, StepResult(loss, {"mim": 1 + rank}, zeros + rank, zeros, torch.tensor(False)), 0.1)
        seen.skipped = 1 + rank
        states.append(seen.state())
    alone = meter()
    alone.resume(states, torch.device("cpu"))
    found = alone.state()
    assert (found["empty"], found["skipped"], found["count"]) == ({"mim": 3}, 3, 1)
    assert found["sums"] == {"loss": torch.tensor(2.5)}
    assert found["assigned"].tolist() == [0] * 4 + [1] * 4
