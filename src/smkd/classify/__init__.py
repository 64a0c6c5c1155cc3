"""From a few labelled images to a classifier, and to their nearest neighbours.

`FewShotClassifier` is a scikit-learn estimator; `ImageIndex` finds similar images.
"""

from __future__ import annotations

from smkd.classify.encoder import Encoder, EncoderConfig, open_encoder
from smkd.classify.estimator import FewShotClassifier
from smkd.classify.search import ImageIndex

__all__ = ["Encoder", "EncoderConfig", "FewShotClassifier", "ImageIndex", "open_encoder"]
