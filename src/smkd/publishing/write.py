"""`smkd.export` and `smkd.from_pretrained`: the forms of a published backbone, and writing one of them."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, Literal

from smkd.config.loading import resolve
from smkd.engine.checkpoint_schema import needed
from smkd.engine.restore import backbone_of, open_checkpoint
from smkd.errors import ConfigError
from smkd.fewshot.features import pool
from smkd.files import expanded, sha256
from smkd.publishing.backbone import PublishedBackbone, found_scores, run_of, without_paths, write_safetensors
from smkd.publishing.classifier import classifier_file, export_classifier
from smkd.publishing.feature_graph import Pool, feature_program
from smkd.publishing.hub import HubBackbone, push, write_hub
from smkd.publishing.place import Exported, check_free, form_of, writing
from smkd.publishing.program import write_onnx, write_program
from smkd.publishing.timm import write_timm
from smkd.weights.catalogue import HUB
from smkd.weights.fetch import is_remote, locate_weights
from smkd.weights.load import EXPORTED, FOREIGN_RECIPE, MARK
from smkd.weights.smkd_file import BackboneInfo, Score, backbone_info


def write_form(
    release: PublishedBackbone, to: str, path: Path, pool: Pool, *, dynamic_size: bool = False,
    repository: str | None = None, overwrite: bool = False,
) -> list[str]:  # fmt: skip
    """Write a backbone in one of the forms; a failure leaves what was there before.

    Args:
        release: the backbone.
        to: name of the form.
        path: file or folder to write.
        pool: what makes features of tokens, for the programs.
        dynamic_size: a program for images of any whole number of patches.
        repository: 'owner/name' on the Hub that the model card points to.
        overwrite: replace something that is there and is no former export.

    Returns:
        Lines about what was checked and what to know.

    Raises:
        ConfigError: unknown form, a place that is taken, or an optional package that is missing.
        CheckpointError: it cannot be written, or computes something else than the backbone.
    """
    form = form_of(to)
    if dynamic_size and not form.is_program:
        raise ConfigError(f"--dynamic-size is for --to onnx and torch-export, not for {to}")
    if repository is not None and to != "hub":
        raise ConfigError(f"--repo is for --to hub, not for {to}")
    check_free(path, is_folder=form.is_folder, suffix=form.suffix, overwrite=overwrite)
    with writing(path, is_folder=form.is_folder) as aside:
        if form.is_program:
            work = feature_program(release, pool, dynamic_size=dynamic_size)
            return write_onnx(work, aside) if to == "onnx" else write_program(work, aside)
        if to == "safetensors":
            write_safetensors(release, aside)
        elif to == "timm":
            write_timm(release, aside)
        else:
            write_hub(release, aside, repository)
    return _notes(release)


def _notes(release: PublishedBackbone) -> list[str]:
    model, crop = release.config.model, release.config.evaluation.crop
    if model.rotary or crop == model.image_size:
        return []
    return [
        f"positions are for images of {model.image_size} pixels, and `smkd eval` measures at {crop}: with --image-size "
        f"{crop} another library sees what it sees"
    ]


def export(
    where: str | Path, to: str, out: str | Path | None = None, *, network: Literal["teacher", "student"] = "teacher",
    image_size: int | None = None, dynamic_size: bool = False, repository: str | None = None,
    license: str | None = None, recipe: str = FOREIGN_RECIPE, overwrite: bool = False,
    heads: int | None = None, reject: float | None = None,
) -> Exported:  # fmt: skip
    """Write a backbone or a classifier for other libraries and programs (docs/export.md, docs/deploy.md).

    Args:
        where: run folder, checkpoint, weights of another project (docs/weights.md), or a file of `smkd fit`.
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
        reject: programs of classifiers: the answer is 'none of these' where the chance of any of the classes is lower.

    Raises:
        SmkdError: wrong settings, a place that is taken, or a program that computes something else than PyTorch.
    """
    form = form_of(to)
    classifier = classifier_file(where)
    if classifier is not None:
        options = {
            "--network": network != "teacher", "--image-size": image_size, "--dynamic-size": dynamic_size,
            "--recipe": recipe != FOREIGN_RECIPE, "--heads": heads,
        }  # fmt: skip
        return export_classifier(
            classifier, to, out, repository=repository, license=license, reject=reject, overwrite=overwrite,
            backbone_options=options,
        )  # fmt: skip
    if reject is not None:
        raise ConfigError("--reject is for classifiers, which are files of `smkd fit`")
    state, file = open_checkpoint(where, resolve(recipe), heads)
    release = _release(state, file, str(where), network, license)
    release = release if image_size is None else release.at(image_size)
    path = expanded(f"{release.about.name}{form.suffix}" if out is None else out)
    if path.exists() and file.exists() and os.path.samefile(path, file):
        raise ConfigError(f"-o '{path}' is the file that the backbone comes from; choose another")
    make_features = partial(pool, config=release.config.features)
    report = write_form(
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
    return HubBackbone.opened(locate_weights(source), str(where), heads)


def _release(
    state: dict[str, Any], file: Path, where: str, network: Literal["teacher", "student"], license: str | None
) -> PublishedBackbone:
    backbone, config = backbone_of(state, where, network)
    run = run_of(file)
    if EXPORTED in state:
        about = backbone_info(state[EXPORTED], where)
    else:
        scores: tuple[Score, ...] = ()
        if run is not None and network == "teacher":
            needed(state, ("step",), where)
            scores = found_scores(run, config, digest=sha256(file), step=int(state["step"]))
        name = _name(where) if run is None else run.resolve().name
        about = BackboneInfo(name=name, network=network, config=config, scores=scores, source=_source(state))
    changes = {"config": without_paths(config)} | ({} if license is None else {"license": license})
    return PublishedBackbone(backbone, about.model_copy(update=changes))


def _name(where: str) -> str:
    path = Path(where.partition("#")[0])
    return (path.resolve() if path.exists() else path).stem or "backbone"


def _source(state: dict[str, Any]) -> str:
    """Whose weights a checkpoint holds, if another project's."""
    if MARK not in state:
        return ""
    file, _, layout = state[MARK][0].rpartition(": ")
    return f"{file.partition('#')[0] if is_remote(file) else Path(file).name} ({layout})"
