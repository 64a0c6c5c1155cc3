"""The objective, with the published code's matching, against the reference's losses, gradients and centres."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from golden_files import Golden, State, cases_within, close, load
from smkd.config.schema import HeadConfig, ObjectiveConfig, TemperatureConfig
from smkd.engine.optim import teacher_temperature
from smkd.models.head import PatchLogits
from smkd.models.pair import Outputs
from smkd.models.vit import patch_attention
from smkd.objectives.objective import Losses, Objective

CALLS = cases_within("loss_*.npz", r"(call\d+)/out/loss")
IBOT = cases_within("loss_*.npz", r"(call\d+)/ibot/loss")
TERMS = ("cls", "patch", "mim")


class Call(NamedTuple):
    """One call of our objective with a file's inputs.

    Attributes:
        gradients: of the total by student input; zero where it does not depend on one.
        term_gradients: the same of each term by itself.
        centers: afterwards, class and patch.
    """

    losses: Losses
    gradients: State
    term_gradients: dict[str, State]
    centers: tuple[Tensor, Tensor]


def objective_config(golden: Golden) -> ObjectiveConfig:
    options = golden.options
    return ObjectiveConfig.model_validate({
        "labels": "labels" in golden,
        "cls": {"weight": options["lambda1"]},
        "patch": {
            "weight": options["lambda2"],
            "matching": "reference",
            "weighting": "attention" if options["weighted_pool"] else "mean",
        },
        "mim": {"weight": options["lambda3"]},
        "student_temperature": options["student_temp"],
        "cls_center_momentum": options["center_momentum"],
        "patch_center_momentum": options["center_momentum2"],
    })  # fmt: skip


def make_objective(golden: Golden, call: str) -> Objective:
    cls, patch = golden.tensor(f"{call}/center_before"), golden.tensor(f"{call}/center2_before")
    head = HeadConfig(num_prototypes=cls.numel(), num_patch_prototypes=patch.numel())
    objective = Objective(objective_config(golden), head)
    objective.cls_center.copy_(cls.flatten())
    objective.patch_center.copy_(patch.flatten())
    return objective


def outputs(inputs: State, who: str, batch: int, *, attention: bool = False) -> Outputs:
    """What a network said, from view-major rows to [views, batch, ...]; attention only where it is asked for."""

    def views(name: str) -> Tensor | None:
        rows = inputs.get(f"{who}_{name}")
        return None if rows is None else rows.unflatten(0, (-1, batch))

    logits = inputs.get(f"{who}_patch")
    # with unit vectors as prototypes, logits are embeddings
    patches = None if logits is None else PatchLogits(logits.flatten(0, 1), torch.eye(logits.shape[-1]))
    cls, tokens, rows = views("cls"), views("tokens"), inputs[f"{who}_attn"] if attention else None
    assert cls is not None
    weights = None if rows is None else patch_attention(rows[:, :, 0], rows.shape[-1] - 1)
    return Outputs(
        cls=cls,
        patches=patches,
        tokens=None if tokens is None else tokens[:, :, 1:],
        attention=None if weights is None else weights.unflatten(0, (-1, batch)),
        local_cls=views("local_cls"),
    )


def gradients_of(loss: Tensor, inputs: State) -> State:
    found = torch.autograd.grad(
        loss, list(inputs.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(inputs, found, strict=True))


@cache
def called(path: Path, call: str) -> Call:
    golden = load(path)
    inputs = golden.under(f"{call}/in")
    masks = inputs.pop("masks")
    batch = masks.shape[1]
    student = {
        name: inputs[name].clone().requires_grad_()
        for name in ("student_cls", "student_patch", "student_local_cls")
        if name in inputs
    }
    # without labels they must play no part, whatever they are
    labels = golden.tensor("labels") if "labels" in golden else torch.zeros(batch, dtype=torch.long)
    objective = make_objective(golden, call)
    # as in training: the teacher is asked for its attention only where the patch term weighs by it
    weighted = objective.config.patch.weight > 0 and objective.config.patch.weighting == "attention"
    losses = objective(
        outputs({**inputs, **student}, "student", batch), outputs(inputs, "teacher", batch, attention=weighted),
        masks, labels,
        cls_temperature=golden.number(f"{call}/teacher_temp"),
        patch_temperature=golden.number(f"{call}/teacher_patch_temp"),
    )  # fmt: skip
    return Call(
        losses,
        gradients_of(losses.total, student),
        {name: gradients_of(term, student) for name, term in losses.terms.items()},
        (objective.cls_center, objective.patch_center),
    )


def close_loss(actual: Tensor, expected: Tensor, what: str) -> None:
    close(actual, expected, atol=1e-5, rtol=1e-5, what=what)


def close_gradient(actual: Tensor, expected: Tensor, what: str) -> None:
    close(actual, expected, atol=1e-6, rtol=1e-4, what=what)


@pytest.mark.parametrize(("path", "call"), CALLS)
def test_terms_and_total(path: Path, call: str) -> None:
    golden, losses = load(path), called(path, call).losses
    expected = {name: golden.tensor(f"{call}/out/{name}") for name in TERMS}
    assert losses.terms.keys() == {
        name for name, weight in zip(TERMS, ("lambda1", "lambda2", "lambda3"), strict=True)
        if golden.options[weight] > 0
    }  # fmt: skip
    for name, value in expected.items():
        # a term without a single pair is 0/0 there and exactly zero here
        close_loss(losses.terms.get(name, torch.zeros(())), value.nan_to_num(nan=0.0), name)
    total = golden.tensor(f"{call}/out/loss")
    close_loss(losses.total, torch.stack(list(expected.values())).nansum(), "total")
    if total.isfinite():
        close_loss(losses.total, total, "total")


@pytest.mark.parametrize(("path", "call"), CALLS)
def test_terms_without_pairs_are_zero_and_reported(path: Path, call: str) -> None:
    golden, result = load(path), called(path, call)
    undefined = {name for name in TERMS if golden.tensor(f"{call}/out/{name}").isnan()}
    # a batch without one masked patch has no MIM pair either; there the reference says 0 itself
    assert set(result.losses.empty) - {"mim"} == undefined
    for name in undefined:
        assert result.losses.terms[name].item() == 0.0
        assert all(not gradient.any() for gradient in result.term_gradients[name].values())


@pytest.mark.parametrize(("path", "call"), CALLS)
def test_gradients(path: Path, call: str) -> None:
    golden, result = load(path), called(path, call)
    expected = golden.under(f"{call}/grad")
    assert expected.keys() <= result.gradients.keys()
    for name, gradient in result.gradients.items():
        assert gradient.isfinite().all(), name
        # no array: the reference's loss does not depend on that input; NaN: it comes from a term that is zero here
        value = expected.get(name, torch.zeros_like(gradient))
        close_gradient(gradient, value.nan_to_num(nan=0.0), name)


@pytest.mark.parametrize(("path", "call"), CALLS)
def test_centers(path: Path, call: str) -> None:
    golden = load(path)
    for center, name in zip(called(path, call).centers, ("center_after", "center2_after"), strict=True):
        close_loss(center, golden.tensor(f"{call}/{name}").flatten(), name)


@pytest.mark.parametrize(("path", "call"), CALLS)
def test_temperatures_of_the_epoch(path: Path, call: str) -> None:
    golden = load(path)
    options, epoch = golden.options, int(golden.number(f"{call}/epoch"))
    for suffix, name, hold in (("", "teacher_temp", 0), ("2", "teacher_patch_temp", options["mim_start_epoch"])):
        config = TemperatureConfig(
            start=options[f"warmup_teacher_temp{suffix}"], end=options[f"teacher_temp{suffix}"],
            warmup_epochs=options["warmup_teacher_temp_epochs"],
        )  # fmt: skip
        assert teacher_temperature(config, epoch, hold) == pytest.approx(golden.number(f"{call}/{name}"), abs=1e-12)


@pytest.mark.parametrize(("path", "call"), IBOT)
def test_phase_one_is_ibot(path: Path, call: str) -> None:
    golden, result = load(path), called(path, call)
    ibot = golden.under(f"{call}/ibot")
    # iBOT calls masked-patch prediction its patch term
    close_loss(result.losses.terms["cls"], ibot["cls"], "cls")
    close_loss(result.losses.terms["mim"], ibot["patch"], "mim")
    close_loss(result.losses.total, ibot["loss"], "total")
    for name, gradient in result.gradients.items():
        close_gradient(gradient, ibot[f"grad_{name}"], name)
    for center, name in zip(result.centers, ("center_after", "center2_after"), strict=True):
        close_loss(center, ibot[name].flatten(), name)
