"""Attention maps are what the model really weighs the image by."""

import pytest
import torch
from PIL import Image
from tiny import PATCHES, WIDTH, tiny_model

from blip2_train.evaluation.attention import attention_maps, overlay
from blip2_train.models.attention import split_heads
from blip2_train.models.blocks import CrossAttention


def test_maps_reproduce_the_output_of_a_layer() -> None:
    model = tiny_model().double().eval()
    image = model.qformer.project_image(torch.randn(2, PATCHES, WIDTH, dtype=torch.float64))
    maps = attention_maps(model.qformer, image)
    layers = [m for m in model.qformer.modules() if isinstance(m, CrossAttention)]
    assert maps.shape == (len(layers), 2, 4, PATCHES)
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps.sum(-1)))
    # one head alone: weights times values are the context that the layer projects
    layer = layers[0]
    queries = torch.randn(2, 4, 16, dtype=torch.float64)
    key, value = image[0]
    query = split_heads(layer.query(queries), layer.num_heads)
    weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
    context = (weights @ value).transpose(1, 2).flatten(2)
    expected = layer.norm(layer.output(context) + queries)
    flat = layer(queries.flatten(0, 1), [(image[0], 1)])
    torch.testing.assert_close(flat, expected.flatten(0, 1))
    # and the hooks are gone
    assert not any(m._forward_pre_hooks for m in layers)


def test_maps_follow_the_image() -> None:
    model = tiny_model().eval()
    tokens = torch.randn(1, PATCHES, WIDTH)
    maps = attention_maps(model.qformer, model.qformer.project_image(tokens))
    order = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(1))
    moved = attention_maps(model.qformer, model.qformer.project_image(tokens[:, order]))
    torch.testing.assert_close(moved, maps[..., order], atol=1e-6, rtol=1e-5)


def test_overlay_is_bright_where_the_query_looks() -> None:
    weights = torch.zeros(9)
    weights[2] = 1.0  # top right
    shown = overlay(Image.new("RGB", (30, 30), (200, 200, 200)), weights)
    assert shown.getpixel((26, 3)) > shown.getpixel((3, 26))  # type: ignore[operator]
    with pytest.raises(ValueError, match="square"):
        overlay(shown, torch.ones(10))
