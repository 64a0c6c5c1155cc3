"""What the backbone promises beside the golden numbers: its settings, and stochastic depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from smkd.models.block import Block, DropPath
from smkd.models.vit import VisionTransformer


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"rotary": True, "swiglu": True, "layer_scale": 0.1, "register_tokens": 2, "mlp_dim": 40},
        {"mask_token": True, "drop_path": 0.5},
    ],
)  # fmt: skip
def test_a_network_knows_its_settings(changes: dict[str, Any]) -> None:
    """Made from numbers: its settings make its twin, which has the same."""
    given = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, **changes}
    model = VisionTransformer(**given).eval()
    twin = VisionTransformer.from_config(model.config, mask_token="mask_token" in changes).eval()
    twin.load_state_dict(model.state_dict())
    image = torch.randn(2, 3, 40, 32)
    assert torch.equal(twin(image).patches, model(image).patches)
    assert twin.config == model.config


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropped_branches_are_made_up_for(rate: float) -> None:
    """A share of the images loses the whole branch, the others have it larger, and the mean stays."""
    torch.manual_seed(0)
    images = 4000
    out = DropPath(rate).train()(torch.ones(images, 3, 2))
    assert bool((out == out[:, :1, :1]).all())
    kept = out[:, 0, 0] > 0
    assert float(kept.float().mean()) == pytest.approx(1 - rate, abs=0.03)
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - rate)))
    assert torch.equal(DropPath(rate).eval()(out), out)


def test_later_blocks_are_dropped_more() -> None:
    blocks = VisionTransformer(embed_dim=24, depth=5, num_heads=3, image_size=32, patch_size=8, drop_path=0.4).blocks
    rates = [block.drop_path.rate for block in blocks if isinstance(block, Block)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
