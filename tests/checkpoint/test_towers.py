"""Image towers by the names of timm, LAVIS and Hugging Face.

Proven: EVA's and the plain form go to LAVIS and HF and come back bit for bit; what a format has
not, the key's bias, is named, and its loss changes no output; a CLIP ViT has LAVIS's clip_vit names
and shapes; towers that a class cannot hold are refused, each with its reason; an account names
every weight once.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from blip2_train.checkpoint import towers
from blip2_train.checkpoint.account import Row, table
from blip2_train.checkpoint.tower_shape import shape_for_hf, shape_for_lavis
from blip2_train.errors import UserError
from blip2_train.models.vision import VisionTower

SMALL = {"embed_dim": 12, "depth": 3, "num_heads": 2, "patch_size": 8}
EVA = ("eva_giant_patch14_clip_224", {**SMALL, "mlp_ratio": 2.0})
PLAIN = ("vit_tiny_patch16_224", SMALL)
CLIP = ("vit_large_patch14_clip_quickgelu_224.openai", SMALL)


def tower(kind: tuple[str, dict[str, Any]], **changes: Any) -> VisionTower:
    vision = VisionTower(kind[0], image_size=16, weights="random", options=kind[1], **changes)
    generator = torch.Generator().manual_seed(0)
    for value in vision.tower.state_dict().values():
        value.copy_(torch.randn(value.shape, generator=generator))  # biases too
    return vision


def weights(vision: VisionTower) -> dict[str, Tensor]:
    return dict(vision.tower.state_dict())


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.shape == theirs[name].shape and value.equal(theirs[name]), name


@pytest.mark.parametrize("kind", [EVA, PLAIN])
def test_to_hf_and_back(kind: tuple) -> None:
    state = weights(tower(kind))
    there = towers.timm_to_hf(state)
    assert not there.unknown and not there.dropped
    assert "encoder.layers.1.self_attn.qkv.bias" in there.state
    back = towers.hf_to_timm(there.state, parted=kind is EVA)
    assert_same(back.state, state)
    assert {row.source for row in there.rows} == state.keys()


def test_the_bias_is_query_zero_value() -> None:
    state = weights(tower(EVA))
    joint = towers.timm_to_hf(state).state["encoder.layers.0.self_attn.qkv.bias"]
    query, value = state["blocks.0.attn.q_bias"], state["blocks.0.attn.v_bias"]
    assert joint.equal(torch.cat([query, torch.zeros(12), value]))


def test_eva_is_lavis() -> None:
    state = weights(tower(EVA))
    there = towers.timm_to_lavis(state)
    assert_same(there.state, state)
    assert {row.status for row in there.rows} == {"mapped"} and len(there.rows) == len(state)
    assert_same(towers.lavis_to_timm(there.state, parted=True).state, state)


def test_the_keys_bias_is_lost_by_name_and_changes_nothing() -> None:
    vision = tower(PLAIN)
    there = towers.timm_to_lavis(weights(vision))
    lost = [name for name, why in there.dropped.items() if "softmax" in why]
    assert lost == [f"blocks.{i}.attn.qkv.bias (the key's third)" for i in range(2)]
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    before = vision(image)
    back = towers.lavis_to_timm(there.state, parted=False).state
    assert not back["blocks.0.attn.qkv.bias"].equal(weights(vision)["blocks.0.attn.qkv.bias"])
    vision.tower.load_state_dict(back, strict=True)
    assert vision(image).allclose(before, atol=1e-4)


def test_clip_is_clip_vit() -> None:
    state = weights(tower(CLIP))
    there = towers.timm_to_lavis(state)
    assert not there.unknown
    assert there.state["class_embedding"].shape == (12,)
    assert there.state["positional_embedding"].shape == (5, 12)
    names = {"conv1.weight", "ln_pre.bias", "transformer.resblocks.1.attn.in_proj_weight"}
    names |= {"transformer.resblocks.0.mlp.c_proj.bias", "transformer.resblocks.1.ln_2.weight"}
    assert names <= there.state.keys()
    assert_same(towers.lavis_to_timm(there.state, parted=False).state, state)


@pytest.mark.parametrize("gone", ["q_bias", "v_bias"])
def test_half_a_bias_is_refused(gone: str) -> None:
    state = weights(tower(EVA))
    del state[f"blocks.1.attn.{gone}"]
    with pytest.raises(UserError, match="no bias of the"):
        towers.timm_to_hf(state)


def test_unknown_parts_are_named() -> None:
    state = weights(tower(PLAIN)) | {
        "blocks.0.ls1.gamma": torch.ones(12),
        "head.weight": torch.ones(1),
    }
    assert towers.timm_to_hf(state).unknown == ["blocks.0.ls1.gamma", "head.weight"]


def test_shapes() -> None:
    shape = shape_for_hf(tower(EVA).tower, "eva")
    assert (shape.width, shape.depth, shape.heads, shape.mlp, shape.patch) == (12, 2, 2, 24, 8)
    assert (shape.activation, shape.eps) == ("gelu", 1e-6)
    assert shape_for_lavis(tower(EVA).tower, "eva") == shape
    assert shape_for_lavis(tower(CLIP).tower, "clip").activation == "quick_gelu"


@pytest.mark.parametrize(
    ("name", "options", "drop", "said"),
    [
        ("vit_large_patch14_clip_quickgelu_224.openai", SMALL, True, "norm in front of its blocks"),
        ("resnet10t", {}, False, "no vision transformer"),
        ("vit_base_patch16_siglip_224", SMALL, True, "no vision transformer"),
        ("vit_small_patch14_dinov2", SMALL, True, "has blocks.0.ls1.gamma"),
        ("deit3_small_patch16_224", SMALL, True, "other tokens than the class token"),
        ("eva02_tiny_patch14_224", {**SMALL, "embed_dim": 16}, True, "rotary positions"),
        ("vit_tiny_patch16_224", SMALL, False, "drop_last_block=true"),
        ("vit_small_patch14_reg4_dinov2", SMALL, True, "other tokens"),
    ],
)
def test_what_hf_cannot_hold(name: str, options: dict, drop: bool, said: str) -> None:
    vision = VisionTower(
        name, image_size=16, weights="random", options=options, drop_last_block=drop
    )
    with pytest.raises(UserError, match=said) as error:
        shape_for_hf(vision.tower, name)
    assert f"vision.name={name}" in str(error.value)


def test_what_lavis_cannot_hold() -> None:
    plain_gelu = ("vit_large_patch14_clip_224.openai", SMALL)
    with pytest.raises(UserError, match="quick_gelu"):
        shape_for_lavis(tower(plain_gelu).tower, plain_gelu[0])


def test_an_account_is_short() -> None:
    rows = [Row("mapped", f"a.{i}.b", f"c.{i}.d") for i in range(40)]
    rows += [Row("dropped", "x", why="a reason"), Row("missing", "", "y", "drawn")]
    lines = table(rows).splitlines()
    assert lines[0] == "40 mapped, 0 converted, 1 dropped, 1 missing, 0 unknown"
    assert [line.split() for line in lines[1:]] == [
        ["mapped", "40", "x", "a.{i}.b", "->", "c.{i}.d"],
        ["dropped", "1", "x", "x", "(a", "reason)"],
        ["missing", "1", "x", "y", "(drawn)"],
    ]
