"""From checkpoints back to networks and runs."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from smkd.config import loading
from smkd.config.run_config import RunConfig
from smkd.engine import checkpoint, shard
from smkd.engine.checkpoint_schema import RESUMED, checked_optimizer, needed
from smkd.engine.optim import grouped
from smkd.errors import CheckpointError
from smkd.files import expanded
from smkd.models.vit import VisionTransformer
from smkd.weights import fetch, read, smkd_file
from smkd.weights.architecture import Architecture, check_described
from smkd.weights.attention_heads import check_heads
from smkd.weights.load import EXPORTED, FOREIGN_RECIPE, MARK, fit_to_run, imported, without_later_blocks
from smkd.weights.rename import BACKBONE, HEAD, without_prefix

if TYPE_CHECKING:
    from smkd.engine.step import Learner


def load(
    where: str | Path, network: Literal["teacher", "student"] = "teacher", heads: int | None = None
) -> VisionTransformer:
    """Trained backbone in evaluation mode on the CPU.

    Args:
        where: run folder, checkpoint, or weights of another project (docs/weights.md).
        network: 'teacher' or 'student' of a checkpoint.
        heads: number of attention heads of weights of another project; none finds or guesses it (docs/weights.md).

    Raises:
        CheckpointError: the file is missing, unreadable, has NaN, or is no ViT of a kind that this package has.
    """
    # of the settings only the backbone's matter here, and they come from the weights
    state, _ = open_checkpoint(where, loading.resolve(FOREIGN_RECIPE), heads)
    return backbone_of(state, str(where), network)[0]


def open_checkpoint(
    where: str | Path, base: RunConfig | None = None, heads: int | None = None
) -> tuple[dict[str, Any], Path]:
    """A checkpoint of ours, or the weights of another project as one; and the file that was read.

    Args:
        where: run folder, file, folder with weights, name of a published backbone, URL with its checksum, or
            `hf:owner/name`.
        base: settings to go with foreign weights, which bring none.
        heads: number of attention heads of foreign weights, where the user says it.

    Raises:
        CheckpointError: missing, unreadable, damaged, not finite, no ViT, or foreign, not of `smkd export`, where
            `base` is None.
    """
    remote = fetch.is_remote(str(where))
    source = str(where if remote else expanded(where))
    ours = not remote and (Path(source) / "checkpoints").is_dir()
    file = checkpoint.find_checkpoint(Path(source)) if ours else fetch.locate_weights(source)
    content = read.read_weights(file)
    if is_ours(content):
        content = checkpoint.trusted(content, file)
        check_heads(heads, Architecture.of(loading.check(content["config"]).model).num_heads, source)
        return content, file
    if base is None and smkd_file.KEY not in content:
        raise CheckpointError(
            f"'{source}' is not a checkpoint of smkd; foreign weights need --recipe, or `smkd import`"
        )
    return imported(content, source, base, heads=heads, beside=file), file


def is_ours(content: dict[str, Any]) -> bool:
    """Whether what a file holds is a checkpoint of this package."""
    return isinstance(content.get("config"), dict) and str(content.get("format")) == str(checkpoint.FORMAT)


def has_settings(state: dict[str, Any]) -> bool:
    """Whether what `open_checkpoint` gave has settings of its own, not those of `base`."""
    return is_ours(state) or EXPORTED in state


def restore(learner: Learner, state: dict[str, Any], *, optimizer: bool) -> list[str]:
    """Load student, teacher and centres, and on request the optimiser with its loss scaler.

    Returns:
        Lines about what was changed to fit.

    Raises:
        CheckpointError: names or shapes do not fit this configuration.
    """
    needed(state, RESUMED if optimizer and MARK not in state else RESUMED[:3], "checkpoint")
    parts: list[tuple[str, nn.Module]] = [
        ("student", learner.pair.student), ("teacher", learner.pair.teacher), ("objective", learner.objective)
    ]  # fmt: skip
    state, lines = without_later_blocks(state, learner.config.model)
    foreign = MARK in state
    if foreign:
        if optimizer:
            raise CheckpointError("init_optimizer=true, but imported weights come without an optimiser's state")
        own_states = {name: module.state_dict() for name, module in parts}
        state, fitted = fit_to_run(state, learner.config, own_states)
        lines += fitted
    for name, module in parts:
        own, given = module.state_dict(), state[name]
        wrong = {
            k for k in own.keys() | given.keys() if k not in own or k not in given or own[k].shape != given[k].shape
        }
        # the supervised classifier belongs to one run's training classes; for others it starts afresh
        fresh = {key for key in wrong if key.startswith("classifier.")}
        if foreign:
            fresh |= {key for key in wrong if key.startswith(HEAD)}
        wrong -= fresh
        if wrong:
            key = min(wrong)
            have = f"has {list(given[key].shape)}" if key in given else "does not have it"
            want = f"needs {list(own[key].shape)}" if key in own else "has no such weight"
            raise CheckpointError(
                f"the checkpoint does not fit this model ({len(wrong)} weights): {name}.{key}: this run {want}, "
                f"the checkpoint {have}"
            )
        fitting = {key: shard.part_like(value, own[key]) for key, value in given.items() if key not in fresh}
        module.load_state_dict(fitting, strict=False)
    learner.pair.share_frozen()
    if optimizer:
        _restore_optimizer(learner, state)
    return lines


def _restore_optimizer(learner: Learner, state: dict[str, Any]) -> None:
    """Load the optimiser's and the loss scaler's state; rates and the like are this run's own.

    Its parameters are numbered as the run that wrote it grouped them, which may have trained others.
    """
    config, student = learner.config, learner.pair.student
    wrote = loading.check(state["config"]) if "config" in state else config
    before = [list(group.named.items()) for group in grouped(student, wrote)]
    scaled = learner.scaler.is_enabled()
    moments, scale = checked_optimizer(
        state, [[each for _, each in group] for group in before], "the checkpoint", scaled=scaled
    )
    written = list(chain(*before))
    numbers = {name: number for number, name in enumerate(chain(*(each.named for each in grouped(student, config))))}
    kept = {}
    for place, each in moments.items():
        name, parameter = written[place]
        if name in numbers:
            kept[numbers[name]] = {key: shard.part_like(value, parameter) for key, value in each.items()}
    learner.optimizer.load_state_dict({**learner.optimizer.state_dict(), "state": kept})
    if scaled and scale:  # empty where the run went on in another precision
        learner.scaler.load_state_dict(scale)


def backbone_of(
    state: dict[str, Any], where: str, network: Literal["teacher", "student"]
) -> tuple[VisionTransformer, RunConfig]:
    """Backbone of a checkpoint that was read, in evaluation mode, and its configuration.

    Raises:
        CheckpointError: the weights are not those that its configuration describes.
    """
    needed(state, ("config", network), where)
    config = loading.check(state["config"])
    weights = without_prefix(state[network], BACKBONE)
    check_described(weights, config.model, where)
    try:
        return VisionTransformer.with_weights(config.model, weights), config
    except RuntimeError as error:  # lines of PyTorch's, the first of which names no weight
        _, first, *_ = [*str(error).splitlines(), ""]
        raise CheckpointError(f"'{where}': its weights do not fit its settings: {first.strip()}") from error
