"""Few-shot evaluation: features, episodes, heads, accuracy with its interval.

`smkd.fewshot.evaluate(features, labels)` measures any features; `smkd.fewshot.head` says what a head is.
"""

from __future__ import annotations

from smkd.fewshot.accuracy import Result, compare_results, evaluate
from smkd.fewshot.head import Head, InductiveHead, Rule
from smkd.fewshot.heads import head_names

__all__ = ["Head", "InductiveHead", "Result", "Rule", "compare_results", "evaluate", "head_names"]
