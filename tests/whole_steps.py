"""One step of a tiny learner on images that are given out to devices and passes, and what came of it."""

from __future__ import annotations

from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smkd.config.loading import check
from smkd.config.run_config import RunConfig
from smkd.data.loader import Views
from smkd.engine.optim import rates_at
from smkd.engine.step import Learner

IMAGES = 8
# three images of class 0 lie across the halves, class 3 is alone
ACROSS = (0, 0, 1, 2, 0, 1, 3, 2)
# no class lies across the halves, and these hold 2 x 3 and 2 x 2 pairs of different images
WITHIN = (0, 0, 0, 1, 2, 2, 3, 3)
TERMS = ("cls", "mim", "patch", "supervised")
SUBSETS = [some for number in range(1, 5) for some in combinations(TERMS, number)]


class Outcome(NamedTuple):
    """What a step gave; gradients are None where the loss does not depend on a weight."""

    losses: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    centers: dict[str, Tensor]
    weights: dict[str, Tensor]
    empty: dict[str, int]


def config_of(objective: dict[str, Any], **settings: Any) -> RunConfig:
    """No clipping and no frozen layer, so that gradients are those of the loss; the full learning rate at once."""
    head = {"num_prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16, **settings.pop("head", {})}
    return check(
        {
            "phase": "distill", "epochs": 10, "batch_size": IMAGES, "seed": 3, "head": head,
            "model": {"size": "debug", "patch_size": 8, "image_size": 16, "drop_path": 0.0},
            "global_views": {"count": 2, "size": 16, "scale": [0.25, 1.0]},
            "local_views": {"count": 2, "size": 8, "scale": [0.05, 0.25]},
            "objective": {"cls_center_momentum": 0.7, "patch_center_momentum": 0.6, **objective},
            "optim": {"lr": 1e-3, "warmup_epochs": 0, "freeze_last_layer_epochs": 0, "clip_norm": 0},
            "validation": {"resize": 16, "crop": 16}, "evaluation": {"resize": 16, "crop": 16}, **settings,
        }
    )  # fmt: skip


def only(terms: tuple[str, ...]) -> dict[str, Any]:
    """An objective with labels of these terms, each of another weight."""
    weights = {name: (1.0 + number) / 2 if name in terms else 0.0 for number, name in enumerate(TERMS)}
    return {"labels": True, "pairs": "global", **{name: {"weight": weight} for name, weight in weights.items()}}


def views_of(labels: tuple[int, ...], part: slice) -> Views:
    """Some of eight images of noise."""
    noise = torch.Generator().manual_seed(0)
    masks = torch.rand(2, IMAGES, 2, 2, generator=noise) < 0.4
    large, small = (torch.randn(2, IMAGES, 3, side, side, generator=noise) for side in (16, 8))
    return Views(large[:, part], small[:, part], masks[:, part], torch.tensor(labels)[part])


def one_step(config: RunConfig, labels: tuple[int, ...], *, rank: int = 0, world: int = 1) -> Outcome:
    """A step on the images of one device: its share of each pass, as the sampler gives them out."""
    learner = Learner.create(config, 8, torch.device("cpu"), None)
    with torch.no_grad():  # prototypes whose norms differ, centres that are not zero
        noise = torch.Generator().manual_seed(1)
        for network in (learner.pair.student, learner.pair.teacher):
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
        for center in learner.objective.buffers():
            center.normal_(generator=noise)
    size = IMAGES // (world * config.accumulate)
    starts = [(number * world + rank) * size for number in range(config.accumulate)]
    passes = [views_of(labels, slice(start, start + size)) for start in starts]
    result = learner.step(passes, rates_at(config, 0, 10))
    named = dict(learner.pair.student.named_parameters())
    outcome = Outcome(
        losses={name: value.detach() for name, value in result.losses.items()},
        gradients={name: None if p.grad is None else without_keys(name, p.grad) for name, p in named.items()},
        centers={name: center.clone() for name, center in learner.objective.named_buffers()},
        weights={name: without_keys(name, p.detach()) for name, p in named.items()},
        empty=result.empty,
    )
    if world > 1:  # weights that got no gradient are complained about in the step after
        learner.step(passes, rates_at(config, 1, 10))
    return outcome


def without_keys(name: str, value: Tensor) -> Tensor:
    """The keys' bias moves every score of a row alike, so its gradient is rounding noise."""
    if name.endswith("attn.qkv.bias"):
        query, _, values = value.chunk(3)
        return torch.cat([query, values])
    return value.clone()


def assert_same(ours: Outcome, expected: Outcome) -> None:
    """Losses, gradients and centres, within 1e-5; of a tensor's largest value where that is above 1."""
    for part in ("losses", "gradients", "centers"):
        found, wanted = getattr(ours, part), getattr(expected, part)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert (found[key] is None) == (value is None), key
            if value is not None:
                near = 1e-5 * max(1.0, float(value.abs().max()))
                torch.testing.assert_close(found[key], value, rtol=0, atol=near, msg=lambda m, k=key: f"{k}: {m}")


def learned(outcome: Outcome) -> set[str]:
    """Names of the weights that got a gradient which a wrong one could not be taken for."""
    large = {name: g for name, g in outcome.gradients.items() if g is not None and float(g.abs().max()) > 1e-3}
    return set(large)
