"""Stochastic depth: how often a branch is dropped, what becomes of the kept ones, and which block drops how many."""

from __future__ import annotations

import pytest
import torch

from smkd.config.schema import ModelConfig
from smkd.models.block import Block, DropPath
from smkd.models.vit import VisionTransformer


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_a_branch_is_dropped_whole_or_scaled_up(rate: float) -> None:
    torch.manual_seed(0)
    images = torch.arange(1.0, 4001.0)[:, None, None].expand(-1, 2, 3)
    share = DropPath(rate).train()(images) / images
    kept = share != 0
    torch.testing.assert_close(share[kept], torch.full_like(share[kept], 1 / (1 - rate)))
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept)), "all tokens of an image share its fate"
    # five standard deviations of 4000 draws
    assert abs(float(kept.float().mean()) - (1 - rate)) < 5 * (rate * (1 - rate) / 4000) ** 0.5
    assert abs(float(share.mean()) - 1) < 0.08


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_nothing_is_dropped_in_evaluation_or_at_rate_0(rate: float) -> None:
    images = torch.randn(64, 2, 3)
    assert torch.equal(DropPath(rate).eval()(images), images)
    assert torch.equal(DropPath(0.0).train()(images), images)


def test_both_branches_of_a_block_are_dropped_apart() -> None:
    torch.manual_seed(0)
    block = Block(8, 2, 0.5, None).train()
    image = torch.randn(1, 3, 8)
    changed = {round(float((block(image) - image).detach().norm()), 4) for _ in range(64)}
    # nothing, attention alone, the MLP alone, both
    assert len(changed) == 4
    assert 0.0 in changed


def test_the_rate_grows_linearly_with_depth() -> None:
    config = ModelConfig(size="debug", depth=4, patch_size=8, image_size=16)
    backbone = VisionTransformer.from_config(config, drop_path=0.3)
    rates = [module.rate for module in backbone.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    # and as it is applied: the share of images whose branch is gone
    torch.manual_seed(0)
    with torch.no_grad():
        tokens = torch.randn(1, 5, 32).expand(2000, -1, -1)
        for block, rate in zip(backbone.train().blocks, rates, strict=True):
            untouched = (block(tokens) == tokens).all(dim=2).all(dim=1)
            assert abs(float(untouched.float().mean()) - rate**2) < 0.03
