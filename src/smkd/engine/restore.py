"""From checkpoints back to networks."""

from __future__ import annotations

import zipfile
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from torch import nn

from smkd.config import loading
from smkd.config.schema import RunConfig
from smkd.engine import checkpoint
from smkd.engine.optim import is_decayed
from smkd.engine.step import Learner
from smkd.errors import CheckpointError
from smkd.interop import fetching, header, load, reading
from smkd.models.vit import VisionTransformer


def open_checkpoint(where: str | Path, base: RunConfig | None = None) -> tuple[dict[str, Any], Path]:
    """A checkpoint of ours, or the weights of another project as one; and the file that was read.

    Args:
        where: run folder, file, folder with weights, URL with its checksum, or `hf:owner/name`.
        base: settings to go with foreign weights, which bring none.

    Raises:
        CheckpointError: missing, unreadable, no ViT, or foreign, not of `smkd export`, where `base` is None.
    """
    source = str(where)
    ours = Path(source).is_dir() and (Path(source) / "checkpoints").is_dir()
    file = checkpoint.find(Path(source)) if ours else fetching.locate(source)
    content = reading.read(file)
    if is_ours(content):
        if zipfile.is_zipfile(file):  # `smkd export` writes other forms as well
            checkpoint.verify(file)
        return content, file
    if base is None and header.KEY not in content:
        raise CheckpointError(
            f"'{source}' is not a checkpoint of smkd; foreign weights need --recipe, or `smkd import`"
        )
    return load.imported(content, source, base, heads=fetching.heads_beside(file)), file


def is_ours(content: dict[str, Any]) -> bool:
    """Whether what a file holds is a checkpoint of this package."""
    return isinstance(content.get("config"), dict) and str(content.get("format")) == str(checkpoint.FORMAT)


def restore(learner: Learner, state: dict[str, Any], *, optimizer: bool) -> list[str]:
    """Load student, teacher and centres, and on request the optimiser with its loss scaler.

    Returns:
        Lines about what was changed to fit, where the weights are another project's.

    Raises:
        CheckpointError: names or shapes do not fit this configuration.
    """
    parts: list[tuple[str, nn.Module]] = [
        ("student", learner.pair.student), ("teacher", learner.pair.teacher), ("objective", learner.objective)
    ]  # fmt: skip
    lines: list[str] = []
    foreign = load.MARK in state
    if foreign:
        if optimizer:
            raise CheckpointError("init_optimizer=true, but imported weights come without an optimiser's state")
        state, lines = load.fit(state, learner.config, {name: module.state_dict() for name, module in parts})
    for name, module in parts:
        own, given = module.state_dict(), state[name]
        wrong = {
            k for k in own.keys() | given.keys() if k not in own or k not in given or own[k].shape != given[k].shape
        }
        # the supervised classifier belongs to one run's training classes; for others it starts afresh
        fresh = {key for key in wrong if key.startswith("classifier.")}
        if foreign:
            fresh |= {key for key in wrong if key.startswith("head.")}
        wrong -= fresh
        if wrong:
            key = min(wrong)
            have = f"has {list(given[key].shape)}" if key in given else "does not have it"
            want = f"needs {list(own[key].shape)}" if key in own else "has no such weight"
            raise CheckpointError(
                f"the checkpoint does not fit this model ({len(wrong)} weights): {name}.{key}: this run {want}, "
                f"the checkpoint {have}"
            )
        module.load_state_dict({key: value for key, value in given.items() if key not in fresh}, strict=False)
    if optimizer:
        try:
            learner.optimizer.load_state_dict(_optimizer_state(learner, state))
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"the checkpoint's optimiser state does not fit this run: {error}") from error
        learner.scaler.load_state_dict(state["scaler"])
    return lines


def _optimizer_state(learner: Learner, state: dict[str, Any]) -> dict[str, Any]:
    """The optimiser's state in a checkpoint, numbered as this run's parameters are.

    They are numbered otherwise where one of the two trains the prototypes' norms and the other does not.
    """
    saved: dict[str, Any] = state["optimizer"]
    here, there = learner.config.head.fixed_norm, state.get("config", {}).get("head", {}).get("fixed_norm")
    if there is None or here == there:
        return saved
    names = _numbered(learner.pair.student, fixed_norm=here)
    numbers = {name: number for number, name in enumerate(chain(*_numbered(learner.pair.student, fixed_norm=there)))}
    own = learner.optimizer.state_dict()
    kept = {
        number: saved["state"][numbers[name]]
        for number, name in enumerate(chain(*names))
        if numbers.get(name) in saved["state"]
    }
    groups = [
        {**group, "params": mine["params"]}
        for group, mine in zip(saved["param_groups"], own["param_groups"], strict=True)
    ]
    return {"state": kept, "param_groups": groups}


def _numbered(student: nn.Module, *, fixed_norm: bool) -> list[list[str]]:
    """Names of the parameters in the optimiser's two groups."""
    groups: list[list[str]] = []
    trained = {name: p for name, p in student.named_parameters()
               if p.requires_grad or (name.endswith("weight_g") and not fixed_norm)}  # fmt: skip
    for decayed in (True, False):
        groups.append([
            name for name, p in trained.items()
            if not (fixed_norm and name.endswith("weight_g")) and is_decayed(name, p) == decayed
        ])  # fmt: skip
    return groups


def backbone_of(
    state: dict[str, Any], where: str, network: Literal["teacher", "student"]
) -> tuple[VisionTransformer, RunConfig]:
    """Backbone of a checkpoint that was read, in evaluation mode, and its configuration.

    Raises:
        CheckpointError: the weights are not those that its configuration describes.
    """
    config = loading.check(state["config"])
    backbone = VisionTransformer.from_config(config.model, mask_token=network == "student")
    prefix = "backbone."
    weights = {k.removeprefix(prefix): v for k, v in state[network].items() if k.startswith(prefix)}
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"'{where}': the weights do not fit their own configuration: {error}") from error
    return backbone.eval(), config
