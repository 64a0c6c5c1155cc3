"""The forms that a backbone is published in, and writing one of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from smkd.errors import ConfigError
from smkd.files import nearest
from smkd.interop.export_graph import Pool, write_program
from smkd.interop.export_hub import write_hub
from smkd.interop.export_onnx import write_onnx
from smkd.interop.export_place import check_free, writing
from smkd.interop.export_timm import write_timm
from smkd.interop.release import Release, write_safetensors


class Form(NamedTuple):
    """One of the forms.

    Attributes:
        suffix: of its name, where none is given.
        is_folder: whether it is a folder.
        is_program: whether it computes features, for images of a certain size.
    """

    suffix: str
    is_folder: bool = False
    is_program: bool = False


FORMS = {
    "timm": Form("-timm", is_folder=True),
    "safetensors": Form(".safetensors"),
    "onnx": Form(".onnx", is_program=True),
    "torch-export": Form(".pt2", is_program=True),
    "hub": Form("-hub", is_folder=True),
}


def form_of(name: str) -> Form:
    """The form of that name; raises `ConfigError` with the nearest name if there is none."""
    if name not in FORMS:
        raise ConfigError(f"--to {name}: unknown form{nearest(name, FORMS)} (known: {', '.join(FORMS)})")
    return FORMS[name]


def write(
    release: Release, to: str, path: Path, pool: Pool, *, dynamic_size: bool = False, repository: str | None = None,
    overwrite: bool = False,
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
        if to == "onnx":
            return write_onnx(release, pool, aside, dynamic_size=dynamic_size)
        if to == "torch-export":
            return write_program(release, pool, aside, dynamic_size=dynamic_size)
        if to == "safetensors":
            write_safetensors(release, aside)
        elif to == "timm":
            write_timm(release, aside)
        else:
            write_hub(release, aside, repository)
    return _notes(release)


def _notes(release: Release) -> list[str]:
    model, crop = release.config.model, release.config.evaluation.crop
    if model.rotary or crop == model.image_size:
        return []
    return [
        f"positions are for images of {model.image_size} pixels, and `smkd eval` measures at {crop}: with --image-size "
        f"{crop} another library sees what it sees"
    ]
