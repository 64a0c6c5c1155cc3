"""The golden numbers: which files there are, their arrays as tensors, their settings (golden/README.md).

`SMKD_GOLDEN=<folder>` points the tests at another folder with files of the same kinds.
"""

from __future__ import annotations

import ast
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from smkd.models.vit import VisionTransformer

FOLDER = Path(os.environ.get("SMKD_GOLDEN") or Path(__file__).parent / "golden")

State = dict[str, Tensor]


class Golden:
    """One file."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as arrays:
            self.arrays: dict[str, NDArray[Any]] = dict(arrays)
        self.options: dict[str, Any] = json.loads(str(self.arrays.pop("options")))

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def number(self, name: str) -> float:
        return float(self.arrays[name])

    def words(self, name: str) -> list[str]:
        """Names listed in an array; a lone empty string means none."""
        return [str(word) for word in self.arrays[name] if word]

    def under(self, prefix: str) -> State:
        """Numeric arrays below `prefix/`, by the rest of their names."""
        start = f"{prefix}/"
        found = (name for name in self.arrays if name.startswith(start))
        return {name.removeprefix(start): self.tensor(name) for name in found}

    def matching(self, pattern: str) -> list[str]:
        """What the first group of `pattern` finds in the names of the arrays, each once, in the file's order."""
        found = (re.fullmatch(pattern, name) for name in self.arrays)
        return list(dict.fromkeys(match[1] for match in found if match))

    def lines(self) -> dict[str, dict[str, Any]]:
        """Option lines of the form `case: key=value, word {...}, ...`, read into settings by case."""
        return {case: settings(text) for case, sign, text in (x.partition(": ") for x in self.options["lines"]) if sign}


def settings(text: str) -> dict[str, Any]:
    """Values written `key=value` or `key {...}`; what is no Python value stays text. The text itself is `text`."""
    found = {name: ast.literal_eval(value) for name, value in re.findall(r"(\w+) (\{.*?\})", text)}
    rest = re.sub(r"\{.*?\}", "", text)
    for name, value in re.findall(r"(\w+)=(\[[^\]]*\]|[^,]+)", rest):
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return {**found, "text": text}


@cache
def load(path: Path) -> Golden:
    return Golden(path)


def cases(pattern: str) -> list[Any]:
    """Files of a kind, as parameters of a test; none if the folder has none."""
    return [pytest.param(path, id=path.stem) for path in sorted(FOLDER.glob(pattern))]


def cases_within(pattern: str, names: str) -> list[Any]:
    """(file, case) pairs: a case for every name that the first group of `names` finds in a file's arrays."""
    return [
        pytest.param(path, case, id=f"{path.stem}-{case}")
        for path in sorted(FOLDER.glob(pattern))
        for case in load(path).matching(names)
    ]


def own_name(name: str) -> str:
    """Our name for a parameter of the reference."""
    name = name.replace("masked_embed", "mask_token")
    # a one-layer MLP is a bare linear layer there
    return re.sub(r"\bmlp\.(weight|bias)$", r"mlp.0.\1", name)


def own_names(names: list[str], *, shared_head: bool = False) -> set[str]:
    """Our names; a shared head's second layer is only another name for its first, which we do not have."""
    return {own_name(name) for name in names if not (shared_head and "last_layer2" in name)}


def own_state(state: State, *, shared_head: bool = False) -> State:
    """A reference's state dict under our names and shapes."""
    kept = own_names(list(state), shared_head=shared_head)
    renamed = {own_name(name): value for name, value in state.items()}
    return {
        name: value.unsqueeze(0) if name.endswith("mask_token") else value
        for name, value in renamed.items()
        if name in kept
    }


def backbone_from(options: dict[str, Any], *, mask_token: bool) -> VisionTransformer:
    size = options["img_size"]
    return VisionTransformer(
        image_size=size[0] if isinstance(size, list) else size, patch_size=options["patch_size"],
        embed_dim=options["embed_dim"], depth=options["depth"], num_heads=options["num_heads"],
        mask_token=mask_token,
    )  # fmt: skip


@cache
def backbone(path: Path) -> VisionTransformer:
    """The backbone whose parameters a file holds under `state`."""
    golden = load(path)
    state = own_state(golden.under("state"))
    model = backbone_from(golden.options, mask_token="mask_token" in state)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def close(actual: Tensor, expected: Tensor, *, atol: float, rtol: float = 0.0, what: str = "") -> None:
    """Assert same shape and values within the tolerance that golden/README.md states for them."""
    torch.testing.assert_close(
        actual.detach(), expected.to(actual.dtype), atol=atol, rtol=rtol, msg=lambda text: f"{what} {text}"
    )
