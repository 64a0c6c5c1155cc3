"""Backbone and head against the reference's tokens, attention, embeddings, logits and gradients."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from golden_files import (
    Golden,
    backbone,
    backbone_from,
    cases,
    cases_within,
    close,
    load,
    own_name,
    own_names,
    own_state,
)
from smkd.config import loading
from smkd.config.schema import HeadConfig, ModelConfig
from smkd.engine.optim import grouped
from smkd.models.head import ProjectionHead
from smkd.models.pair import Network
from smkd.models.vit import Tokens, VisionTransformer

BACKBONES = "vit_*.npz"
INPUTS = r"(.+)/x"
HEADS = cases("head_*.npz")


def masks(golden: Golden, case: str) -> Tensor | None:
    """Masks as the reference used them: with masked image modelling off it ignores them."""
    used = golden.options["masked_im_modeling"] and f"{case}/mask" in golden
    return golden.tensor(f"{case}/mask") if used else None


def compare_tokens(tokens: Tokens, expected: Tensor) -> None:
    close(torch.cat([tokens.cls[:, None], tokens.patches], dim=1), expected, atol=2e-5, rtol=1e-4)


def compare_attention(tokens: Tokens, expected: Tensor) -> None:
    assert tokens.attention is not None
    # only the [CLS] row is computed
    close(tokens.attention, expected[:, :, 0], atol=1e-5)


@pytest.mark.parametrize(("path", "case"), cases_within(BACKBONES, INPUTS))
def test_backbone_tokens_and_attention(path: Path, case: str) -> None:
    golden = load(path)
    seen = backbone(path)(golden.tensor(f"{case}/x"), masks(golden, case), attention=True)
    compare_tokens(seen, golden.tensor(f"{case}/tokens"))
    compare_attention(seen, golden.tensor(f"{case}/attn"))
    close(seen.cls, golden.tensor(f"{case}/cls_only"), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("path", "case"), cases_within(BACKBONES, INPUTS))
def test_backbone_input_tokens_and_positions(path: Path, case: str) -> None:
    golden, model = load(path), backbone(path)
    images = golden.tensor(f"{case}/x")
    close(model.positions(*images.shape[-2:]), golden.tensor(f"{case}/pos"), atol=1e-5)
    close(model.embed(images, masks(golden, case)), golden.tensor(f"{case}/prepared"), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("path", "case"), cases_within(BACKBONES, r"(.+)/tokens_mim_off"))
def test_backbone_without_masks(path: Path, case: str) -> None:
    golden = load(path)
    compare_tokens(backbone(path)(golden.tensor(f"{case}/x")), golden.tensor(f"{case}/tokens_mim_off"))


@pytest.mark.parametrize(("path", "case"), cases_within(BACKBONES, r"(.+/mid\d+)/tokens/0"))
def test_backbone_last_blocks(path: Path, case: str) -> None:
    golden = load(path)
    name, count = re.fullmatch(r"(.+)/mid(\d+)", case).groups()  # type: ignore[union-attr]
    blocks = backbone(path).last_blocks(golden.tensor(f"{name}/x"), int(count))
    assert len(blocks) == int(count) == len(golden.under(f"{case}/tokens"))
    for number, tokens in enumerate(blocks):
        compare_tokens(tokens, golden.tensor(f"{case}/tokens/{number}"))
        compare_attention(tokens, golden.tensor(f"{case}/attn/{number}"))


@pytest.mark.parametrize(("path", "size"), cases_within("vit_pos_embed*.npz", r"out/(\d+x\d+)"))
def test_positions_of_other_image_sizes(path: Path, size: str) -> None:
    golden = load(path)
    native = re.search(r"native image (\d+)x\d+, patch (\d+)", golden.options["lines"][0])
    assert native is not None
    image_size, patch_size = (int(number) for number in native.groups())
    stored = golden.tensor("pos_embed")
    dim = stored.shape[-1]
    model = VisionTransformer(image_size=image_size, patch_size=patch_size, embed_dim=dim, depth=1, num_heads=1)
    model.pos_embed = nn.Parameter(stored)
    height, width = (int(side) for side in size.split("x"))
    close(model.positions(height, width), golden.tensor(f"out/{size}"), atol=1e-5)


def head_config(options: dict[str, Any]) -> HeadConfig:
    """The reference ignores the number of patch prototypes when the layer is shared."""
    shared = options["shared_head"]
    named = {"hidden_dim": "hidden_dim", "bottleneck_dim": "bottleneck_dim", "nlayers": "layers"}
    return HeadConfig(
        num_prototypes=options["out_dim"],
        num_patch_prototypes=None if shared else options["patch_out_dim"],
        fixed_norm=options["norm_last_layer"],
        **{ours: options[theirs] for theirs, ours in named.items() if theirs in options},
    )


def make_head(golden: Golden) -> ProjectionHead:
    options = golden.options
    head = ProjectionHead(options["in_dim"], head_config(options))
    head.load_state_dict(own_state(golden.under("state"), shared_head=options["shared_head"]))
    return head


def both_logits(head: ProjectionHead, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of [CLS] and of the patches, from tokens [images, 1 + patches, dim]."""
    cls, factors = head(tokens[:, 0], tokens[:, 1:].flatten(0, 1))
    assert factors is not None
    return cls, (factors.embedded @ factors.prototypes.T).unflatten(0, (len(tokens), -1))


@pytest.mark.parametrize("path", HEADS)
def test_head_outputs(path: Path) -> None:
    golden = load(path)
    head, tokens = make_head(golden), golden.tensor("x3")
    close(head(golden.tensor("x2"))[0], golden.tensor("out2"), atol=1e-5, rtol=1e-4)
    cls, patches = both_logits(head, tokens)
    close(cls, golden.tensor("out3/cls"), atol=1e-5, rtol=1e-4)
    close(patches, golden.tensor("out3/patch"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("path", HEADS)
def test_head_gradients(path: Path) -> None:
    golden = load(path)
    head, tokens = make_head(golden), golden.tensor("x3").requires_grad_()
    cls, patches = both_logits(head, tokens)
    ((cls * golden.tensor("cot/cls")).sum() + (patches * golden.tensor("cot/patch")).sum()).backward()
    assert tokens.grad is not None
    close(tokens.grad, golden.tensor("grad/x3"), atol=1e-5, rtol=1e-4)
    expected = own_state(golden.under("grad/state"), shared_head=golden.options["shared_head"])
    gradients = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        close(gradient, expected[name], atol=1e-5, rtol=1e-4, what=name)


@pytest.mark.parametrize("path", HEADS)
def test_head_trainable_parameters(path: Path) -> None:
    golden = load(path)
    head, shared = make_head(golden), golden.options["shared_head"]
    for trainable, names in ((True, "trainable_names"), (False, "frozen_names")):
        ours = {name for name, p in head.named_parameters() if p.requires_grad is trainable}
        assert ours == own_names(golden.words(names), shared_head=shared)


@pytest.mark.parametrize(("path", "case"), cases_within("schedules*.npz", r"keys/(.+)/names"))
def test_names_and_shapes_of_full_size_students(path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = load(path)
    line = golden.lines()[f"keys/{case}"]
    known = re.search(r"vit_(\w+), patch (\d+)", line["text"])
    assert known is not None
    config = ModelConfig(size=known[1], patch_size=int(known[2]))
    # values play no part, and drawing those of the larger networks takes seconds
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda tensor, **_: tensor)
    model = VisionTransformer.from_config(config, mask_token="with mask embedding" in line["text"])
    network = Network(model, ProjectionHead(model.embed_dim, head_config(line["head"])))
    names, texts = golden.words(f"keys/{case}/names"), golden.words(f"keys/{case}/shapes")
    shapes = {name: tuple(int(n) for n in text.split("x")) for name, text in zip(names, texts, strict=True)}
    expected = {
        own_name(name): (1, *shape) if name.endswith("masked_embed") else shape
        for name, shape in shapes.items()
        if own_name(name) in own_names(names, shared_head=line["head"]["shared_head"])
    }
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == expected


@pytest.mark.parametrize(("path", "case"), cases_within("schedules*.npz", r"groups/(.+)/regularised"))
def test_parameter_groups(path: Path, case: str) -> None:
    golden = load(path)
    line = golden.lines()[f"groups/{case}"]
    model = backbone_from(line["backbone"], mask_token=line["masked_im_modeling"])
    network = Network(model, ProjectionHead(model.embed_dim, head_config(line["head"])))
    config = loading.resolve("debug-pretrain").model_copy(update={"head": head_config(line["head"])})
    first, second = grouped(network, config)
    assert (first.decayed, second.decayed) == (True, False)
    decayed, plain = set(first.named), set(second.named)
    shared = line["head"]["shared_head"]
    expected = {
        kind: own_names(golden.words(f"groups/{case}/{kind}"), shared_head=shared)
        for kind in ("regularised", "not_regularised", "no_grad")
    }
    assert decayed == expected["regularised"]
    assert plain == expected["not_regularised"]
    assert {name for name, _ in network.named_parameters()} - decayed - plain == expected["no_grad"]
