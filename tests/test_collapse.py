"""A teacher that no longer tells images apart is said once, in plain words; healthy runs never say it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from run_files import OUT, records, run
from smkd import api
from smkd.engine import collapse
from smkd.engine.collapse import CollapseWatch, TeacherAnswers, measure_answers, signs
from smkd.engine.step import Learner
from smkd.errors import Stopped
from smkd.models.pair import StudentTeacher

pytestmark = pytest.mark.slow

CONFIG = api.resolve("debug-pretrain", ["head.num_prototypes=8"])
HEALTHY = {"target_entropy": 0.5, "mean_target_entropy": 0.9, "target_prototypes": 6, "feature_rank": 5.0}


def answers(logits: torch.Tensor, features: torch.Tensor | None = None) -> TeacherAnswers:
    return TeacherAnswers(logits, torch.zeros(logits.shape[1]), 1.0, torch.eye(4) if features is None else features)


def test_the_numbers_of_known_answers() -> None:
    certain = measure_answers(answers(1000 * torch.eye(8)[[0, 0, 3, 5]]))
    assert certain["target_entropy"] == pytest.approx(0, abs=1e-6)
    assert certain["mean_target_entropy"] == pytest.approx(1.5 * math.log(2) / math.log(8))
    assert certain["target_prototypes"] == 3
    assert certain["feature_rank"] == pytest.approx(4)
    uniform = measure_answers(answers(torch.zeros(4, 8), torch.ones(4, 9)))
    assert uniform["target_entropy"] == pytest.approx(1)
    assert uniform["mean_target_entropy"] == pytest.approx(1)
    assert uniform["feature_rank"] == pytest.approx(1, abs=1e-3)
    # more images than channels; singular values 2 and 1
    tall = torch.zeros(9, 2)
    tall[0, 0], tall[1, 1] = 2.0, 1.0
    rank = math.exp(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3))
    assert measure_answers(answers(torch.zeros(9, 8), tall))["feature_rank"] == pytest.approx(rank)


def test_the_centre_and_the_temperature_count() -> None:
    logits = torch.tensor([[9.0, 0.0], [9.0, 2.0]])
    found = measure_answers(TeacherAnswers(logits, torch.tensor([8.0, 0.0]), 0.5, torch.eye(2)))
    p = torch.tensor([[2.0, 0.0], [2.0, 4.0]]).softmax(dim=-1)
    assert found["target_entropy"] == pytest.approx(float(-(p * p.log()).sum(dim=-1).mean()) / math.log(2), rel=1e-5)
    assert found["target_prototypes"] == 2


@pytest.mark.parametrize("where", ["logits", "features"])
def test_what_is_not_finite_has_no_numbers(where: str) -> None:
    logits, features = torch.zeros(4, 8), torch.eye(4)
    {"logits": logits, "features": features}[where][1, 1] = torch.nan
    assert measure_answers(answers(logits, features)) == {}


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, []),
        ({"target_entropy": 1.0, "mean_target_entropy": 1.0}, ["uniform"]),
        ({"target_entropy": 0.0, "mean_target_entropy": 0.001}, ["same"]),
        ({"target_entropy": 0.97, "mean_target_entropy": 0.971}, ["same"]),
        ({"target_entropy": 0.97, "mean_target_entropy": 0.99}, []),
        ({"feature_rank": 1.2}, ["features"]),
    ],
)
def test_signs(values: dict[str, float], found: list[str]) -> None:
    assert list(signs({**HEALTHY, **values}, CONFIG)) == found
    # prototypes that nothing trains say nothing
    untrained = api.resolve("debug-pretrain", ["objective.cls.weight=0", "head.num_patch_prototypes=8"])
    assert list(signs({**HEALTHY, **values}, untrained)) == [sign for sign in found if sign == "features"]


def test_it_is_said_once_until_it_recovers() -> None:
    said: list[tuple[int, str]] = []

    class Lines:
        def write(self, kind: str, step: int, values: Any) -> None:
            said.append((step, f"{kind} {values['sign']}"))

        def say(self, line: str) -> None:
            said.append((0, line))

    watch, ill = CollapseWatch(CONFIG), {**HEALTHY, "target_entropy": 0.9}
    for step, values in enumerate([ill, ill, HEALTHY, ill, ill, {}, ill, ill, HEALTHY, ill, ill, ill], start=1):
        watch.look(Lines(), step, values)  # type: ignore[arg-type]
    assert [step for step, line in said if step] == [7, 12]
    assert said[0][1] == "collapse same"
    assert said[1][1].startswith("step 7: the teacher answers the same for every image: 16 images use 6 of 8 proto")


def constant_features(monkeypatch: pytest.MonkeyPatch) -> None:
    real = StudentTeacher.teacher_outputs

    def outputs(pair: StudentTeacher, views: torch.Tensor) -> Any:
        found = real(pair, views)
        assert found.features is not None
        return found._replace(features=torch.ones_like(found.features))

    monkeypatch.setattr(StudentTeacher, "teacher_outputs", outputs)


HOT = ("objective.cls_temperature={end: 10, warmup_epochs: 0}",)
ONE = ("objective.cls_center_momentum=1", "objective.cls_temperature={end: 1e-4, warmup_epochs: 0}")


@pytest.mark.parametrize(
    ("words", "sign"), [((), ""), (HOT, "uniform"), (ONE, "same"), ((), "features")], ids=["no", "hot", "one", "same"]
)
def test_runs_that_collapse_say_it_and_others_do_not(
    words: tuple[str, ...], sign: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if sign == "features":
        constant_features(monkeypatch)
    if sign == "same":  # one prototype outweighs the others
        monkeypatch.setattr(Learner, "create", staticmethod(biased(Learner.create)))
    run("epochs=2", "log_every=1", "validation.every=0", "precision=fp32", *words)
    told = [line for line in records() if line["kind"] == "collapse"]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    if not sign:
        assert (told, said) == ([], [])
        return
    (record,), (line,) = told, said
    assert (record["sign"], record["step"]) == (sign, collapse.LINES)
    assert line.startswith(f"step {collapse.LINES}: the ")
    assert "; try " in line


def biased(create: Any) -> Any:
    def made(*args: Any) -> Learner:
        learner: Learner = create(*args)
        learner.objective.cls_center[3] = -100.0  # stays so without momentum
        return learner

    return made


def test_the_count_goes_on_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("epochs=2", "log_every=1", "validation.every=0", *HOT)
    while True:
        try:
            run(*words, "max_hours=1e-9")
            break
        except Stopped:
            continue
    assert [line["step"] for line in records() if line["kind"] == "collapse"] == [collapse.LINES]
    assert (OUT / "checkpoints" / "last.pt").exists()
