"""A backbone as a program that runs without this package: pixels in, features and tokens out.

Normalisation and pooling are part of the program, so its features are the rows that `smkd features` writes. An ONNX
file is checked against PyTorch by onnxruntime before it is kept.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smkd import __version__
from smkd.data.color import normalize
from smkd.data.datasets import configured_spec
from smkd.errors import CheckpointError, ConfigError
from smkd.models.vit import Tokens, VisionTransformer, block_numbers
from smkd.publishing.backbone import PublishedBackbone
from smkd.publishing.place import NOTE, PRODUCER

Pool = Callable[[list[Tokens]], Tensor]
"""Features [images, dim] from the tokens of the configured blocks."""
INPUT, OUTPUTS = "images", ("features", "cls", "patch_tokens")
BATCHES = (1, 3, 8)
"""Numbers of images with which a program is checked."""
TORCH_CUBIC = -0.75
"""Parameter of the bicubic kernel that `torch.nn.functional.interpolate` has."""
EXACT = 1e-6


class FeatureGraph(nn.Module):
    """From pixels to features.

    Args:
        release: the backbone, and how images are normalised.
        pool: what makes features of the tokens of `config.features.blocks`.
        any_size: interpolate positions in the program, for sizes that are not known yet.
    """

    def __init__(self, release: PublishedBackbone, pool: Pool, *, any_size: bool = False) -> None:
        super().__init__()
        spec = configured_spec(release.config.data)
        self.mean, self.std = spec.mean, spec.std
        self.blocks, self.pool = feature_blocks(release), pool
        self.backbone = any_size_backbone(release) if any_size else release.backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features and the last block's tokens after the final norm.

        Args:
            images: uint8 [images, 3, height, width], RGB.

        Returns:
            [images, dim], [images, embed_dim] and [images, patches, embed_dim], float32.
        """
        last = len(self.backbone.blocks)
        asked = [*self.blocks, *[last] * (last not in self.blocks)]
        found = self.backbone.last_blocks(normalize(images.float() / 255, self.mean, self.std), asked)
        end = found[asked.index(last)]
        return self.pool(found[: len(self.blocks)]), end.cls, end.patches


def feature_blocks(release: PublishedBackbone) -> list[int]:
    """Blocks of the features, counted from 1."""
    return block_numbers(release.config.features.blocks, len(release.backbone.blocks))


class AnySizeVisionTransformer(VisionTransformer):
    """The backbone with its positions as matrix products, in which height and width may stay symbols."""

    def positions(self, height: int, width: int) -> Tensor:
        """See `VisionTransformer.positions`; equal up to rounding."""
        rows, columns = height // self.patch_size, width // self.patch_size
        is_native = (_number(height) == _number(width)) & (_number(rows * columns) == self.grid**2)
        stored = self.pos_embed[0, 1:].unflatten(0, (self.grid, self.grid))
        by_row, by_column = (resampling(count, self.grid, is_native) for count in (rows, columns))
        grid = torch.einsum("ri,cj,ijd->rcd", by_row, by_column, stored)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(0, 1)[None]], dim=1)


def resampling(count: int, side: int, is_native: Tensor) -> Tensor:
    """Weights that make `count` positions of `side` stored ones, [count, side]: bicubic, the nearest repeated outside.

    The scale is (count + 0.1) / side, or 1 where `is_native`, which leaves the stored ones as they are.
    """
    scale = torch.where(is_native, 1.0, side / (_number(count) + 0.1))
    place = (torch.arange(count) + 0.5) * scale - 0.5
    below = place.floor()
    weights = torch.zeros(count, side)
    for offset in (-1, 0, 1, 2):
        source = (below + offset).clamp(0, side - 1)
        weights = weights + _cubic((place - below - offset).abs())[:, None] * (source[:, None] == torch.arange(side))
    return weights


def _cubic(distance: Tensor) -> Tensor:
    near = ((TORCH_CUBIC + 2) * distance - (TORCH_CUBIC + 3)) * distance**2 + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * TORCH_CUBIC
    return torch.where(distance <= 1, near, far)


def _number(value: int) -> Tensor:
    return torch.scalar_tensor(value, dtype=torch.float32)


def any_size_backbone(release: PublishedBackbone) -> VisionTransformer:
    """The backbone with positions for any size."""
    return AnySizeVisionTransformer.with_weights(release.config.model, release.backbone.state_dict())


def traced(release: PublishedBackbone, pool: Pool, *, dynamic_size: bool) -> torch.export.ExportedProgram:
    """The program, for any number of images of the evaluation's size, or of any size of whole patches."""
    patch, crop = release.config.model.patch_size, release.config.evaluation.crop
    graph = FeatureGraph(release, pool, any_size=dynamic_size and not release.config.model.rotary)
    shape: dict[int, Any] = {0: torch.export.Dim("batch")}
    height = width = crop
    if dynamic_size:
        # neither square nor native, so that neither is taken for granted
        height, width = crop + patch, crop + 2 * patch
        shape |= {2: patch * torch.export.Dim("rows"), 3: patch * torch.export.Dim("columns")}
    example = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    with torch.no_grad():
        return torch.export.export(graph.eval(), (example,), dynamic_shapes={INPUT: shape})


def largest_difference(
    program: Callable[[Tensor], Sequence[Tensor]], release: PublishedBackbone, pool: Pool, *, dynamic_size: bool
) -> float:
    """Between a program's outputs and the backbone's, over batches of 1, 3 and 8, and two sizes if these are dynamic.

    Relative to an output's largest value where that is above 1.
    """
    graph, largest = FeatureGraph(release, pool).eval(), 0.0
    with torch.no_grad():
        for images in _samples(release, dynamic_size):
            for mine, theirs in zip(graph(images), program(images), strict=True):
                # not `max`, which would let NaN pass
                gap = float((mine - theirs).abs().max() / mine.abs().max().clamp(min=1))
                largest = gap if not gap <= largest else largest
    return largest


def _samples(release: PublishedBackbone, dynamic_size: bool) -> Iterator[Tensor]:
    patch, crop = release.config.model.patch_size, release.config.evaluation.crop
    native = release.config.model.image_size
    sizes = [(crop, crop)] + [(native, native), (crop + 3 * patch, crop + patch)] * dynamic_size
    noise = torch.Generator().manual_seed(0)
    for (height, width), count in itertools.product(dict.fromkeys(sizes), BATCHES):
        yield torch.randint(256, (count, 3, height, width), generator=noise, dtype=torch.uint8)


def checked_line(form: str, difference: float, tolerance: float, *, dynamic_size: bool, by: str) -> str:
    """What was checked, in a line; raises `CheckpointError` if it is off."""
    where = f"batches of {', '.join(map(str, BATCHES))}" + (" and several sizes" if dynamic_size else "")
    if not difference <= tolerance:
        raise CheckpointError(
            f"--to {form}: {by} differs from PyTorch by {difference:.1e} (at most {tolerance:.0e} is right) over "
            f"{where}; nothing was written"
        )
    return f"checked: {by} and PyTorch differ by at most {difference:.1e} over {where}"


def about(release: PublishedBackbone, *, dynamic_size: bool) -> dict[str, Any]:
    """What a caller of the program has to know, as plain values."""
    protocol, spec = release.config.evaluation, configured_spec(release.config.data)
    sides = ["height", "width"] if dynamic_size else [protocol.crop, protocol.crop]
    return {
        "input": f"{INPUT}: uint8 RGB [batch, 3, {sides[0]}, {sides[1]}]; normalised inside",
        "outputs": f"{', '.join(OUTPUTS)}: float32",
        "resize": protocol.resize, "crop": protocol.crop, "interpolation": "bicubic",
        "patch_size": release.config.model.patch_size, "mean": list(spec.mean), "std": list(spec.std),
        "features": list(release.config.features.parts), "feature_blocks": feature_blocks(release),
        **release.about.model_dump(mode="json"),
    }  # fmt: skip


def write_program(release: PublishedBackbone, pool: Pool, path: Path, *, dynamic_size: bool) -> list[str]:
    """Write a program of `torch.export`, read it back and compare.

    Returns:
        A line about the comparison.

    Raises:
        CheckpointError: the program that was read back computes something else.
    """
    program = traced(release, pool, dynamic_size=dynamic_size)
    extra = {NOTE: json.dumps(about(release, dynamic_size=dynamic_size))}
    # not to the path itself: there a full disk is an internal error
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=extra)
    path.write_bytes(buffer.getbuffer())
    with path.open("rb") as file:
        again = torch.export.load(file).module()
    difference = largest_difference(again, release, pool, dynamic_size=dynamic_size)
    return [checked_line("torch-export", difference, EXACT, dynamic_size=dynamic_size, by="the reloaded program")]


ONNX_TOLERANCE = 1e-4
LIMIT = 2**31
"""Bytes that one ONNX file can hold."""


def write_onnx(release: PublishedBackbone, pool: Pool, path: Path, *, dynamic_size: bool) -> list[str]:
    """Write the file and compare it.

    Returns:
        A line about the comparison.

    Raises:
        CheckpointError: onnxruntime computes something else.
        ConfigError: the optional packages are missing, or the backbone is too large for one file.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # what torch.onnx works with
    except ImportError as error:
        raise ConfigError(f"--to onnx needs the extra: pip install 'smkd[onnx]' ({error})") from error
    size = sum(value.numel() * value.element_size() for value in release.backbone.state_dict().values())
    if size >= LIMIT:
        raise ConfigError(f"--to onnx: {size / 1e9:.1f} GB of weights, one ONNX file holds 2; use --to torch-export")
    program = traced(release, pool, dynamic_size=dynamic_size)
    axes = {0: "batch"} | ({2: "height", 3: "width"} if dynamic_size else {})
    with _quiet():
        made = torch.onnx.export(
            program, input_names=[INPUT], output_names=list(OUTPUTS), dynamic_shapes={INPUT: axes}, dynamo=True,
            verbose=False,
        )  # fmt: skip
    assert made is not None
    made.model.producer_name, made.model.producer_version = PRODUCER, __version__
    made.model.metadata_props.update({
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in about(release, dynamic_size=dynamic_size).items()
    })  # fmt: skip
    made.save(str(path), external_data=False)

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {INPUT: images.numpy()})]

    difference = largest_difference(run, release, pool, dynamic_size=dynamic_size)
    return [checked_line("onnx", difference, ONNX_TOLERANCE, dynamic_size=dynamic_size, by="onnxruntime")]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on packages that this graph does not use."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
