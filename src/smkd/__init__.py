"""smkd: few-shot image classification with Vision Transformers.

config = smkd.resolve("folder-pretrain", ["data=photos"])
run = smkd.pretrain(config)
backbone = smkd.load(run)
"""

from __future__ import annotations

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
    "register_matching",
    "register_term",
    "resolve",
]

if TYPE_CHECKING:
    from smkd.adaptation import adapt
    from smkd.api import Result, RunConfig, distill, evaluate, load, pretrain, resolve
    from smkd.classify import FewShotClassifier
    from smkd.publishing import export, from_pretrained
    from smkd.registry import register_matching, register_term


def __getattr__(name: str) -> Any:
    # torch is imported when something of it is asked for, so that `smkd --help` answers at once
    if name == "FewShotClassifier":
        from smkd.classify import FewShotClassifier

        return FewShotClassifier
    if name == "adapt":
        from smkd.adaptation import adapt

        return adapt
    if name in ("export", "from_pretrained"):
        from smkd import publishing

        return getattr(publishing, name)
    if name in ("register_matching", "register_term"):
        from smkd import registry

        return getattr(registry, name)
    if name in __all__:
        from smkd import api

        return getattr(api, name)
    raise AttributeError(f"module 'smkd' has no attribute '{name}'")
