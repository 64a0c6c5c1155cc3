"""Activations that a step of ViT-S/16 keeps for its backward pass, in bf16: kept against recomputed.

Counted from autograd's own list of saved tensors, so the figure does not depend on the machine; from it follows how
many images fit a pass on a small GPU, and how many passes make the paper's batch of 512.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from smkd import api
from smkd.engine.bench import synthetic_views
from smkd.engine.optim import rates_at
from smkd.engine.step import Learner

CARD_GB, SPARE_GB, PAPER_BATCH = 12, 2, 512
RECIPES = ("mini-imagenet-pretrain", "mini-imagenet-distill")
CPU = torch.device("cpu")


def kept_gb(recipe: str, recompute: bool, batch: int) -> tuple[float, float]:
    """Saved for the backward pass of one batch beside the weights; and weights, gradients and optimiser together."""
    config = api.resolve(recipe, [f"batch_size={batch}", f"recompute={recompute}"])
    learner, views = Learner.create(config, 64, CPU, torch.bfloat16), synthetic_views(config, CPU)
    weights = {p.untyped_storage().data_ptr() for p in learner.pair.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        # the tensor is held, so that no other can take its place in memory
        saved.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        learner._forward(views, rates_at(config, config.epochs // 2, 1), [])
    activations = sum(x.untyped_storage().nbytes() for at, x in saved.items() if at not in weights)
    student = sum(p.numel() for p in learner.pair.student.parameters())
    # float32: weights, gradients, two moments; the teacher's weights
    return activations / 2**30, 4 * 5 * student / 2**30


def main() -> None:
    result = []
    for recipe in RECIPES:
        for recompute in (False, True):
            (small, fixed), (large, _) = kept_gb(recipe, recompute, 2), kept_gb(recipe, recompute, 4)
            an_image = (large - small) / 2
            fits = int((CARD_GB - SPARE_GB - fixed) / an_image)
            batch = 2 ** (fits.bit_length() - 1)
            result.append({"recipe": recipe, "recompute": recompute, "gb_an_image": an_image, "fixed_gb": fixed})
            print(
                f"{recipe}, recompute={str(recompute).lower()}: {1e3 * an_image:.0f} MB an image beside "
                f"{fixed:.2f} GB; {fits} images a pass fit {CARD_GB} GB with {SPARE_GB} to spare: "
                f"batch_size={PAPER_BATCH} accumulate={max(1, PAPER_BATCH // batch)}"
            )
        result[-1]["ratio"] = result[-2]["gb_an_image"] / result[-1]["gb_an_image"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
