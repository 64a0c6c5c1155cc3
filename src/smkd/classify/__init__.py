"""From a few labelled images to a classifier, and to their nearest neighbours.

`FewShotClassifier` is a scikit-learn estimator; `ImageIndex` finds similar images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from smkd.classify.encoder import Encoder, EncoderConfig, open_encoder
from smkd.classify.search import ImageIndex

if TYPE_CHECKING:
    from smkd.classify.estimator import FewShotClassifier

__all__ = ["Encoder", "EncoderConfig", "FewShotClassifier", "ImageIndex", "open_encoder"]


def __getattr__(name: str) -> Any:
    if name != "FewShotClassifier":
        raise AttributeError(f"module 'smkd.classify' has no attribute '{name}'")
    from smkd.classify.estimator import FewShotClassifier  # with scikit-learn, which takes a second

    return FewShotClassifier
