"""Taking a backbone elsewhere, and back: `smkd.export` and `smkd.from_pretrained`."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from smkd.config.loading import resolve
from smkd.engine.document import needed
from smkd.engine.restore import backbone_of, open_checkpoint
from smkd.errors import ConfigError
from smkd.fewshot.features import pool
from smkd.files import expanded, sha256
from smkd.interop import header
from smkd.interop.export import form_of, write
from smkd.interop.export_hub import HubBackbone, push
from smkd.interop.export_scores import found_scores, run_of
from smkd.interop.fetching import HUB, is_remote, locate
from smkd.interop.header import Score, Settings
from smkd.interop.load import EXPORTED, MARK
from smkd.interop.release import Release, without_paths


class Exported(NamedTuple):
    """What `export` wrote.

    Attributes:
        path: the file or folder.
        report: lines about what was checked and what to know.
    """

    path: Path
    report: list[str]


def export(
    where: str | Path, to: str, out: str | Path | None = None, *, network: Literal["teacher", "student"] = "teacher",
    image_size: int | None = None, dynamic_size: bool = False, repository: str | None = None,
    license: str | None = None, recipe: str = "folder-pretrain", overwrite: bool = False,
    heads: int | None = None,
) -> Exported:  # fmt: skip
    """Write a backbone for other libraries and programs (docs/export.md).

    Args:
        where: run folder, checkpoint, or weights of another project (docs/weights.md).
        to: 'timm', 'safetensors', 'onnx', 'torch-export' or 'hub'.
        out: file or folder to write; none takes the run's name, in the working directory.
        network: which of a checkpoint's two.
        image_size: side in pixels of the square images that it is for; none is the run's own.
        dynamic_size: an ONNX or PyTorch program for images of any whole number of patches.
        repository: 'owner/name' on the Hub, to which a 'hub' folder is also pushed.
        license: identifier of the weights' licence for the model card, such as 'apache-2.0'.
        recipe: settings of weights that bring none, such as the normalisation.
        overwrite: replace what is at `out` even if it is no former export.
        heads: number of attention heads of weights of another project; none finds or guesses it (docs/weights.md).

    Raises:
        SmkdError: wrong settings, a place that is taken, or a program that computes something else than the backbone.
    """
    form = form_of(to)
    state, file = open_checkpoint(where, resolve(recipe), heads)
    release = _release(state, file, str(where), network, license)
    release = release if image_size is None else release.at(image_size)
    path = expanded(f"{release.about.name}{form.suffix}" if out is None else out)
    if path.exists() and file.exists() and os.path.samefile(path, file):
        raise ConfigError(f"-o '{path}' is the file that the backbone comes from; choose another")
    make_features = partial(pool, config=release.config.features)
    report = write(
        release, to, path, make_features, dynamic_size=dynamic_size, repository=repository, overwrite=overwrite
    )
    return Exported(path, report + ([] if repository is None else [f"pushed: {push(path, repository)}"]))


def from_pretrained(where: str | Path, revision: str | None = None, heads: int | None = None) -> HubBackbone:
    """Backbone of the Hugging Face Hub, in evaluation mode on the CPU.

    Args:
        where: 'owner/name'; or a folder or file that `smkd export` wrote.
        revision: branch, tag or commit of the repository.
        heads: number of attention heads of weights of another project; none finds or guesses it (docs/weights.md).

    Raises:
        CheckpointError: there is none, it cannot be fetched, or it is not a ViT of a kind that this package has.
    """
    source = str(where)
    if source.startswith("~"):
        source = str(expanded(source))
    if not Path(source).exists():
        source = f"{HUB}{source.removeprefix(HUB)}" + ("" if revision is None else f"@{revision}")
    return HubBackbone.opened(locate(source), str(where), heads)


def _release(
    state: dict[str, Any], file: Path, where: str, network: Literal["teacher", "student"], license: str | None
) -> Release:
    backbone, config = backbone_of(state, where, network)
    run = run_of(file)
    if EXPORTED in state:
        about = header.checked(state[EXPORTED], where)
    else:
        scores: tuple[Score, ...] = ()
        if run is not None and network == "teacher":
            needed(state, ("step",), where)
            scores = found_scores(run, config, digest=sha256(file), step=int(state["step"]))
        name = _name(where) if run is None else run.resolve().name
        about = Settings(name=name, network=network, config=config, scores=scores, source=_source(state))
    changes = {"config": without_paths(config)} | ({} if license is None else {"license": license})
    return Release(backbone, about.model_copy(update=changes))


def _name(where: str) -> str:
    path = Path(where.partition("#")[0])
    return (path.resolve() if path.exists() else path).stem or "backbone"


def _source(state: dict[str, Any]) -> str:
    """Whose weights a checkpoint holds, if another project's."""
    if MARK not in state:
        return ""
    file, _, layout = state[MARK][0].rpartition(": ")
    return f"{file.partition('#')[0] if is_remote(file) else Path(file).name} ({layout})"
