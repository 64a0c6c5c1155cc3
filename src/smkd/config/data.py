"""Settings of the images and of what is made of them: data, batches, views, colours and masks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from smkd.config.section import Count, Fraction, Place, Positive, Range, Section, Weight


class SamplerConfig(Section):
    """Class-balanced batches: `classes` classes with `per_class` images each.

    The classes are shared evenly by devices and passes; a class with fewer images gives some of them again.
    """

    classes: Positive
    per_class: Positive


class DataConfig(Section):
    """Where the images are; `data=PATH` is short for `data.root=PATH`."""

    dataset: str = "folder"
    """Row of the data-set table (normalisation constants): see `smkd.data.datasets.DATASETS`."""
    root: Place | None = None
    """Images in any form of docs/own-images.md, such as a folder with train/, val/ and test/, or `hf:<name>`."""
    split_by: Literal["classes", "images"] = "classes"
    """How data without splits of their own are split: by class, or the images of every class."""
    split_seed: Count = 0
    """Seed of that split."""
    split_file: Place | None = None
    """CSV (class,split) that splits them instead of the seed."""
    label_column: str | None = None
    """Column of a table that holds the class, if it is not called label or class."""
    mean: tuple[Fraction, Fraction, Fraction] | None = None
    """Channel means for normalisation on the 0-1 scale, with `std`, instead of the table's (`smkd data stats`)."""
    std: tuple[Fraction, Fraction, Fraction] | None = None
    on_error: Literal["raise", "skip"] = "raise"
    """What an unreadable image does: stop the run, or be replaced by the next readable one and counted."""
    changed: Literal["refuse", "accept"] = "refuse"
    """What a run does that resumes with other training images than it began with: refuse, or go on with them."""
    limit_per_class: Positive | None = None
    """Train on at most this many images of each class (for quick trials)."""
    cache: Literal["none", "memory", "mmap"] = "none"
    """Decode the training images once: into this process's memory, or a file that all processes of a machine map."""
    cache_size: Positive | None = None
    """Shorter side in pixels at which images are cached, never enlarged; none keeps them as they are."""
    cache_dir: Place | None = None
    """Folder of the cache files; none is below the data folder, or the user's cache folder if that is read only."""
    sampler: SamplerConfig | None = None
    """Class-balanced batches; none draws every image once an epoch in random order."""

    @property
    def embedded(self) -> bool:
        """Whether the images are the embedded patterns; with a root they are that root's."""
        return self.dataset == "patterns" and self.root is None

    @property
    def name(self) -> str:
        """What the images are called: the data set, or `folder` where a root takes the place of the patterns."""
        return "folder" if self.dataset == "patterns" and not self.embedded else self.dataset

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together; give both or neither")
        if self.std is not None and min(self.std) == 0:
            raise ValueError(f"std must be three numbers above 0, not {list(self.std)}")
        if self.cache_size is not None and self.cache == "none":
            raise ValueError(f"cache_size={self.cache_size} needs a cache: add data.cache=mmap or data.cache=memory")
        return self


class ViewConfig(Section):
    """One kind of crop: how many, how large, and the share of the image's area each covers."""

    count: Count
    size: Positive
    scale: Range

    @model_validator(mode="after")
    def _check(self) -> ViewConfig:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale must be two numbers with 0 < low <= high <= 1, not {list(self.scale)}")
        return self


class GlobalViewConfig(ViewConfig):
    """Large crops, which the teacher sees as well."""

    count: Count = 2
    size: Positive = 224
    scale: Range = (0.25, 1.0)


class LocalViewConfig(ViewConfig):
    """Small crops, for the student."""

    count: Count = 10
    size: Positive = 96
    scale: Range = (0.05, 0.25)


class AugmentConfig(Section):
    """Colour and flip augmentations (BYOL/DINO). Probabilities, and strengths as in ColorJitter."""

    flip: Fraction = 0.5
    jitter: Fraction = 0.8
    brightness: Weight = 0.4
    contrast: Weight = 0.4
    saturation: Weight = 0.2
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1
    grayscale: Fraction = 0.2
    blur_first_global: Fraction = 1.0
    blur_other_global: Fraction = 0.1
    blur_local: Fraction = 0.5
    blur_radius: Range = (0.1, 2.0)
    """Range of the Gaussian's standard deviation in pixels."""
    solarize_other_global: Fraction = 0.2

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        low, high = self.blur_radius
        if not 0 < low <= high:
            raise ValueError(f"blur_radius must be two numbers with 0 < low <= high, not {list(self.blur_radius)}")
        return self


class MaskConfig(Section):
    """Masks on the student's global views: one of `ratio` is chosen, plus or minus its jitter (iBOT)."""

    shape: Literal["block", "random"] = "block"
    ratio: tuple[Fraction, ...] = (0.0, 0.3)
    ratio_jitter: tuple[Fraction, ...] = (0.0, 0.2)
    start_epoch: Count = 0

    @model_validator(mode="after")
    def _check(self) -> MaskConfig:
        if not self.ratio or len(self.ratio) != len(self.ratio_jitter):
            raise ValueError("ratio and ratio_jitter must be lists of the same length, at least one number each")
        for ratio, jitter in zip(self.ratio, self.ratio_jitter, strict=True):
            if jitter > ratio:
                raise ValueError(f"ratio_jitter {jitter} is larger than its ratio {ratio}")
        return self
