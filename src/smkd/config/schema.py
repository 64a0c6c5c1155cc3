"""Every setting of a run as frozen models: types, defaults (the paper's) and the checks between fields.

Durations are in epochs, temperatures and momenta are plain numbers, image sizes are in pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Range = tuple[float, float]


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SamplerConfig(Section):
    """Class-balanced batches: `classes` classes with `per_class` images each."""

    classes: Positive
    per_class: Positive


class DataConfig(Section):
    """Where the images are; `data=PATH` is short for `data.root=PATH`."""

    dataset: str = "folder"
    """Row of the data-set table (normalisation constants): see `smkd.data.datasets.DATASETS`."""
    root: Path | None = None
    """Images in any form of docs/own-images.md, such as a folder with train/, val/ and test/, or `hf:<name>`."""
    split_seed: Count = 0
    """Splits data by class that have no splits of their own."""
    split_file: Path | None = None
    """CSV (class,split) that splits them instead of the seed."""
    label_column: str | None = None
    """Column of a table that holds the class, if it is not called label or class."""
    mean: tuple[Fraction, Fraction, Fraction] | None = None
    """Channel means for normalisation on the 0-1 scale, with `std`, instead of the table's (`smkd data stats`)."""
    std: tuple[Fraction, Fraction, Fraction] | None = None
    on_error: Literal["raise", "skip"] = "raise"
    """What an unreadable image does: stop the run, or be replaced by the next readable one and counted."""
    limit_per_class: Positive | None = None
    """Train on at most this many images of each class (for quick trials)."""
    cache: Literal["none", "memory", "mmap"] = "none"
    """Decode the training images once: into this process's memory, or a file that all processes of a machine map."""
    cache_size: Positive | None = None
    """Shorter side in pixels at which images are cached, never enlarged; none keeps them as they are."""
    cache_dir: Path | None = None
    """Folder of the cache files; none is below the data folder, or the user's cache folder if that is read only."""
    sampler: SamplerConfig | None = None
    """Class-balanced batches; none draws every image once an epoch in random order."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together; give both or neither")
        if self.std is not None and min(self.std) == 0:
            raise ValueError(f"std must be three numbers above 0, not {list(self.std)}")
        if self.cache_size is not None and self.cache == "none":
            raise ValueError(f"cache_size={self.cache_size} needs a cache: add data.cache=mmap or data.cache=memory")
        return self


class ModelConfig(Section):
    """The backbone. `embed_dim`, `depth` and `num_heads` replace those of the named size."""

    size: Literal["debug", "tiny", "small", "base", "large"] = "small"
    patch_size: Positive = 16
    image_size: Positive = 224
    """Native image side: sets the size of the stored position embedding."""
    embed_dim: Positive | None = None
    depth: Positive | None = None
    num_heads: Positive | None = None
    drop_path: Fraction = 0.1
    """Stochastic depth of the student's last block; earlier blocks get proportionally less."""
    layer_scale: float | None = None
    """Initial value of LayerScale; none leaves it out."""
    register_tokens: Count = 0
    rotary: bool = False
    """As DINOv3: positions by turning queries and keys instead of a stored embedding, and norms with epsilon 1e-5."""


class HeadConfig(Section):
    """The projection head (DINO, iBOT)."""

    num_prototypes: Positive = 8192
    num_patch_prototypes: Positive | None = None
    """Prototypes of a separate patch layer; none shares the [CLS] layer with the patches."""
    hidden_dim: Positive = 2048
    bottleneck_dim: Positive = 256
    layers: Positive = 3
    fixed_norm: bool = False
    """Keep the norms of the last layer's rows at 1 (steadier at high learning rates)."""


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


class TemperatureConfig(Section):
    """Linear warm-up of a teacher temperature from `start` to `end` over `warmup_epochs`."""

    start: Annotated[float, Field(gt=0)] = 0.04
    end: Annotated[float, Field(gt=0)] = 0.07
    warmup_epochs: Count = 30


class ClsConfig(Section):
    """The [CLS] term."""

    weight: Weight = 1.0
    same_image: bool = False
    """With labels: also pair an image with its own other global view (the reference does not)."""


class MimConfig(Section):
    """Masked-patch prediction (iBOT)."""

    weight: Weight = 0.0


class PatchConfig(Section):
    """Matched patches across images of one class (SMKD)."""

    weight: Weight = 0.0
    matching: Literal["paper", "reference"] = "paper"
    weighting: Literal["attention", "mean"] = "attention"
    """Weigh each teacher patch by the teacher's [CLS] attention, or all alike."""
    same_image: bool = True
    """Paper matching: also pair an image with its own other view."""


class SupervisedConfig(Section):
    """Cross-entropy of a linear classifier on the student's [CLS] token (0: off)."""

    weight: Weight = 0.0


class ObjectiveConfig(Section):
    """The terms, their weights and the distributions they compare."""

    labels: bool = False
    """Pair different images of one class (phase 2) instead of the views of one image (phase 1)."""
    cls: ClsConfig = ClsConfig()
    mim: MimConfig = MimConfig()
    patch: PatchConfig = PatchConfig()
    supervised: SupervisedConfig = SupervisedConfig()
    pairs: Literal["local", "global"] = "local"
    """Pairs within each device's own batch, or with the teacher outputs of all devices."""
    student_temperature: Annotated[float, Field(gt=0)] = 0.1
    cls_temperature: TemperatureConfig = TemperatureConfig()
    patch_temperature: TemperatureConfig = TemperatureConfig()
    cls_center_momentum: Fraction = 0.9
    patch_center_momentum: Fraction = 0.9

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        if not any(term.weight > 0 for term in (self.cls, self.mim, self.patch, self.supervised)):
            raise ValueError("every term has weight 0; give cls, mim, patch or supervised a positive weight")
        if self.patch.matching == "reference" and self.pairs == "global":
            raise ValueError("patch.matching=reference knows only pairs=local, as the published code")
        return self


class OptimConfig(Section):
    """AdamW, its schedules, and the teacher's momentum."""

    lr: Annotated[float, Field(gt=0)] = 5e-4
    """Peak learning rate, used as given: it is not scaled with the batch size."""
    lr_end: Weight = 1e-5
    warmup_epochs: Count = 10
    weight_decay: Weight = 0.04
    weight_decay_end: Weight = 0.4
    clip_norm: Weight = 3.0
    """Largest gradient norm of each single parameter tensor; 0 turns clipping off."""
    freeze_last_layer_epochs: Count = 1
    teacher_momentum: Fraction = 0.996
    teacher_momentum_end: Fraction = 1.0


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

    every: Count = 50
    """Epochs between validations; 0 turns them off."""
    split: Literal["val"] = "val"
    episodes: Positive = 1_000
    resize: Positive = 256
    crop: Positive = 224


class RunConfig(Section):
    """Everything that determines a training run."""

    recipe: str = ""
    phase: Literal["pretrain", "distill"]
    out: Path | None = None
    """Run folder; none is runs/<recipe>."""
    init: Path | None = None
    """Run, checkpoint, or weights of another project (docs/weights.md) to start from: student, teacher and centres."""
    init_optimizer: bool = False
    """Also take over the optimiser's state from `init` (the reference does)."""
    resume: bool = True
    """Go on where the run in `out` stopped; false makes an existing run an error."""
    overwrite: bool = False
    """Replace an existing run in `out`."""
    seed: Count = 0

    epochs: Positive
    batch_size: Positive = 512
    """Images per optimiser step, over all devices and accumulation steps."""
    accumulate: Positive = 1
    """Forward and backward passes per optimiser step. Pairs form within one pass."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: Positive = 1
    """Processes on this machine, one device each."""
    num_nodes: Positive = 1
    """Machines; more than one needs torchrun (docs/recipes.md)."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bfloat16 where the hardware has it, else float16 on CUDA, else float32."""
    num_workers: Count | Literal["auto"] = "auto"
    """Data-loading processes per device; auto: none on the CPU, else all cores but one, at most 16."""
    log_every: Positive = 20
    """Steps between two lines of metrics.jsonl."""
    save_every: Count = 10
    """Epochs between checkpoints that are kept by number; 0 keeps last and best only."""
    wandb: bool = False
    wandb_project: str = "smkd"

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    head: HeadConfig = HeadConfig()
    global_views: ViewConfig = ViewConfig(count=2, size=224, scale=(0.25, 1.0))
    local_views: ViewConfig = ViewConfig(count=10, size=96, scale=(0.05, 0.25))
    augment: AugmentConfig = AugmentConfig()
    mask: MaskConfig = MaskConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    validation: ValidationConfig = ValidationConfig()
    features: FeaturesConfig = FeaturesConfig()
    evaluation: ProtocolConfig = ProtocolConfig()

    @model_validator(mode="before")
    @classmethod
    def _data_shorthand(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("data"), str | Path):
            values = {**values, "data": {"root": values["data"]}}
        return values

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        patch = self.model.patch_size
        sizes = {
            "model.image_size": self.model.image_size,
            "global_views.size": self.global_views.size,
            "local_views.size": self.local_views.size,
            "validation.crop": self.validation.crop,
            "evaluation.crop": self.evaluation.crop,
        }
        for name, size in sizes.items():
            if size < patch:
                raise ValueError(f"{name}={size} is smaller than one patch (model.patch_size={patch})")
            if size % patch:
                near = size - size % patch
                raise ValueError(f"{name}={size} is not divisible by model.patch_size={patch}; use {near}")
        if self.global_views.count < 1:
            raise ValueError("global_views.count must be at least 1")
        if self.phase == "pretrain" and self.global_views.count + self.local_views.count < 2:
            raise ValueError("self-supervision compares views: use at least two views in all")
        if self.batch_size % self.passes:
            raise ValueError(
                f"batch_size={self.batch_size} is not divisible by devices x num_nodes x accumulate = {self.passes}"
            )
        sampler = self.data.sampler
        if sampler is not None and sampler.classes * sampler.per_class != self.batch_size:
            raise ValueError(
                f"data.sampler: classes={sampler.classes} x per_class={sampler.per_class} "
                f"must be batch_size={self.batch_size}"
            )
        return self

    @property
    def passes(self) -> int:
        """Forward passes that together make one optimiser step, over all devices."""
        return self.devices * self.num_nodes * self.accumulate
