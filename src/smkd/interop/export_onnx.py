"""A backbone as an ONNX file, checked against PyTorch by onnxruntime before it is kept."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from smkd import __version__
from smkd.errors import ConfigError
from smkd.interop.export_graph import INPUT, OUTPUTS, Pool, about, checked_line, largest_difference, traced
from smkd.interop.export_place import PRODUCER
from smkd.interop.release import Release

TOLERANCE = 1e-4
LIMIT = 2**31
"""Bytes that one ONNX file can hold."""


def write_onnx(release: Release, pool: Pool, path: Path, *, dynamic_size: bool) -> list[str]:
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
    return [checked_line("onnx", difference, TOLERANCE, dynamic_size=dynamic_size, by="onnxruntime")]


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
