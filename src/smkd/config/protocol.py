"""How features are made and few-shot accuracy is measured: sections of a run's settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from smkd.config.schema import MOST_BLOCKS, Count, Place, Positive, Section


class FeaturesConfig(Section):
    """Which tokens become the feature of an image."""

    blocks: Annotated[tuple[int, ...], Field(min_length=1, max_length=MOST_BLOCKS)] = (-1,)
    """Blocks that contribute, counted from 1, or from the end: -1 is the last. A number by itself, which files of
    before have, is how many last blocks; typed as `features.blocks=11` it is that block."""
    parts: tuple[Literal["cls", "mean", "weighted_mean"], ...] = ("cls", "weighted_mean")
    """[CLS], plain mean of the patches, mean weighted by the [CLS] attention; each L2-normalised."""

    @field_validator("blocks", mode="before")
    @classmethod
    def _counted(cls, given: Any) -> Any:
        if not isinstance(given, int) or isinstance(given, bool):
            return given
        if not 1 <= given <= MOST_BLOCKS:
            raise ValueError(f"so many last blocks should be 1 to {MOST_BLOCKS}")
        return tuple(range(-given, 0))

    @field_validator("blocks")
    @classmethod
    def _named(cls, blocks: tuple[int, ...]) -> tuple[int, ...]:
        if 0 in blocks:
            raise ValueError("blocks are counted from 1, or from the end: -1 is the last")
        return blocks


class ProtocolConfig(Section):
    """How few-shot accuracy is measured."""

    split: Literal["train", "val", "test"] = "test"
    """Which classes are measured."""
    way: Annotated[int, Field(ge=2)] = 5
    """Classes of an episode."""
    shots: tuple[Positive, ...] = (1, 5)
    """Support images of each class; each number is measured."""
    query: Positive | Literal["all"] = "all"
    """Queries per class: a number, or every image that is not in the support set."""
    episodes: Positive = 10_000
    """Episodes of each number of shots."""
    seed: Count = 0
    """Seed of the episodes, and of heads that draw."""
    query_dirichlet: Annotated[float, Field(gt=0)] | None = None
    """Unbalanced queries: each episode's way * query queries fall on its ways by a Dirichlet of this concentration."""
    head: str = "prototype"
    """Few-shot classifier, with options as in 'knn:neighbours=3'; `smkd eval --help` lists them."""
    resize: Positive = 360
    """Shorter side before the centre crop."""
    crop: Positive = 320
    """Side of the centre crop in pixels, whole patches."""

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
    pictures: bool = True
    """Also show crops, attention and matched patches in TensorBoard and on Weights & Biases."""
    split: Literal["val"] = "val"
    episodes: Positive = 1_000
    resize: Positive = 256
    crop: Positive = 224
