"""smkd: few-shot image classification with Vision Transformers.

config = smkd.resolve("folder-pretrain", ["data=photos"])
run = smkd.pretrain(config)
backbone = smkd.load(run)
"""

from __future__ import annotations

import gc
from importlib import import_module
from typing import TYPE_CHECKING, Any

from smkd.machine import settle_threads

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

settle_threads()

if TYPE_CHECKING:
    from smkd.adaptation import adapt
    from smkd.api import distill, evaluate, pretrain
    from smkd.classify import FewShotClassifier
    from smkd.config.loading import resolve
    from smkd.config.run_config import RunConfig
    from smkd.data.datasets import register_dataset
    from smkd.engine.restore import load
    from smkd.extensions import register_matching, register_term
    from smkd.fewshot.accuracy import Result
    from smkd.fewshot.heads import register_head
    from smkd.publishing.write import export, from_pretrained


_PLACES = {
    "FewShotClassifier": "smkd.classify",
    "Result": "smkd.fewshot.accuracy",
    "RunConfig": "smkd.config.run_config",
    "adapt": "smkd.adaptation",
    "distill": "smkd.api",
    "evaluate": "smkd.api",
    "export": "smkd.publishing.write",
    "from_pretrained": "smkd.publishing.write",
    "load": "smkd.engine.restore",
    "pretrain": "smkd.api",
    "register_dataset": "smkd.data.datasets",
    "register_head": "smkd.fewshot.heads",
    "register_matching": "smkd.extensions",
    "register_term": "smkd.extensions",
    "resolve": "smkd.config.loading",
}


def __getattr__(name: str) -> Any:
    # torch is imported when something of it is asked for, so that `smkd --help` answers at once
    if name not in _PLACES:
        raise AttributeError(f"module 'smkd' has no attribute '{name}'")
    collects = gc.isenabled()
    # a collection in between looks through all that PyTorch has made, which takes a third of the time
    gc.disable()
    try:
        return getattr(import_module(_PLACES[name]), name)
    finally:
        if collects:
            gc.enable()
