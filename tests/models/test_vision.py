"""The frozen image tower.

Proven: any timm vision transformer, convolutional net (CLIP ResNets before their attention pooling)
or channels-last model gives tokens in reading order; dropping the last block gives the second last
block's output and is refused where there is none; other image sizes work, with interpolated
positions; weights come from a local file completely or not at all; what cannot be had is named in
a UserError; random weights depend on the seed alone and disturb nobody's random numbers; the tower
stays frozen; uint8 images are normalised as torchvision does it; the digest sees one changed
weight; autocast does not change the features.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchvision.transforms import v2

from blip2_train.errors import UserError
from blip2_train.models.vision import VisionTower, image_tokens, normalise

B = 2


def images(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, 3, size, size, generator=generator)


def tower(name: str = "test_vit", **options: Any) -> VisionTower:
    return VisionTower(name, **({"weights": "random"} | options))


@pytest.mark.parametrize(
    ("name", "size", "tokens", "width"),
    [
        ("test_vit", 64, 17, 64),  # class token and 4 x 4 patches
        ("test_vit3", 64, 17, 96),  # registers and pooling by attention
        ("vit_tiny_patch16_224", 96, 37, 192),
        ("eva02_tiny_patch14_224", 42, 10, 192),  # rotary positions
    ],
)
def test_transformers(name: str, size: int, tokens: int, width: int) -> None:
    vision = tower(name, image_size=size)
    features = vision(images(size))
    assert features.shape == (B, tokens, width) == (B, vision.num_tokens, vision.width)
    assert features.isfinite().all() and not features[0].equal(features[1])


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
@torch.no_grad()
def test_the_last_block_is_dropped(name: str) -> None:
    whole = tower(name, drop_last_block=False)
    vision = tower(name)  # the same seed, so the same weights
    blocks = len(whole.tower.blocks)
    assert len(vision.tower.blocks) == blocks - 1
    image = images(vision.image_size)
    wanted = whole.tower.forward_intermediates(
        image,
        indices=[blocks - 2],
        norm=False,
        output_fmt="NLC",
        return_prefix_tokens=True,
        intermediates_only=True,
    )
    ((patches, prefix),) = wanted
    torch.testing.assert_close(vision(image), torch.cat([prefix, patches], dim=1))
    assert whole(image).shape == vision(image).shape
    assert not whole(image).allclose(vision(image), atol=1e-2)


# Convolutional, hybrid, hierarchical and attention-free towers have no such block.
@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "swin_tiny_patch4_window7_224", "hiera_tiny_224"]
)
def test_only_transformers_have_a_last_block(name: str) -> None:
    with torch.device("meta"), pytest.raises(UserError) as error:
        tower(name)
    assert name in str(error.value) and "vision.drop_last_block=false" in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_resnet", "test_byobnet", "test_convnext"])
def test_convolutional_maps_become_tokens_in_reading_order(name: str) -> None:
    vision = tower(name, drop_last_block=False, image_size=96)
    image = images(96)
    feature_map = vision.tower.forward_features(image)
    _, channels, height, width = feature_map.shape
    tokens = vision(image)
    assert tokens.shape == (B, height * width, channels)
    for row, column in ((0, 0), (0, 2), (2, 1)):
        assert tokens[:, row * width + column].equal(feature_map[:, :, row, column])


@torch.no_grad()
def test_clip_resnets_give_the_map_before_pooling() -> None:
    vision = tower("resnet50_clip", drop_last_block=False, image_size=64)
    assert type(vision.tower.head).__name__ == "AttentionPool2d"
    tokens = vision(images(64))
    assert tokens.shape == (B, 2 * 2, 2048)
    feature_map = vision.tower.stages(vision.tower.stem(images(64)))
    assert tokens[:, 1].equal(feature_map[:, :, 0, 1])


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_mambaout", "swin_tiny_patch4_window7_224"])
def test_channels_last_maps_become_tokens_in_reading_order(name: str) -> None:
    vision = tower(name, drop_last_block=False, image_size=224)
    feature_map = vision.tower.forward_features(images(224)[:1])
    _, height, width, channels = feature_map.shape
    assert height == width == 7 != channels
    tokens = vision(images(224)[:1])
    assert tokens.shape == (1, 49, channels) == (1, vision.num_tokens, vision.width)
    assert tokens[0, 1 * 7 + 3].equal(feature_map[0, 1, 3])


def test_towers_that_do_not_fit_are_refused() -> None:
    with torch.device("meta"):
        with pytest.raises(UserError, match="several feature maps"):
            tower("coat_tiny", drop_last_block=False)
        with pytest.raises(UserError, match=r"vision.image_size=100 does not suit test_vit"):
            tower("test_vit", image_size=100)


# -- weights ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """Stands for downloaded weights: the whole model of the published size, with its classifier."""
    torch.manual_seed(5)
    state = timm.create_model("test_vit").state_dict()
    assert "head.weight" in state and state["pos_embed"].shape == (1, 101, 64)
    return state


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file(
    published: dict[str, torch.Tensor], tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(published, path)
    vision = tower(weights=str(path))
    for name, value in vision.tower.state_dict().items():
        assert value.equal(published[name]), name
    assert "blocks.5.mlp.fc1.weight" in published and len(vision.tower.blocks) == 5


@torch.no_grad()
def test_positions_are_interpolated(published: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(published, path)
    vision = tower(weights=str(path), image_size=224)
    assert (vision.image_size, vision.num_tokens) == (224, 1 + 14 * 14)
    image = images(224)
    theirs = timm.create_model("test_vit", img_size=224, num_classes=0)
    position = interpolated(published["pos_embed"], 14)
    state = {k: v for k, v in published.items() if not k.startswith("head.")}
    theirs.load_state_dict(state | {"pos_embed": position}, strict=True)
    theirs.eval().prune_intermediate_layers([4], prune_norm=True, prune_head=True)
    torch.testing.assert_close(vision(image), image_tokens(theirs, image))
    # not just any positions: the class token's stays, the corners' stay close
    ours = vision.tower.pos_embed
    small = published["pos_embed"]
    assert ours[0, 0].equal(small[0, 0])
    assert torch.cosine_similarity(ours[0, 1], small[0, 1], dim=0) > 0.9
    assert torch.cosine_similarity(ours[0, -1], small[0, -1], dim=0) > 0.9


def interpolated(table: torch.Tensor, side: int) -> torch.Tensor:
    """As the reference does it: bicubic, not aligned to corners, the class token's kept."""
    before = round((table.shape[1] - 1) ** 0.5)
    grid = table[:, 1:].unflatten(1, (before, before)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    "kind",
    ["one weight less", "other names", "another model", "garbage", "cut", "a tensor", "code"],
)
def test_a_file_gives_every_weight_or_none(
    published: dict[str, torch.Tensor], tmp_path: Path, kind: str
) -> None:
    path, marker = tmp_path / "weights.pth", tmp_path / "executed"
    contents: dict[str, Any] = {
        "one weight less": {k: v for k, v in published.items() if k != "blocks.2.attn.proj.bias"},
        "other names": {f"encoder.{k}": v for k, v in published.items()},
        "another model": timm.create_model("test_resnet").state_dict(),
        "a tensor": torch.zeros(3),
        "code": {"patch_embed.proj.weight": Malicious(marker)},
    }
    torch.save(contents.get(kind, published), path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:20_000])
    if kind == "garbage":
        path.write_bytes(b"hello" * 100)
    with pytest.raises(UserError, match=r"weights\.pth"):
        tower(weights=str(path))
    assert not marker.exists()


def test_what_only_the_dropped_part_needs_may_be_missing(
    published: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """As in the reference's file of ViT-g, which ends with the second last block."""
    path = tmp_path / "weights.pth"
    kept = {k: v for k, v in published.items() if not k.startswith(("blocks.5.", "norm.", "head."))}
    assert len(kept) < len(published)
    torch.save(kept, path)
    assert tower(weights=str(path)).tower.state_dict().keys() == kept.keys()
    with pytest.raises(UserError, match=r"lacks 14 weights of test_vit"):
        tower(weights=str(path), drop_last_block=False)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("vit_tinny_patch16_224", {}, "vit_tiny_patch16_224"),
        ("test_vit.nobody", {}, "nobody.*r160_in1k"),
        ("test_vit", {"weights": "nowhere/weights.pth"}, "vision.weights=nowhere/weights.pth"),
    ],
)
def test_what_cannot_be_had_is_named(name: str, options: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tower(name, **options)


def test_offline_downloads_fail_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("cannot reach the hub")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    with pytest.raises(UserError, match=r"cannot reach the hub.*set vision.weights to a file"):
        tower(weights="pretrained")


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    one = tower(seed=1)
    assert torch.rand(4).equal(wanted), "the global generator was disturbed"
    two, other = tower(seed=1), tower(seed=2)
    assert one.digest() == two.digest() != other.digest()


def test_the_digest_sees_one_weight() -> None:
    for dtype in ("float32", "bfloat16"):
        vision = tower(dtype=dtype)
        before = vision.digest()
        assert before == vision.digest() and len(before) == 64
        with torch.no_grad():
            vision.tower.blocks[2].mlp.fc1.weight[3, 1] += 1
        assert vision.digest() != before


# -- frozen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "drop"), [("test_vit", True), ("test_resnet", False), ("test_efficientnet", False)]
)
def test_the_tower_stays_frozen(name: str, drop: bool) -> None:
    vision = tower(name, drop_last_block=drop, image_size=64)
    image = images(64)
    before, digest = vision(image), vision.digest()
    vision.train()
    parent = torch.nn.Sequential(vision, torch.nn.Linear(vision.width, 3)).train()
    assert parent.training and not any(module.training for module in vision.modules())
    out = parent(image)
    out.sum().backward()
    assert vision(image).equal(before) and not before.requires_grad
    assert vision.digest() == digest  # with the batch norms' statistics
    assert all(p.grad is None and not p.requires_grad for p in vision.parameters())
    assert parent[1].weight.grad is not None


def test_pixels_are_normalised_as_torchvision_does() -> None:
    mean, std = (0.48, 0.45, 0.40), (0.27, 0.26, 0.28)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (B, 3, 5, 7), generator=generator, dtype=torch.uint8)
    copy = image.clone()
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    torch.testing.assert_close(normalise(image, mean, std), reference(image), atol=1e-6, rtol=0)
    assert image.equal(copy)


def test_bytes_and_normalised_floats_give_the_same() -> None:
    vision = tower(image_size=64)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (B, 3, 64, 64), generator=generator, dtype=torch.uint8)
    assert vision(image).equal(vision(normalise(image, vision.mean, vision.std)))
    cfg = timm.get_pretrained_cfg("test_vit")
    assert (vision.mean, vision.std) == (cfg.mean, cfg.std)


def test_autocast_does_not_reach_the_tower() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        vision = tower(image_size=64, dtype=str(dtype).removeprefix("torch."))
        plain = vision(images(64))
        with torch.autocast("cpu", torch.bfloat16):
            cast = vision(images(64))
        assert plain.dtype == cast.dtype == vision.dtype == dtype
        assert plain.equal(cast)


def test_options_shape_the_model() -> None:
    small = {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32], "output_stride": 8}
    tower = VisionTower(
        "resnet10t", weights="random", image_size=48, drop_last_block=False, options=small
    )
    assert (tower.num_tokens, tower.width) == (36, 32)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"no_such": 1}, "no_such"),
        ({"layers": "many"}, "layers"),
        ({"num_classes": 5}, "may not"),
        ({"checkpoint_path": "stranger.pth"}, "may not"),
    ],
)
def test_wrong_options_are_refused(options: dict, said: str) -> None:
    with pytest.raises(UserError, match=rf"vision\.options.*{said}"):
        VisionTower("resnet10t", weights="random", drop_last_block=False, options=options)
