"""`RunConfig`: all settings of a run, and the checks between its sections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from smkd.config.protocol import FeaturesConfig, ProtocolConfig, ValidationConfig
from smkd.config.schema import (
    AugmentConfig,
    ClsConfig,
    Count,
    DataConfig,
    GlobalViewConfig,
    GuardConfig,
    HeadConfig,
    LocalViewConfig,
    MaskConfig,
    MimConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PatchConfig,
    Place,
    Positive,
    SamplerConfig,
    Section,
    SupervisedConfig,
    TemperatureConfig,
    ViewConfig,
)

__all__ = [
    "AugmentConfig",
    "ClsConfig",
    "DataConfig",
    "FeaturesConfig",
    "GlobalViewConfig",
    "GuardConfig",
    "HeadConfig",
    "LocalViewConfig",
    "MaskConfig",
    "MimConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PatchConfig",
    "ProtocolConfig",
    "RunConfig",
    "SamplerConfig",
    "Section",
    "SupervisedConfig",
    "TemperatureConfig",
    "ValidationConfig",
    "ViewConfig",
]


RANDOM = Path("random")
"""What `init` is where random weights are meant."""


class RunConfig(Section):
    """Everything that determines a training run."""

    recipe: str = ""
    """Name of the recipe that the settings began with."""
    phase: Literal["pretrain", "distill"]
    """pretrain: phase 1, self-supervised; distill: phase 2, with labels."""
    out: Place | None = None
    """Run folder; none is `runs/<recipe>`."""
    init: Place | None = None
    """Run, checkpoint, or weights of another project (docs/weights.md) to start from: student, teacher and centres.
    Phase 2 needs it; `random` says that random weights are meant."""
    init_optimizer: bool = False
    """Also take over the optimiser's state from `init` (the reference does)."""
    resume: bool = True
    """Go on where the run in `out` stopped; false makes an existing run an error."""
    resume_with: tuple[str, ...] = ()
    """Words such as `optim.lr=1e-4 precision=fp32` that change a run from where it resumes; the run keeps them."""
    overwrite: bool = False
    """Replace an existing run in `out`; a restart of the same command goes on with what it began."""
    seed: Count = 0
    """Seed of everything that is drawn at random."""

    epochs: Positive
    """Times that every image is seen."""
    batch_size: Positive = 512
    """Images per optimiser step, over all devices and accumulation steps."""
    accumulate: Positive = 1
    """Forward and backward passes per optimiser step. Pairs form within one pass; all else is as in one
    (docs/method.md)."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else MPS, else the CPU."""
    devices: Positive = 1
    """Processes on this machine, one device each."""
    num_nodes: Positive = 1
    """Machines; more than one needs torchrun or SLURM (docs/scale.md)."""
    shard: Literal["none", "full"] = "none"
    """full: each of several devices keeps only its part of the weights and of what the optimiser knows of them
    (docs/scale.md)."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bfloat16 where the hardware has it, else float16 on CUDA, else float32."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the networks of training with torch.compile; auto: on CUDA, if it works there."""
    recompute: bool = False
    """Make each block's activations again in the backward pass: less memory for about a quarter more time."""
    num_workers: Count | Literal["auto"] = "auto"
    """Data-loading processes per device; auto: none on the CPU, else all cores but one, at most 16."""
    log_every: Positive = 20
    """Steps between two lines of metrics.jsonl."""
    save_every: Count = 10
    """Epochs between checkpoints that are kept by number; 0 keeps last and best only."""
    save_minutes: Annotated[float, Field(gt=0)] = 15
    """Minutes after which a checkpoint is written within an epoch, too."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Hours after which the run saves and stops with exit code 75; the same command goes on."""
    keep: Positive = 2
    """Newest states that are kept: last.pt, and before it last-1.pt, ..."""
    wandb: bool = False
    """Also log to Weights & Biases (the extra wandb)."""
    wandb_project: str = "smkd"
    """Project on Weights & Biases."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    head: HeadConfig = HeadConfig()
    global_views: GlobalViewConfig = GlobalViewConfig()
    local_views: LocalViewConfig = LocalViewConfig()
    augment: AugmentConfig = AugmentConfig()
    mask: MaskConfig = MaskConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    guard: GuardConfig = GuardConfig()
    validation: ValidationConfig = ValidationConfig()
    features: FeaturesConfig = FeaturesConfig()
    evaluation: ProtocolConfig = ProtocolConfig()

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("data"), str | Path):
            values = {**values, "data": {"root": values["data"]}}
        if isinstance(values, dict) and isinstance(values.get("resume_with"), str):
            values = {**values, "resume_with": values["resume_with"].split()}
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

    @model_validator(mode="after")
    def _check_shard(self) -> RunConfig:
        refused = {
            "needs several processes: set devices=<GPUs>": self.devices * self.num_nodes == 1,
            "does not work with compile=true: leave compile out": self.compile is True,
            "does not work with precision=fp16: use bf16 or fp32": self.precision == "fp16",
            "does not work with accelerator=mps: use cuda": self.accelerator == "mps",
        }
        if self.shard == "full" and any(refused.values()):
            raise ValueError(f"shard=full {next(why for why, holds in refused.items() if holds)}, or shard=none")
        return self

    @property
    def starts_random(self) -> bool:
        """Whether no weights are given to start from."""
        return self.init is None or self.init == RANDOM

    @property
    def needs_labels(self) -> bool:
        """Whether training asks for the classes of its images."""
        return self.objective.labels or self.objective.supervised.weight > 0 or self.data.sampler is not None

    @property
    def passes(self) -> int:
        """Forward passes that together make one optimiser step, over all devices."""
        return self.devices * self.num_nodes * self.accumulate
