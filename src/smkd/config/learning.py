"""Settings of what learns: networks, objective and optimiser."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from smkd.config.section import Count, Fraction, Positive, Section, Weight


class ModelConfig(Section):
    """The backbone. `embed_dim`, `depth` and `num_heads` replace those of the named size."""

    size: Literal["debug", "tiny", "small", "base", "large"] = "small"
    patch_size: Positive = 16
    image_size: Positive = 224
    """Native image side: sets the size of the stored position embedding."""
    embed_dim: Positive | None = None
    depth: Positive | None = None
    num_heads: Positive | None = None
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Stochastic depth of the student's last block, below 1; earlier blocks get proportionally less."""
    layer_scale: float | None = None
    """Initial value of LayerScale; none leaves it out."""
    register_tokens: Count = 0
    rotary: bool = False
    """As DINOv3: positions by turning queries and keys instead of a stored embedding, and norms with epsilon 1e-5."""
    mlp_dim: Positive | None = None
    """Hidden channels of a block's MLP; none is 4 x embed_dim."""
    swiglu: bool = False
    """Gated MLPs, as in the largest of DINOv2 and DINOv3, instead of GELU."""


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
    cls_temperature: TemperatureConfig = TemperatureConfig()
    patch_temperature: TemperatureConfig = TemperatureConfig()
    cls_center_momentum: Fraction = 0.9
    patch_center_momentum: Fraction = 0.9

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
    warmup_epochs: Count = 10
    weight_decay: Weight = 0.04
    weight_decay_end: Weight = 0.4
    clip_norm: Weight = 3.0
    """Largest gradient norm of each single parameter tensor; 0 turns clipping off."""
    freeze_last_layer_epochs: Count = 1
    teacher_momentum: Fraction = 0.996
    teacher_momentum_end: Fraction = 1.0


class GuardConfig(Section):
    """What a loss or gradient that is not finite does: its step is skipped and counted."""

    max_skips: Positive = 10
    """So many skipped steps in a row stop the run."""
