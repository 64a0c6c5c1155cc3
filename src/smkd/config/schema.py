"""Every section of a run's settings as frozen models: types, defaults (the paper's) and checks within a section."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from smkd.files import expanded

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Range = tuple[float, float]
MOST_BLOCKS = 1000
Place = Annotated[Path, AfterValidator(expanded)]
"""A file or folder; `~` is the home folder."""


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SamplerConfig(Section):
    """Class-balanced batches: `classes` classes with `per_class` images each.

    The classes are shared evenly by devices and passes; a class with fewer images gives some of them again.
    """

    classes: Positive
    """Classes of a batch."""
    per_class: Positive
    """Images of each class of a batch."""


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
    """Channel standard deviations, with `mean`."""
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
    """Crops of each image."""
    size: Positive
    """Side in pixels, whole patches."""
    scale: Range
    """Smallest and largest share of the image's area that a crop covers."""

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
    """Probability that a crop is mirrored."""
    jitter: Fraction = 0.8
    """Probability that brightness, contrast, saturation and hue are changed, in random order."""
    brightness: Weight = 0.4
    """Largest change of brightness, as a share."""
    contrast: Weight = 0.4
    """Largest change of contrast, as a share."""
    saturation: Weight = 0.2
    """Largest change of saturation, as a share."""
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1
    """Largest turn of the hue, in turns of the colour circle."""
    grayscale: Fraction = 0.2
    """Probability that a crop loses its colours."""
    blur_first_global: Fraction = 1.0
    """Probability that the first global view is blurred."""
    blur_other_global: Fraction = 0.1
    """Probability that another global view is blurred."""
    blur_local: Fraction = 0.5
    """Probability that a local view is blurred."""
    blur_radius: Range = (0.1, 2.0)
    """Range of the Gaussian's standard deviation in pixels."""
    solarize_other_global: Fraction = 0.2
    """Probability that a global view other than the first is solarised."""

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        low, high = self.blur_radius
        if not 0 < low <= high:
            raise ValueError(f"blur_radius must be two numbers with 0 < low <= high, not {list(self.blur_radius)}")
        return self


class MaskConfig(Section):
    """Masks on the student's global views: one of `ratio` is drawn, plus or minus its jitter (iBOT)."""

    shape: Literal["block", "random"] = "block"
    """block: rectangles of patches; random: single patches."""
    ratio: tuple[Fraction, ...] = (0.0, 0.3)
    """Shares of the patches that are masked, one of which is drawn for each view."""
    ratio_jitter: tuple[Fraction, ...] = (0.0, 0.2)
    """How far each share may be off, up or down."""
    start_epoch: Count = 0
    """Epoch from which views are masked."""

    @model_validator(mode="after")
    def _check(self) -> MaskConfig:
        if not self.ratio or len(self.ratio) != len(self.ratio_jitter):
            raise ValueError("ratio and ratio_jitter must be lists of the same length, at least one number each")
        for ratio, jitter in zip(self.ratio, self.ratio_jitter, strict=True):
            if jitter > ratio:
                raise ValueError(f"ratio_jitter {jitter} is larger than its ratio {ratio}")
        return self


class ModelConfig(Section):
    """The backbone. `embed_dim`, `depth` and `num_heads` replace those of the named size."""

    size: Literal["debug", "tiny", "small", "base", "large"] = "small"
    """Channels, blocks and heads: debug 32/2/2, tiny 192/12/3, small 384/12/6, base 768/12/12, large 1024/24/16."""
    patch_size: Positive = 16
    """Side of a patch in pixels."""
    image_size: Positive = 224
    """Native image side: sets the size of the stored position embedding."""
    embed_dim: Positive | None = None
    """Channels of a token."""
    depth: Positive | None = None
    """Blocks."""
    num_heads: Positive | None = None
    """Attention heads of a block."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Stochastic depth of the student's last block, below 1; earlier blocks get proportionally less."""
    layer_scale: float | None = None
    """Initial value of LayerScale; none leaves it out."""
    register_tokens: Count = 0
    """Tokens beside [CLS] and the patches that nothing reads (DINOv2 with registers)."""
    rotary: bool = False
    """As DINOv3: positions by turning queries and keys instead of a stored embedding, and norms with epsilon 1e-5."""
    mlp_dim: Positive | None = None
    """Hidden channels of a block's MLP; none is 4 x embed_dim."""
    swiglu: bool = False
    """Gated MLPs, as in the largest of DINOv2 and DINOv3, instead of GELU."""
    train_blocks: Annotated[str, Field(pattern=r"^(all|last:[1-9][0-9]{0,2})$")] = "all"
    """Which blocks are trained: all, or `last:N`. With `last:N` the blocks before them, the patches, the positions and
    the mask token stay as they are, without gradients, activations or optimiser state (docs/performance.md)."""

    @property
    def last_trained(self) -> int | None:
        """How many last blocks are trained, if not all."""
        return None if self.train_blocks == "all" else int(self.train_blocks.removeprefix("last:"))


class HeadConfig(Section):
    """The projection head (DINO, iBOT)."""

    num_prototypes: Positive = 8192
    """Prototypes that images are compared with, the outputs of the head."""
    num_patch_prototypes: Positive | None = None
    """Prototypes of a separate patch layer; none shares the [CLS] layer with the patches."""
    hidden_dim: Positive = 2048
    """Channels of the hidden layers."""
    bottleneck_dim: Positive = 256
    """Channels of the normalised embedding before the last layer."""
    layers: Positive = 3
    """Layers of the MLP before the last layer."""
    fixed_norm: bool = False
    """Keep the norms of the last layer's rows at 1 (steadier at high learning rates)."""


class TemperatureConfig(Section):
    """Linear warm-up of a teacher temperature from `start` to `end` over `warmup_epochs`."""

    start: Annotated[float, Field(gt=0)] = 0.04
    """Temperature at the first epoch."""
    end: Annotated[float, Field(gt=0)] = 0.07
    """Temperature after the warm-up."""
    warmup_epochs: Count = 30
    """Epochs from `start` to `end`."""


class ClsConfig(Section):
    """The [CLS] term."""

    weight: Weight = 1.0
    """Weight of the term; 0 leaves it out."""
    same_image: bool = False
    """With labels: also pair an image with its own other global view (the reference does not)."""


class MimConfig(Section):
    """Masked-patch prediction (iBOT)."""

    weight: Weight = 0.0
    """Weight of the term; 0 leaves it out."""


class PatchConfig(Section):
    """Matched patches across images of one class (SMKD)."""

    weight: Weight = 0.0
    """Weight of the term; 0 leaves it out."""
    matching: str = "paper"
    """Which student patch answers to which teacher patch: paper, reference (the published code's), or one of another
    package's (docs/extending.md)."""
    weighting: Literal["attention", "mean"] = "attention"
    """Weigh each teacher patch by the teacher's [CLS] attention, or all alike."""
    same_image: bool = True
    """Also pair an image with its own other view. The published code's matching has a rule of its own."""


class SupervisedConfig(Section):
    """Cross-entropy of a linear classifier on the student's [CLS] token (0: off)."""

    weight: Weight = 0.0
    """Weight of the term; 0 leaves it out."""


class ObjectiveConfig(Section):
    """The terms, their weights and the distributions they compare."""

    labels: bool = False
    """Pair different images of one class (phase 2) instead of the views of one image (phase 1)."""
    cls: ClsConfig = ClsConfig()
    mim: MimConfig = MimConfig()
    patch: PatchConfig = PatchConfig()
    supervised: SupervisedConfig = SupervisedConfig()
    terms: dict[str, Weight] = Field(default_factory=dict)
    """Weights of other packages' terms by name (docs/extending.md)."""
    pairs: Literal["local", "global"] = "local"
    """Pairs within each device's own batch, or with the teacher outputs of all devices."""
    student_temperature: Annotated[float, Field(gt=0)] = 0.1
    """Temperature of the student's distributions."""
    cls_temperature: TemperatureConfig = TemperatureConfig()
    """Temperature of the teacher's distributions of [CLS]."""
    patch_temperature: TemperatureConfig = TemperatureConfig()
    """Temperature of the teacher's distributions of patches."""
    cls_center_momentum: Fraction = 0.9
    """Share of the centre of [CLS] that stays at each step."""
    patch_center_momentum: Fraction = 0.9
    """Share of the centre of patches that stays at each step."""

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        weights = [term.weight for term in (self.cls, self.mim, self.patch, self.supervised)]
        if not any(weight > 0 for weight in [*weights, *self.terms.values()]):
            raise ValueError("every term has weight 0; give cls, mim, patch or supervised a positive weight")
        if self.patch.matching == "reference" and self.pairs == "global":
            raise ValueError("patch.matching=reference knows only pairs=local, as the published code")
        return self


class OptimConfig(Section):
    """AdamW, its schedules, and the teacher's momentum."""

    lr: Annotated[float, Field(gt=0)] = 5e-4
    """Peak learning rate, used as given: it is not scaled with the batch size."""
    lr_end: Weight = 1e-5
    """Learning rate at the end of the cosine."""
    head_lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the projection head and the supervised classifier, which start from nothing where the
    backbone has been trained; it follows the schedule of `lr`. null is `lr`."""
    warmup_epochs: Count = 10
    """Epochs in which the learning rate grows from 0 to `lr`."""
    weight_decay: Weight = 0.04
    """Weight decay at the start; biases and norms have none."""
    weight_decay_end: Weight = 0.4
    """Weight decay at the end of its cosine."""
    clip_norm: Weight = 3.0
    """Largest gradient norm of each single parameter tensor; 0 turns clipping off."""
    freeze_last_layer_epochs: Count = 1
    """Epochs in which the last layer of the head stays as it is."""
    teacher_momentum: Fraction = 0.996
    """Share of the teacher that stays at each step, at the start."""
    teacher_momentum_end: Fraction = 1.0
    """The same at the end of its cosine."""


class GuardConfig(Section):
    """What a loss or gradient that is not finite does: its step is skipped and counted."""

    max_skips: Positive = 10
    """So many skipped steps in a row stop the run."""
