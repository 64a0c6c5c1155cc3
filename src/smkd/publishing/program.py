"""Programs that run without this package: uint8 pixels in, numbers out, for PyTorch and for ONNX.

Each is read back and compared with what it was made of before it is kept.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smkd import __version__
from smkd.errors import CheckpointError, ConfigError
from smkd.publishing.place import NOTE, PRODUCER

INPUT = "images"
BATCHES = (1, 3, 8)
"""Numbers of images with which a program is checked."""
EXACT, ONNX_TOLERANCE = 1e-6, 1e-4
LIMIT = 2**31
"""Bytes that one ONNX file can hold."""


@dataclass(frozen=True)
class Computation:
    """What is to become a program.

    Attributes:
        graph: from uint8 RGB images [images, 3, height, width] to the outputs, on the CPU.
        traceable: the same, in a form in which height and width may stay symbols.
        outputs: what they are called.
        about: what a caller has to know, as plain values.
        sizes: height and width of the images with which a program is checked; those of the first are what it is for.
        step: height and width may be any multiple of it; None where they are fixed.
    """

    graph: nn.Module
    traceable: nn.Module
    outputs: tuple[str, ...]
    about: dict[str, Any]
    sizes: tuple[tuple[int, int], ...]
    step: int | None = None

    @property
    def bytes(self) -> int:
        """Of all weights."""
        kept = itertools.chain(self.graph.parameters(), self.graph.buffers())
        return sum(value.numel() * value.element_size() for value in kept)


def traced(work: Computation) -> torch.export.ExportedProgram:
    """The program, for any number of images."""
    shape: dict[int, Any] = {0: torch.export.Dim("batch")}
    height, width = work.sizes[0]
    if work.step is not None:
        # neither square nor native, so that neither is taken for granted
        height, width = height + work.step, width + 2 * work.step
        shape |= {2: work.step * torch.export.Dim("rows"), 3: work.step * torch.export.Dim("columns")}
    example = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    with torch.no_grad():
        return torch.export.export(work.traceable.eval(), (example,), dynamic_shapes={INPUT: shape})


def largest_difference(program: Callable[[Tensor], Sequence[Tensor]], work: Computation) -> float:
    """Between the outputs of a program and of what it was made of, over batches of 1, 3 and 8 of each size.

    Relative to an output's largest value where that is above 1. Whole numbers are not compared: they follow from the
    others, and where two of these are equal up to rounding either is right.
    """
    graph, largest = work.graph.eval(), 0.0
    with torch.no_grad():
        for images in _samples(work.sizes):
            for mine, theirs in zip(graph(images), program(images), strict=True):
                if not mine.is_floating_point():
                    continue
                # not `max`, which would let NaN pass
                gap = float((mine - theirs).abs().max() / mine.abs().max().clamp(min=1))
                largest = gap if not gap <= largest else largest
    return largest


def _samples(sizes: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
    noise = torch.Generator().manual_seed(0)
    for (height, width), count in itertools.product(sizes, BATCHES):
        yield torch.randint(256, (count, 3, height, width), generator=noise, dtype=torch.uint8)


def checked_line(form: str, difference: float, tolerance: float, *, several_sizes: bool, by: str) -> str:
    """What was checked, in a line; raises `CheckpointError` if it is off."""
    where = f"batches of {', '.join(map(str, BATCHES))}" + (" and several sizes" if several_sizes else "")
    if not difference <= tolerance:
        raise CheckpointError(
            f"--to {form}: {by} differs from PyTorch by {difference:.1e} (at most {tolerance:.0e} is right) over "
            f"{where}; nothing was written"
        )
    return f"checked: {by} and PyTorch differ by at most {difference:.1e} over {where}"


def write_program(work: Computation, path: Path) -> list[str]:
    """Write a program of `torch.export`, read it back and compare.

    Returns:
        A line about the comparison.

    Raises:
        CheckpointError: the program that was read back computes something else.
    """
    # not to the path itself: there a full disk is an internal error
    buffer = io.BytesIO()
    torch.export.save(traced(work), buffer, extra_files={NOTE: json.dumps(work.about)})
    path.write_bytes(buffer.getbuffer())
    with path.open("rb") as file:
        again = torch.export.load(file).module()
    difference = largest_difference(again, work)
    several = work.step is not None
    return [checked_line("torch-export", difference, EXACT, several_sizes=several, by="the reloaded program")]


def check_onnx() -> None:
    """Raise `ConfigError` if the optional packages that an ONNX file is written and checked with are missing."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  # what torch.onnx works with
    except ImportError as error:
        raise ConfigError(f"--to onnx needs the extra: pip install 'smkd[onnx]' ({error})") from error


def write_onnx(work: Computation, path: Path) -> list[str]:
    """Write the file and compare it.

    Returns:
        A line about the comparison.

    Raises:
        CheckpointError: onnxruntime computes something else.
        ConfigError: the optional packages are missing, or the weights are too large for one file.
    """
    check_onnx()
    import onnxruntime

    if work.bytes >= LIMIT:
        raise ConfigError(
            f"--to onnx: {work.bytes / 1e9:.1f} GB of weights, one ONNX file holds 2; use --to torch-export"
        )
    axes = {0: "batch"} | ({} if work.step is None else {2: "height", 3: "width"})
    with _quiet():
        made = torch.onnx.export(
            traced(work), input_names=[INPUT], output_names=list(work.outputs), dynamic_shapes={INPUT: axes},
            dynamo=True, verbose=False,
        )  # fmt: skip
    assert made is not None
    made.model.producer_name, made.model.producer_version = PRODUCER, __version__
    made.model.metadata_props.update({
        name: value if isinstance(value, str) else json.dumps(value) for name, value in work.about.items()
    })  # fmt: skip
    made.save(str(path), external_data=False)

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {INPUT: images.numpy()})]

    difference = largest_difference(run, work)
    return [checked_line("onnx", difference, ONNX_TOLERANCE, several_sizes=work.step is not None, by="onnxruntime")]


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
