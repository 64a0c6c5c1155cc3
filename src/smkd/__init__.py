"""smkd: few-shot image classification with Vision Transformers.

config = smkd.resolve("folder-pretrain", ["data=photos"])
run = smkd.pretrain(config)
backbone = smkd.load(run)
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "FewShotClassifier",
    "Result",
    "RunConfig",
    "__version__",
    "adapt",
    "distill",
    "evaluate",
    "export",
    "from_pretrained",
    "load",
    "pretrain",
    "register_dataset",
    "register_head",
    "register_matching",
    "register_term",
    "resolve",
]

SPINS = "2000"
"""Looks that a waiting thread of OpenMP takes before it sleeps. GNU's default of some 100,000 halves the speed of a
small network beside one other busy process, and more beside several (docs/performance.md)."""
# read when PyTorch is loaded
if "torch" not in sys.modules and not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = SPINS

if TYPE_CHECKING:
    from smkd.adaptation import adapt
    from smkd.api import distill, evaluate, load, pretrain
    from smkd.classify import FewShotClassifier
    from smkd.config.loading import resolve
    from smkd.config.run_config import RunConfig
    from smkd.data.datasets import register_dataset
    from smkd.extensions import register_matching, register_term
    from smkd.fewshot.accuracy import Result
    from smkd.fewshot.heads import register_head
    from smkd.publishing.write import export, from_pretrained


def __getattr__(name: str) -> Any:
    # torch is imported when something of it is asked for, so that `smkd --help` answers at once
    if name == "FewShotClassifier":
        from smkd.classify import FewShotClassifier

        return FewShotClassifier
    if name == "adapt":
        from smkd.adaptation import adapt

        return adapt
    if name in ("export", "from_pretrained"):
        from smkd.publishing import write

        return getattr(write, name)
    if name in ("register_matching", "register_term"):
        from smkd import extensions

        return getattr(extensions, name)
    if name == "register_head":
        from smkd.fewshot.heads import register_head

        return register_head
    if name == "register_dataset":
        from smkd.data.datasets import register_dataset

        return register_dataset
    if name in __all__:
        from smkd import api

        return getattr(api, name)
    raise AttributeError(f"module 'smkd' has no attribute '{name}'")
