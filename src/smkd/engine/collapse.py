"""Whether the teacher still tells images apart: its distributions, prototypes and features, at the lines of the log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from smkd import distributed
from smkd.config.run_config import RunConfig
from smkd.engine.log import RunLog

LINES = 3
"""So many lines of the log in a row are a collapse."""
TOLD_APART = 0.002
"""Share of the largest possible entropy; what a distribution says of its image."""
UNIFORM = 0.999
"""Share of the largest possible entropy; a distribution above it prefers no prototype."""
RANK = 1.5
"""Effective rank; features below it point in one direction."""


class TeacherAnswers(NamedTuple):
    """What the teacher says of the first global view of each image of a step; tensors stay on the device.

    Attributes:
        logits: [images, prototypes].
        center: [prototypes], as it was before the step.
        temperature: of its distributions.
        features: [images, dim] the backbone's [CLS].
    """

    logits: Tensor
    center: Tensor
    temperature: float
    features: Tensor


@torch.no_grad()
def measure_answers(answers: TeacherAnswers) -> dict[str, float]:
    """Numbers that tell a collapse, over the images of all devices; the device is waited for.

    Returns:
        target_entropy: mean entropy of the teacher's distributions, mean_target_entropy: entropy of their mean, both
        as shares of the logarithm of the number of prototypes, 0 to 1; target_prototypes: how many different ones are
        the likeliest of an image; feature_rank: effective rank of the [CLS] features, 1 to their number (Garrido et
        al., RankMe, ICML 2023). Empty if something is not finite.
    """
    z = (answers.logits.float() - answers.center) / answers.temperature  # [images, prototypes]
    p = z.softmax(dim=-1)
    entropy = torch.special.entr(p).sum(dim=-1).mean()
    chosen = torch.zeros_like(answers.center).index_fill_(0, z.argmax(dim=-1), 1.0)  # [prototypes]
    of_all = distributed.mean(torch.stack([p.mean(dim=0), chosen, entropy.expand_as(chosen)]))  # [3, prototypes]
    features = distributed.gather(answers.features.float(), dim=0)  # [all images, dim]
    wide = len(features) < features.shape[1]
    gram = (features @ features.T if wide else features.T @ features).double().cpu()  # [smaller, smaller]
    mean, used, own = of_all.double().cpu()
    if not (gram.isfinite().all() and own.isfinite().all()):
        return {}
    largest = math.log(max(2, len(mean)))
    sizes = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()  # singular values of the features
    shares = sizes / sizes.sum().clamp(min=1e-30)
    return {
        "target_entropy": float(own[0]) / largest,
        "mean_target_entropy": float(torch.special.entr(mean).sum()) / largest,
        "target_prototypes": int((used > 0).sum()),
        "feature_rank": math.exp(float(torch.special.entr(shares).sum())),
    }


def signs(values: Mapping[str, float], config: RunConfig) -> dict[str, str]:
    """What collapsed, as a line for each sign; healthy numbers have none.

    Args:
        values: as `measure_answers` returns them.
        config: of the run. Where no [CLS] term trains the prototypes, the features alone are looked at.
    """
    found = {}
    trained = config.objective.cls.weight > 0
    if trained and values["mean_target_entropy"] - values["target_entropy"] < TOLD_APART:
        if values["target_entropy"] > UNIFORM:
            found["uniform"] = (
                "the teacher prefers no prototype for any image: its distributions are uniform; try a lower "
                "objective.cls_temperature.end or head.fixed_norm=true"
            )
        else:
            found["same"] = (
                f"the teacher answers the same for every image: {config.batch_size} images use "
                f"{values['target_prototypes']} of {config.head.num_prototypes} prototypes; try a lower "
                "objective.cls_center_momentum, a higher objective.cls_temperature.end, or a lower optim.lr"
            )
    if values["feature_rank"] < RANK:
        found["features"] = (
            "the [CLS] features of all images are nearly the same: their effective rank is "
            f"{values['feature_rank']:.2f}; try a lower optim.lr or a longer optim.warmup_epochs"
        )
    return found


class CollapseWatch:
    """Says once that the teacher has collapsed, until it recovers.

    Attributes:
        rows: how many lines in a row each sign has been seen.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.rows: dict[str, int] = {}

    def look(self, log: RunLog, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a line of the log; a step that was skipped has none and changes nothing."""
        if not values or self.config.batch_size < 2:
            return
        found = signs(values, self.config)
        self.rows = {sign: self.rows.get(sign, 0) + 1 for sign in found}
        for sign, row in self.rows.items():
            if row == LINES:
                log.write("collapse", step, {"sign": sign, **values})
                log.say(f"step {step}: {found[sign]}")
