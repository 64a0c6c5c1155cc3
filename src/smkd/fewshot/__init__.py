"""Few-shot evaluation: features, episodes, heads, accuracy with its interval.

`smkd.fewshot.evaluate(features, labels)` measures any features; `smkd.fewshot.heads` says what a head is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Result", "compare_results", "evaluate", "head_names"]

if TYPE_CHECKING:
    from smkd.fewshot.accuracy import Result
    from smkd.fewshot.compare import compare_results
    from smkd.fewshot.heads import head_names
    from smkd.fewshot.library import evaluate

HOMES = {"Result": "accuracy", "compare_results": "compare", "evaluate": "library", "head_names": "heads"}


def __getattr__(name: str) -> Any:
    # imported when asked for: the modules of this package import one another
    if name in HOMES:
        from importlib import import_module

        return getattr(import_module(f"smkd.fewshot.{HOMES[name]}"), name)
    raise AttributeError(f"module 'smkd.fewshot' has no attribute '{name}'")
