"""`torch.compile` for the backbones, and the way back when it does not work here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from smkd.models.pair import StudentTeacher


def compile_backbones(
    pair: StudentTeacher, wanted: bool | Literal["auto"], device: torch.device, say: Callable[[str], None]
) -> None:
    """Compile the forward passes of training; 'auto' does so on CUDA.

    Evaluation asks the backbone for its last blocks, at other sizes, and stays as it is.

    Args:
        pair: both backbones.
        wanted: the run's `compile`.
        device: of the networks.
        say: told in one line if the compiler fails at the first batch; the run then goes on without it.
    """
    if wanted is True or (wanted == "auto" and device.type == "cuda"):
        for backbone in (pair.student.backbone, pair.teacher.backbone):
            _compile(backbone, say)


def _compile(module: nn.Module, say: Callable[[str], None]) -> None:
    plain = module.forward
    # the two sizes of views are two programs; one for any size would be slower
    compiled = torch.compile(plain, dynamic=False)

    def forward(*inputs: Any, **options: Any) -> Any:
        try:
            return compiled(*inputs, **options)
        except TorchDynamoException as error:
            module.forward = plain
            cause = getattr(error, "inner_exception", error)
            reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
            say(f"torch.compile does not work here, going on without it: {reason}")
            return plain(*inputs, **options)

    module.forward = forward
