"""Attention's own backward pass in bfloat16 on a CPU and the patch embedding, against their slow twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smkd.models import attention
from smkd.models.attention import Attention
from smkd.models.vit import PatchEmbed

PYTORCHS = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"


def gradients(layer: Attention, tokens: Tensor, wanted: Tensor) -> list[Tensor]:
    """Of the tokens and of the projection's weight, after a pass in bfloat16."""
    tokens = tokens.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        layer(tokens).backward(wanted)
    assert tokens.grad is not None
    assert layer.qkv.weight.grad is not None
    return [tokens.grad.clone(), layer.qkv.weight.grad.clone()]


def written_out(layer: Attention, tokens: Tensor) -> Tensor:
    """The definition, without autocast: softmax(q k' / sqrt(dim)) v."""
    q, k, v = layer.qkv(tokens).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
    mixed: Tensor = layer.proj((weights @ v).transpose(1, 2).flatten(2))
    return mixed


def drawn(images: int, tokens: int) -> tuple[Attention, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = Attention(48, 3)
    # scores of a network that has learned, some of them large
    torch.nn.init.normal_(layer.qkv.weight, std=0.2)
    return layer, torch.randn(images, tokens, 48), torch.randn(images, tokens, 48).bfloat16()


@pytest.mark.parametrize("tokens", [1, 10, 50])
def test_gradients_in_bfloat16_are_those_of_the_definition(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, given, wanted = drawn(5, tokens)
    ours = gradients(layer, given, wanted)
    monkeypatch.setattr(attention, "_is_slow", lambda q: False)
    theirs = gradients(layer, given, wanted)
    exact = given.clone().requires_grad_()
    layer.zero_grad()
    written_out(layer, exact).backward(wanted.float())
    assert exact.grad is not None
    assert layer.qkv.weight.grad is not None
    for of_ours, of_theirs, right in zip(ours, theirs, [exact.grad, layer.qkv.weight.grad], strict=True):
        error, bound = (of_ours - right).norm(), (of_theirs - right).norm()
        assert error <= 1.5 * bound
        assert error < 0.03 * right.norm()


def test_images_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, given, wanted = drawn(5, 7)
    whole = gradients(layer, given, wanted)
    monkeypatch.setattr(attention, "ELEMENTS_AT_ONCE", 2 * 3 * 7 * 7)  # two images, so that one is left
    for some, all_of_them in zip(gradients(layer, given, wanted), whole, strict=True):
        torch.testing.assert_close(some, all_of_them, rtol=1e-2, atol=1e-3)


def test_pytorchs_slow_backward_pass_is_not_run() -> None:
    layer, given, wanted = drawn(2, 10)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradients(layer, given, wanted)
    names = {event.key for event in profile.key_averages()}
    assert "aten::bmm" in names
    assert PYTORCHS not in names


def test_float32_and_passes_without_gradients_are_pytorchs() -> None:
    layer, given, _ = drawn(2, 10)
    torch.testing.assert_close(layer(given), written_out(layer, given))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert layer(given).dtype == torch.bfloat16


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (19, 9)])
def test_patches_are_embedded_as_by_the_convolution(height: int, width: int) -> None:
    torch.manual_seed(0)
    layer, images = PatchEmbed(8, 12), torch.rand(3, 3, height, width)
    ours = layer(images)
    wanted = torch.randn_like(ours)
    ours.backward(wanted)
    found = [each.grad.clone() for each in layer.parameters() if each.grad is not None]
    layer.zero_grad()
    convolved = layer.proj(images).flatten(2).transpose(1, 2)
    convolved.backward(wanted)
    torch.testing.assert_close(ours, convolved)
    torch.testing.assert_close(found, [each.grad for each in layer.parameters()])
