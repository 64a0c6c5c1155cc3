"""What a checkpoint must hold, checked once when it is read: the rest of the package takes its parts as they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from smkd.config import loading
from smkd.config.run_config import RunConfig
from smkd.config.schema import Count, HeadConfig
from smkd.errors import CheckpointError, ConfigError
from smkd.weights.architecture import check_described, check_finite, head_shapes, weight_fault
from smkd.weights.rename import BACKBONE, HEAD, without_prefix

Weights = dict[str, Tensor]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Plain(BaseModel):
    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True, extra="ignore")


Part = TypeVar("Part", bound=_Plain)


class _Moments(_Plain):
    """What AdamW knows of one parameter."""

    step: Tensor | float
    exp_avg: Tensor
    exp_avg_sq: Tensor


class _Group(_Plain):
    params: list[Count]


class _Optimizer(_Plain):
    state: dict[Count, _Moments]
    param_groups: list[_Group]


class _Scaler(_Plain):
    scale: Above0
    growth_factor: Above0
    backoff_factor: Above0
    growth_interval: Annotated[int, Field(ge=1)]
    growth_tracker: Annotated[Count, Field(alias="_growth_tracker")]


class _Skips(_Plain):
    """What `smkd.engine.guard` keeps of one process: step, whether it was skipped, and losses."""

    row: Count
    pending: list[tuple[Count, Tensor, Weights]]


class _Means(_Plain):
    """What `smkd.engine.meter` has seen of an epoch in one process."""

    sums: Weights
    empty: dict[str, Count]
    count: Count
    assigned: Tensor
    labels: Tensor
    epoch_loss: list[float]
    skipped: Count
    skipped_steps: Count
    seconds: float
    seconds_of_line: float


class _Data(_Plain):
    """What `smkd.data.inspect` says of the training images."""

    classes: dict[str, Count]
    digest: str


class _Document(_Plain):
    """The parts of a checkpoint; which of them must be there, `needed` says."""

    student: Weights | None = None
    teacher: Weights | None = None
    objective: Weights | None = None
    optimizer: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    epoch: Count | None = None
    step: Count | None = None
    step_in_epoch: Count = 0
    meters: list[_Means] = []
    guards: list[_Skips] = []
    collapse: dict[str, Count] = {}
    best: float | None = None
    best_step: int = -1
    stale: Count = 0
    data: _Data | None = None
    classes: list[str] = []
    version: str = ""
    imported: list[str] = []
    exported: dict[str, Any] = {}


RESUMED = ("student", "teacher", "objective", "optimizer", "scaler", "epoch", "step", "best", "config")
"""What a run goes on from."""


def needed(document: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Raise `CheckpointError` where a part of a checkpoint is missing."""
    for name in names:
        if document.get(name) is None:
            raise CheckpointError(f"'{where}': {name} is missing; the checkpoint is damaged")


def checked(document: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A checkpoint of ours with every part that it has of its type, its weights finite, and as its settings say.

    Args:
        document: what the file holds.
        where: what messages call it.

    Raises:
        CheckpointError: a part is of another type or not finite, or weights do not fit the settings; names it.
    """
    parts = _of(_Document, document, where, "")
    if parts.best is not None and math.isnan(parts.best):
        raise CheckpointError(f"'{where}': best is NaN")
    if parts.step_in_epoch and not parts.meters:
        raise CheckpointError(f"'{where}': meters are missing; the checkpoint is damaged")
    config = None if parts.config is None else _configured(parts.config, where)
    named = {"student": parts.student, "teacher": parts.teacher, "objective": parts.objective}
    for part, weights in named.items():
        for name, value in (weights or {}).items():
            if fault := weight_fault(value):
                raise CheckpointError(f"'{where}': {part}.{name} is {fault}")
        check_finite({f"{part}.{name}": value for name, value in (weights or {}).items()}, where)
    for part in ("student", "teacher"):
        network = named[part]
        if config is None or network is None:
            continue
        check_described(without_prefix(network, BACKBONE), config.model, where)
        head = {name: tuple(value.shape) for name, value in without_prefix(network, HEAD).items()}
        if head and not _same_head(head, network, config.head):
            raise CheckpointError(f"'{where}': the {part}'s projection head is not the one of its settings")
    return dict(document)


def checked_optimizer(
    document: Mapping[str, Any], groups: list[list[nn.Parameter]], where: str, *, scaled: bool
) -> tuple[dict[int, Any], dict[str, Any]]:
    """The optimiser's state by parameter, and the loss scaler's, of a checkpoint that passed `checked`.

    Args:
        document: the checkpoint.
        groups: the parameters that the state is for, as the optimiser groups them.
        where: what messages call the file.
        scaled: whether a loss scaler is in use.

    Raises:
        CheckpointError: it is not that of these parameters, or damaged.
    """
    found = checked_moments(document, where)
    sizes, own = [len(group.params) for group in found.param_groups], [len(group) for group in groups]
    if sizes != own:
        raise CheckpointError(
            f"'{where}': the optimiser's state is for {sizes} parameters, this run has {own} (in groups)"
        )
    parameters = [parameter for group in groups for parameter in group]
    for place, moments in found.state.items():
        for name, value in (("exp_avg", moments.exp_avg), ("exp_avg_sq", moments.exp_avg_sq)):
            _check_shape(value, list(parameters[place].shape), f"optimizer.state.{place}.{name}", where)
    if scaled and document["scaler"]:
        _of(_Scaler, document["scaler"], where, "scaler")
    return document["optimizer"]["state"], document["scaler"]


def checked_moments(document: Mapping[str, Any], where: str) -> _Optimizer:
    """The optimiser's state of a checkpoint that passed `checked`, whole and finite, whatever it is for.

    Raises:
        CheckpointError: a part is missing, not finite, or of a parameter that there is not; names it.
    """
    found = _of(_Optimizer, document["optimizer"], where, "optimizer")
    places = [place for group in found.param_groups for place in group.params]
    if places != list(range(len(places))):
        raise CheckpointError(f"'{where}': optimizer.param_groups does not count its parameters through")
    for place, moments in found.state.items():
        if place >= len(places):
            raise CheckpointError(f"'{where}': optimizer.state has {place}, but there are {len(places)} parameters")
        for name, value in (("exp_avg", moments.exp_avg), ("exp_avg_sq", moments.exp_avg_sq), ("step", moments.step)):
            named = f"optimizer.state.{place}.{name}"
            if not isinstance(value, Tensor):
                value = torch.tensor(value)
            if fault := weight_fault(value):
                raise CheckpointError(f"'{where}': {named} is {fault}")
            if name == "step":
                _check_shape(value, [], named, where)
            check_finite({named: value}, where)
    return found


def _configured(values: dict[str, Any], where: str) -> RunConfig:
    try:
        return loading.check(values)
    except ConfigError as error:
        raise CheckpointError(f"'{where}': config: {error}") from error


def _check_shape(value: Tensor, wanted: list[int], name: str, where: str) -> None:
    if list(value.shape) != wanted:
        raise CheckpointError(f"'{where}': {name} is {list(value.shape)}, but its parameter {wanted}")


def _same_head(head: dict[str, tuple[int, ...]], weights: Weights, told: HeadConfig) -> bool:
    # before anything of that many layers is made
    if told.layers != sum(name.startswith("mlp.") and name.endswith(".weight") for name in head):
        return False
    try:
        return head == head_shapes(weights["backbone.norm.weight"].shape[0], told)
    except (RuntimeError, TypeError):  # more numbers than can be counted
        return False


def _of(kind: type[Part], values: Any, where: str, group: str) -> Part:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(map(str, [*([group] if group else []), *first["loc"]]))[:120]
        what = "is missing" if first["type"] == "missing" else f"is damaged: {first['msg']}"
        raise CheckpointError(f"'{where}': {key or 'the checkpoint'} {what}") from error
