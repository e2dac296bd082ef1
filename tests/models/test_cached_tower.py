"""Stored tokens: nothing is lost but what 8 bits lose; a cached tower passes them on."""

import pytest
import torch

from blip2_train.models.cached_tower import FLOAT8, STORES, CachedTower, pack, unpack
from blip2_train.models.vision import VisionTower


def made_up_tokens(*shape: int) -> torch.Tensor:
    """With a few channels a hundred times as large, as trained towers have them."""
    tokens = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    tokens[..., ::17] *= 100
    return tokens


@pytest.mark.parametrize("store", ["float32", "bfloat16"])
def test_a_store_of_floats_keeps_what_it_can_hold(store: str) -> None:
    dtype = getattr(torch, store)
    tokens = made_up_tokens(2, 5, 48).to(dtype)
    packed = pack(tokens, store)
    assert packed.dtype == dtype and unpack(packed, dtype).equal(tokens)


def test_float8_keeps_each_number_to_its_precision() -> None:
    tokens = made_up_tokens(2, 5, 48)
    tokens[1, 2] = 0  # as of an image that cannot be used
    packed = pack(tokens, "float8")
    assert packed.dtype == torch.uint8 and packed.shape == (2, 5, 48 + 4)
    back = unpack(packed, torch.float32)
    # e4m3: three bits behind the leading one; below 2^-6 of the scaled number steps are 2^-9
    scale = tokens.abs().amax(dim=-1, keepdim=True) / torch.finfo(FLOAT8).max
    assert ((back - tokens).abs() <= tokens.abs() / 16 + scale * 2**-10).all()
    assert back[1, 2].eq(0).all()
    cosine = torch.cosine_similarity(back, tokens, dim=-1)[:, :2]
    assert cosine.min() > 0.998
    assert unpack(packed[1], torch.bfloat16).equal(back[1].bfloat16())  # a row at a time


@pytest.mark.parametrize("store", STORES)
def test_it_stands_where_the_tower_did(store: str) -> None:
    tower = VisionTower("test_vit", image_size=32, weights="random")
    cached = CachedTower(
        tower.name, tower.weights, tower.digest(),
        image_size=tower.image_size, num_tokens=tower.num_tokens, width=tower.width,
        dtype=tower.dtype, blank=pack(tower.blank(), store),
    )  # fmt: skip
    tokens = tower(torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8))
    passed = cached(pack(tokens, store))
    assert passed.dtype == tower.dtype and passed.shape == tokens.shape
    close = {"float32": 0, "bfloat16": 2**-8, "float8": 2**-4}[store]
    torch.testing.assert_close(passed, tokens, rtol=close, atol=close * 0.1)
    torch.testing.assert_close(cached.blank(), tower.blank(), rtol=close, atol=close * 0.1)
    assert cached(cached.made_up(2)).shape == (2, tower.num_tokens, tower.width)
    assert cached.digest() == tower.digest()
    assert not cached.state_dict() and cached.dtype == tower.dtype
    assert cached.double()(pack(tokens, store)).dtype == torch.float64  # trainer.precision=64-true
