"""Settings of features and of few-shot accuracy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from smkd.config.section import Count, Place, Positive, Section


class FeaturesConfig(Section):
    """Which tokens become the feature of an image."""

    blocks: Positive = 1
    """How many last blocks contribute."""
    parts: tuple[Literal["cls", "mean", "weighted_mean"], ...] = ("cls", "weighted_mean")
    """[CLS], plain mean of the patches, mean weighted by the [CLS] attention; each L2-normalised."""


class ProtocolConfig(Section):
    """How few-shot accuracy is measured."""

    split: Literal["train", "val", "test"] = "test"
    way: Annotated[int, Field(ge=2)] = 5
    shots: tuple[Positive, ...] = (1, 5)
    query: Positive | Literal["all"] = "all"
    """Queries per class: a number, or every image that is not in the support set."""
    episodes: Positive = 10_000
    seed: Count = 0
    query_dirichlet: Annotated[float, Field(gt=0)] | None = None
    """Unbalanced queries: each episode's way * query queries fall on its ways by a Dirichlet of this concentration."""
    head: str = "prototype"
    """Few-shot classifier, with options as in 'knn:neighbours=3'; `smkd eval --help` lists them."""
    resize: Positive = 360
    """Shorter side before the centre crop."""
    crop: Positive = 320

    @model_validator(mode="after")
    def _check(self) -> ProtocolConfig:
        if self.crop > self.resize:
            raise ValueError(f"crop {self.crop} is larger than resize {self.resize}")
        return self


class ValidationConfig(ProtocolConfig):
    """Few-shot accuracy on validation classes while training; the best checkpoint is kept by it."""

    data: Place | None = None
    """Labelled images to validate on, in any form of docs/own-images.md: their val split, or all of them where they
    have no splits of their own. None is the val split of the run's own data."""
    every: Count = 50
    """Epochs between validations; 0 turns them off."""
    patience: Count = 0
    """Stop after so many validations without a gain; 0 never stops. With it the weights that the run starts from are
    measured as well, and stay the best if nothing beats them."""
    split: Literal["val"] = "val"
    episodes: Positive = 1_000
    resize: Positive = 256
    crop: Positive = 224
