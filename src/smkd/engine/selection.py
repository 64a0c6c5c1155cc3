"""The best checkpoint so far, and when to stop looking for a better one."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Selection:
    """Accuracies of one validation after another.

    Attributes:
        patience: validations without a gain after which the run ends; 0 for never.
        best: highest accuracy so far; of equal ones the first counts.
        stale: validations since.
        step: optimiser steps at the best one.
    """

    patience: int = 0
    best: float = -math.inf
    stale: int = 0
    step: int = -1

    def take(self, accuracy: float | None, step: int) -> bool:
        """Note a validation, or that there was none; whether it is the best so far."""
        if accuracy is None:
            return False
        if accuracy > self.best:
            self.best, self.stale, self.step = accuracy, 0, step
            return True
        self.stale += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return 0 < self.patience <= self.stale
