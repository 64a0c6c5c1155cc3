"""Two processes that share the networks out learn what two that hold the whole of them learn, and what one does."""

from __future__ import annotations

import functools
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from run_files import MEASURED
from smkd import api, distributed
from smkd.config.run_config import RunConfig
from smkd.engine import shard, step
from smkd.engine.checkpoint import load_checkpoint
from smkd.engine.optim import rates_at
from smkd.engine.step import Learner
from smkd.engine.train import _train
from smkd.errors import ConfigError, Stopped
from smkd.fewshot.validation import FewShotValidation
from smkd.models.pair import StudentTeacher
from whole_steps import ACROSS, IMAGES, SUBSETS, config_of, only, views_of, without_keys

CPU = torch.device("cpu")
EVERY: dict[str, Any] = {**only(("cls", "mim", "patch", "supervised")), "pairs": "local"}
ATTENTION: dict[str, Any] = {"labels": True, "patch": {"weight": 1.0, "weighting": "attention"}, "mim": {"weight": 0.5}}
HALF_FROZEN = {"size": "debug", "patch_size": 8, "image_size": 16, "drop_path": 0.0, "train_blocks": "last:1"}
STEPS = 5
TURN = 3
"""Step that a run of the tests is interrupted in, counted from 1: the last but one of four."""
WORDS = (
    "accelerator=cpu", "precision=fp32", "data.limit_per_class=1", "batch_size=16", "epochs=1", "optim.warmup_epochs=0",
    "model.drop_path=0", "head.num_prototypes=16", "head.hidden_dim=16", "num_workers=0", *MEASURED,
)  # fmt: skip

Record = dict[str, Any]


@functools.cache
def cases() -> dict[str, tuple[RunConfig, int]]:
    """Configuration and number of steps."""
    optim = {"lr": 1e-3, "warmup_epochs": 0, "freeze_last_layer_epochs": 1, "clip_norm": 0.05}
    found = {
        "pretrain": (config_of({"labels": False, "mim": {"weight": 1.0}}), 2),
        "attention": (config_of(ATTENTION), 2),
        "every": (config_of({**EVERY, "pairs": "global"}, head={"num_patch_prototypes": 24}), STEPS),
        "accumulate": (config_of(EVERY, accumulate=2), 2),
        "clip+freeze": (config_of(EVERY, optim=optim), STEPS),
        "fixed+own rate": (config_of(EVERY, head={"fixed_norm": True}, optim={**optim, "head_lr": 2e-3}), 2),
        "recompute": (config_of(EVERY, recompute=True), 1),
        "drop": (config_of(EVERY, model={"size": "debug", "patch_size": 8, "image_size": 16, "drop_path": 0.5}), 1),
        "bf16": (config_of(EVERY, recompute=True, precision="bf16"), 1),
        "frozen": (config_of(EVERY, model=HALF_FROZEN, init="somewhere", optim=optim), 2),
    }
    for terms in SUBSETS[:4]:  # each term by itself
        found["+".join(terms)] = config_of(only(terms), head={"num_patch_prototypes": 24}), 1
    return found


def learner_of(config: RunConfig, how: str) -> Learner:
    """With prototypes whose norms differ, and centres that are not zero."""
    config = config.model_copy(update={"devices": 2, "shard": how})
    noise = torch.Generator().manual_seed(1)

    class Noisy(StudentTeacher):
        def __init__(self, *settings: Any) -> None:
            super().__init__(*settings)
            with torch.no_grad():
                for each in self.parameters():
                    each.add_(0.05 * torch.randn(each.shape, generator=noise))
            self.share_frozen()

    with mock.patch.object(step, "StudentTeacher", Noisy):
        learner = Learner.create(config, 8, CPU, torch.bfloat16 if config.precision == "bf16" else None)
    with torch.no_grad():
        for center in learner.objective.buffers():
            center.normal_(generator=noise)
    return learner


def steps_of(config: RunConfig, steps: int, how: str, rank: int) -> Record:
    """Losses and gradients of each step, and everything that was learned; in the first process."""
    learner = learner_of(config, how)
    assert shard.is_shared_out(learner.pair.student) == shard.is_shared_out(learner.pair.teacher) == (how == "full")
    size = IMAGES // (2 * config.accumulate)
    starts = [(2 * each + rank) * size for each in range(config.accumulate)]
    passes = [views_of(ACROSS, slice(start, start + size)) for start in starts]
    losses, gradients = [], []
    for number in range(steps):
        torch.manual_seed(number)
        result = learner.step(passes, rates_at(config, number, 3))
        losses.append({name: distributed.mean(value) for name, value in result.losses.items()})
        gradients.append(shard.whole({name: each.grad for name, each in learner.pair.student.named_parameters()}))
    parts = {"student": learner.pair.student, "teacher": learner.pair.teacher, "objective": learner.objective}
    learned = {name: shard.whole(part.state_dict()) for name, part in parts.items()}
    return {"losses": losses, "gradients": gradients, **learned}


def broken_step(rank: int) -> dict[str, bool]:
    """A step in which the second process alone has a pixel that is not a number."""
    learner = learner_of(cases()["attention"][0], "full")
    views = views_of(ACROSS, slice(rank * 4, rank * 4 + 4))
    learner.step([views], rates_at(learner.config, 0, 10))
    before = learner.state()
    views.global_views[0, 0, 0, 0, 0] = torch.nan if rank == 1 else 0
    result = learner.step([views], replace(rates_at(learner.config, 1, 10), teacher_momentum=1.0))
    after = learner.state()
    return {"skipped": bool(result.skipped), "kept": all(map(torch.equal, tensors(before), tensors(after)))}


def tensors(state: object) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    return [found for each in state.values() for found in tensors(each)] if isinstance(state, dict) else []


@contextmanager
def interrupted() -> Iterator[None]:
    """Around a run that gets a signal in one of its steps, and ends after it."""
    real, count = Learner.step, 0

    def counted(self: Learner, *inputs: Any) -> Any:
        nonlocal count
        count += 1
        if count == TURN:
            signal.raise_signal(signal.SIGUSR1)
        return real(self, *inputs)

    with mock.patch.object(Learner, "step", counted), pytest.raises(Stopped):
        yield


def train_in(out: Path, *words: str) -> Path:
    config = api.resolve("debug-pretrain", [f"out={out}", *WORDS, *words])
    return _train(config, FewShotValidation(), CPU)


def work(rank: int, port: int, folder: Path) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.initialise(CPU)
    try:
        found = {
            how: {name: steps_of(config, steps, how, rank) for name, (config, steps) in cases().items()}
            for how in ("none", "full")
        }
        torch.save(broken_step(rank), folder / f"broken-{rank}.pt")
        if rank == 0:
            torch.save(found, folder / "found.pt")
        train_in(folder / "from-one", "devices=2", "shard=full")
        with interrupted():
            train_in(folder / "from-two", "devices=2", "shard=full")
    finally:
        distributed.shutdown()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes wrote, with a run that one process began."""
    made = tmp_path_factory.mktemp("shared-out")
    with interrupted():
        train_in(made / "from-one")
    mp.spawn(work, (free_port(), made), nprocs=2)
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, dict[str, Record]]:
    return torch.load(folder / "found.pt")  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("name", cases())
def test_shared_out_learns_the_same(name: str, found: dict[str, dict[str, Record]]) -> None:
    ours, expected = found["full"][name], found["none"][name]
    near = 1e-2 if name == "bf16" else 1e-5
    for part in ("losses", "gradients"):
        for number, (a, b) in enumerate(zip(ours[part], expected[part], strict=True)):
            assert_near(a, b, near, f"{part} of step {number}")
    assert_near(ours["objective"], expected["objective"], near, "centres")
    # Adam's step is the learning rate by the gradient's sign, and the sign of a zero is rounding
    sure: dict[str, Tensor] = {}
    for key in expected["student"]:
        of_steps = [each.get(key) for each in expected["gradients"]]
        learning = [each.abs() for each in of_steps if each is not None]
        if len(learning) == len(of_steps):
            sure[key] = torch.stack(learning).amin(dim=0) > 1e-4
    for network in ("student", "teacher"):
        for key, where in sure.items():
            if key in expected[network]:
                a, b = (each[network][key][where] for each in (ours, expected))
                torch.testing.assert_close(a, b, rtol=0, atol=near, msg=lambda m, k=key: f"{k}: {m}")
    assert any(bool(each.any()) for each in sure.values())


def assert_near(ours: Record, expected: Record, near: float, what: str) -> None:
    """Within `near`, of a tensor's largest value where that is above 1."""
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        assert (ours[key] is None) == (value is None), key
        if value is not None:
            atol = near * max(1.0, float(value.abs().max()))
            a, b = without_keys(key, ours[key]), without_keys(key, value)
            torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda m, k=key: f"{what}, {k}: {m}")


@pytest.mark.slow
def test_clipping_freezing_and_idle_weights_show(found: dict[str, dict[str, Record]]) -> None:
    """Each case does what it is there for."""
    clipped = found["full"]["clip+freeze"]["gradients"]
    norms = [float(each.norm()) for grads in clipped for each in grads.values() if each is not None]
    assert max(norms) == pytest.approx(0.05, rel=1e-3)
    assert [grads["head.last_layer.weight_v"] is None for grads in clipped] == [True] * 3 + [False] * 2
    assert found["full"]["cls"]["gradients"][0]["head.last_layer2.weight_v"] is None


@pytest.mark.slow
def test_a_step_that_is_not_finite_in_one_process_changes_nothing(folder: Path) -> None:
    for rank in range(2):
        assert torch.load(folder / f"broken-{rank}.pt")["skipped"]
    assert torch.load(folder / "broken-0.pt")["kept"]


@pytest.mark.slow
def test_a_run_changes_between_one_process_and_two_that_share(folder: Path) -> None:
    undisturbed = load_checkpoint(train_in(folder / "alone") / "checkpoints" / "last.pt")
    stopped = load_checkpoint(folder / "from-two" / "checkpoints" / "last.pt")
    assert stopped["step"] == TURN
    train_in(folder / "from-two")
    for name in ("from-one", "from-two"):
        state = load_checkpoint(folder / name / "checkpoints" / "last.pt")
        assert state.keys() == undisturbed.keys()
        for part in ("student", "teacher", "objective"):
            assert_near(state[part], undisturbed[part], 1e-4, f"{name}: {part}")
        assert state["optimizer"]["param_groups"] == undisturbed["optimizer"]["param_groups"]
        for number, moments in undisturbed["optimizer"]["state"].items():
            assert_near(state["optimizer"]["state"][number], moments, 1e-5, f"{name}: moments {number}")
        assert state["best"] == pytest.approx(undisturbed["best"], abs=1.0)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), r"shard=full needs several processes: set devices=<GPUs>, or shard=none"),
        (("devices=2", "compile=true"), "shard=full does not work with compile=true: leave compile out"),
        (("devices=2", "precision=fp16"), "shard=full does not work with precision=fp16: use bf16 or fp32"),
        (("devices=2", "accelerator=mps"), "shard=full does not work with accelerator=mps: use cuda"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(words: tuple[str, ...], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        api.resolve("debug-pretrain", ["shard=full", *words])


@pytest.mark.parametrize(
    ("device", "autocast", "why"), [("mps", None, "not on mps; use shard=none"), ("cpu", torch.float16, "float16")]
)
def test_devices_that_cannot_share(device: str, autocast: torch.dtype | None, why: str) -> None:
    """Where `accelerator` or `precision` is auto."""
    learner = Learner.create(cases()["every"][0], 8, CPU, None)
    with pytest.raises(ConfigError, match=why):
        shard.share_out(learner.pair, torch.device(device), autocast)


def test_a_network_that_is_not_shared_out_stays_as_it_is() -> None:
    learner = Learner.create(cases()["every"][0], 8, CPU, None)
    backbone = learner.pair.teacher.backbone
    assert shard.whole_backbone(backbone, CPU) is backbone
    kept = tensors(learner.state())
    assert all(
        a.data_ptr() == b.data_ptr() for a, b in zip(kept, tensors(learner.pair.student.state_dict()), strict=False)
    )
