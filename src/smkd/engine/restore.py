"""From checkpoints back to networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import nn

from smkd.config import loading
from smkd.config.schema import RunConfig
from smkd.engine import checkpoint
from smkd.engine.step import Learner
from smkd.errors import CheckpointError
from smkd.models.vit import VisionTransformer


def restore(learner: Learner, state: dict[str, Any], *, optimizer: bool) -> None:
    """Load student, teacher and centres, and on request the optimiser with its loss scaler.

    Raises:
        CheckpointError: names or shapes do not fit this configuration.
    """
    parts: list[tuple[str, nn.Module]] = [
        ("student", learner.pair.student), ("teacher", learner.pair.teacher), ("objective", learner.objective)
    ]  # fmt: skip
    for name, module in parts:
        own, given = module.state_dict(), state[name]
        wrong = {
            k for k in own.keys() | given.keys() if k not in own or k not in given or own[k].shape != given[k].shape
        }
        # the supervised classifier belongs to one run's training classes; for others it starts afresh
        fresh = {key for key in wrong if key.startswith("classifier.")}
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
            learner.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"the checkpoint's optimiser state does not fit this run: {error}") from error
        learner.scaler.load_state_dict(state["scaler"])


def load_backbone(
    where: Path, network: Literal["teacher", "student"] = "teacher"
) -> tuple[VisionTransformer, RunConfig]:
    """Backbone in evaluation mode, and the configuration of the run that trained it.

    Args:
        where: run folder (its best checkpoint, else its last) or checkpoint file.
        network: the teacher is the one that is measured.

    Raises:
        CheckpointError: missing, unreadable, or not one of ours.
    """
    state = checkpoint.load(checkpoint.find(where))
    config = loading.check(state["config"])
    backbone = VisionTransformer.from_config(config.model, mask_token=network == "student")
    prefix = "backbone."
    weights = {k.removeprefix(prefix): v for k, v in state[network].items() if k.startswith(prefix)}
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"'{where}': the weights do not fit their own configuration: {error}") from error
    return backbone.eval(), config
