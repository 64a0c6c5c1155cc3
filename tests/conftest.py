from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from made_images import noisy_splits

# The networks of the tests are too small to gain from threads, which only wait for each other on a busy machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

CPU = torch.device("cpu")
MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Writes `noisy_splits` of so many classes and images to `photos`."""
    return partial(noisy_splits, tmp_path / "photos")


@pytest.fixture(params=["cpu", "cuda", "mps"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that is here."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[request.param]:
        pytest.skip(f"no {request.param} here")
    return torch.device(request.param)


class NoWaiting(TorchDispatchMode):
    """Copies to the device that the host would wait for are an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            waits = not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            assert source.device == result.device or not waits, "a copy that the host waits for"
        return result


@pytest.fixture
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> NoWaiting:
    """`NoWaiting` for the meta device, and no tensors made of numbers there, whose copies a mode does not see."""

    def on_the_host(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def checked(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = make(*args, **kwargs)
            assert made.device == CPU, "numbers copied to the device"
            return made

        return checked

    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
        monkeypatch.setattr(owner, name, on_the_host(getattr(owner, name)))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which meta does not know
    return NoWaiting()
