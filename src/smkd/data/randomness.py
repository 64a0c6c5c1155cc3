"""Randomness of a sample as a pure function of (seed, epoch, index, stream); a stream is a view of an occurrence.

A counter-based generator keyed by those numbers: what a sample looks like depends neither on the number of
workers or devices nor on where a run was interrupted.
"""

from __future__ import annotations

import numpy as np

ORDER = 1 << 20
"""Stream of the order of samples in an epoch."""
OCCURRENCE = 1 << 32
"""Streams 0, 1, 2, ... are the views of a sample; where it comes again in the epoch they begin so much further on."""


def generator(seed: int, epoch: int, index: int, stream: int) -> np.random.Generator:
    """Generator of one stream of one sample; all arguments non-negative."""
    # the lowest counter word advances with each draw, the other three say whose draws these are
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, stream, index, epoch]))


class Streams:
    """The generators of one seed, one at a time: setting the state of one takes a fifth of the time of making another.

    Args:
        seed: non-negative.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=seed)
        self._generator = np.random.Generator(self._bits)
        self._state = self._bits.state  # nothing is drawn yet, so no number is left over in it

    def at(self, epoch: int, index: int, stream: int) -> np.random.Generator:
        """What `generator` gives; valid until the next call."""
        self._state["state"]["counter"][:] = 0, stream, index, epoch
        self._bits.state = self._state
        return self._generator
