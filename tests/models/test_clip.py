"""The two encoders of stage 0.

Proven: vision transformers, convolutional nets and CLIP ResNets give one vector per image, pooled
as asked; images are normalised as the frozen tower does it; random weights depend on the seed alone
and disturb nobody's random numbers; sin-cos positions go to the patches, remain trainable and keep
the order of the patches; checkpointing changes no gradient; the saved tower gives the frozen
tower's features, with and without its last block, and training can start from it; a file is there
whole or not at all; a text's vector is the state of its last [SEP], which sees all of the text and
nothing after it, whatever the ids of [SEP] and padding; what cannot be had is named in a UserError.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from blip2_train.errors import UserError
from blip2_train.models import clip
from blip2_train.models.clip import Clip, ImageEncoder, TextEncoder
from blip2_train.models.freezing import freeze_unreached
from blip2_train.models.vision import VisionTower, image_tokens

B, E, VOCAB, END = 2, 6, 23, 3


def images(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (B, 3, size, size), generator=generator, dtype=torch.uint8)


def text_encoder(**changes: Any) -> TextEncoder:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 24}
    encoder = TextEncoder(
        **({"vocab_size": VOCAB, "end_token_id": END, "max_positions": 9} | sizes | changes)
    )
    for parameter in encoder.parameters():  # larger weights: everything then matters
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return encoder


def tiny_clip(name: str = "test_vit", **options: Any) -> Clip:
    return Clip(ImageEncoder(name, **options), text_encoder(), embed_dim=E)


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "width"),
    [
        ("test_vit", 64, 64),
        ("test_vit3", 64, 96),  # registers and pooling by attention
        ("eva02_tiny_patch14_224", 42, 192),  # rotary positions
        ("test_resnet", 96, 96),
        ("test_byobnet", 96, 256),
        ("test_mambaout", 64, 64),  # channels last, and a head of another width
    ],
)
@torch.no_grad()
def test_one_vector_per_image(name: str, size: int, width: int) -> None:
    image = images(size)
    for pool in ("head", "max", "mean"):
        encoder = ImageEncoder(name, image_size=size, pool=pool).eval()
        vector = encoder(image)
        assert vector.shape == (B, encoder.width) and vector.isfinite().all(), pool
        assert not vector[0].equal(vector[1]) and vector.dtype == encoder.dtype == torch.float32
        pixels = clip.normalise(image, encoder.mean, encoder.std)
        assert vector.equal(encoder(pixels))
        tokens = image_tokens(encoder.tower, pixels)
        if pool == "head":
            torch.testing.assert_close(vector, encoder.tower(pixels))
        else:
            assert encoder.width == width
            wanted = tokens.max(dim=1).values if pool == "max" else tokens.mean(dim=1)
            torch.testing.assert_close(vector, wanted)


def test_clip_resnets_pool_by_attention() -> None:
    with torch.device("meta"):
        encoder = ImageEncoder("resnet50_clip.openai", pool="head")
    assert type(encoder.tower.head).__name__ == "AttentionPool2d"
    assert encoder.image_size == 224 and encoder.width == 2048
    assert encoder.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_the_whole_tower_is_trained() -> None:
    encoder = ImageEncoder("test_resnet", image_size=64, pool="head")
    assert all(module.training for module in encoder.modules())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in encoder.parameters())
    encoder(images(64)).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    one = ImageEncoder("test_vit", image_size=64, position="sincos", gradient_checkpointing=True)
    assert torch.rand(4).equal(wanted), "the global generator was disturbed"
    again = ImageEncoder("test_vit", image_size=64, position="sincos").tower.state_dict()
    other = ImageEncoder("test_vit", image_size=64, seed=1).tower.state_dict()
    for key, value in one.tower.state_dict().items():
        assert value.equal(again[key]), key
    assert not other["blocks.0.attn.qkv.weight"].equal(again["blocks.0.attn.qkv.weight"])


def test_sincos_positions() -> None:
    plain = ImageEncoder("test_vit", image_size=64).tower
    tower = ImageEncoder("test_vit", image_size=64, position="sincos").tower
    differing = [k for k, v in tower.state_dict().items() if not v.equal(plain.state_dict()[k])]
    assert differing == ["pos_embed"] and tower.pos_embed.requires_grad
    assert tower.pos_embed[0, 0].equal(plain.pos_embed[0, 0])  # the class token's
    table = tower.pos_embed[0, 1:].detach().view(4, 4, 64)
    # sines and cosines of one number have the same length everywhere
    torch.testing.assert_close(table.norm(dim=-1), torch.full((4, 4), 0.5 * (64 / 2) ** 0.5))
    half = table.view(4, 4, 2, 2, 16)  # sine or cosine, of the row or of the column, frequency
    torch.testing.assert_close(half[:, :, :, 0], half.transpose(0, 1)[:, :, :, 1])
    assert half[1, :, :, 0].equal(half[1, :1, :, 0].expand(4, -1, -1))
    nearness = torch.einsum("ijd,d->ij", table, table[0, 0])
    assert (nearness.diff(dim=0) < 0).all() and (nearness.diff(dim=1) < 0).all()


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        encoder = ImageEncoder(name, image_size=64, gradient_checkpointing=checkpointing)
        encoder(images(64)).square().sum().backward()
        gradients.append({k: p.grad for k, p in encoder.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], msg=key)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_checkpointing_can_be_switched(name: str) -> None:
    def flops(encoder: ImageEncoder) -> int:
        with FlopCounterMode(display=False) as counter:
            encoder(images(64)).sum().backward()
        return counter.get_total_flops()

    plain = ImageEncoder(name, image_size=64)
    lean = ImageEncoder(name, image_size=64, gradient_checkpointing=True)
    usual, more = flops(plain), flops(lean)
    assert more > usual
    for on in (False, True):
        lean.gradient_checkpointing = plain.gradient_checkpointing = on
        assert lean.gradient_checkpointing is on
        assert flops(lean) == flops(plain) == (more if on else usual)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("vit_tinny_patch16_224", {}, r"image_encoder\.name=.*vit_tiny_patch16_224"),
        ("test_vit", {"weights": "nowhere.pth"}, r"image_encoder\.weights=nowhere\.pth"),
        ("test_vit", {"image_size": 100}, r"image_encoder\.image_size=100 does not suit test_vit"),
        ("test_vit", {"pool": "min"}, r"image_encoder\.pool=min.*head, max, mean"),
        ("coat_tiny", {}, r"image_encoder: .*several feature maps"),
        ("test_vit", {"position": "fixed"}, r"image_encoder\.position=fixed.*learned, sincos"),
        ("test_resnet", {"position": "sincos"}, r"test_resnet .* image_encoder\.position=learned"),
        ("hiera_tiny_224", {"position": "sincos"}, r"image_encoder\.position=learned"),
        ("vgg11", {"gradient_checkpointing": True}, r"checkpointing=true is not .* with vgg11"),
    ],
)
def test_what_cannot_be_had_is_named(name: str, options: dict[str, Any], said: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=said):
        ImageEncoder(name, **options)


# -- the saved tower -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "drops", "pool"),
    [
        ("test_vit", 64, (True, False), "max"),
        ("test_vit", None, (True,), "head"),
        ("test_vit3", 64, (True, False), "mean"),  # its attention pooling is saved untrained
        ("eva02_tiny_patch14_224", 42, (True, False), "max"),
        ("test_resnet", 64, (False,), "max"),
        ("resnet50_clip.openai", 64, (False,), "head"),
    ],
)
def test_the_saved_tower_is_the_frozen_one(
    tmp_path: Path, name: str, size: int | None, drops: tuple[bool, ...], pool: str
) -> None:
    model = tiny_clip(name, image_size=size, pool=pool)
    encoder = model.image_encoder
    image = images(encoder.image_size)
    unreached = freeze_unreached(model.image_encoder, lambda: encoder(image).sum())
    assert any("attn_pool" in key for key in unreached) is (name == "test_vit3")
    with torch.no_grad():
        encoder.tower.to(memory_format=torch.channels_last)  # safetensors needs them contiguous
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    path = tmp_path / "made" / "tower.safetensors"
    model.save_tower(path)
    assert [file.name for file in path.parent.iterdir()] == ["tower.safetensors"]
    (tmp_path / "ordinary").touch()
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    ordinary = timm.create_model(name, num_classes=0, img_size=size) if "vit" in name else None
    assert ordinary is None or load_file(path).keys() == ordinary.state_dict().keys()

    model.eval()
    pixels = clip.normalise(image, encoder.mean, encoder.std)
    for drop in drops:
        frozen = VisionTower(name, weights=str(path), image_size=size, drop_last_block=drop)
        assert (frozen.mean, frozen.std) == (encoder.mean, encoder.std)
        assert frozen.image_size == encoder.image_size
        with torch.no_grad():
            wanted = image_tokens(encoder.tower, pixels)
            if drop:
                ((patches, prefix),) = encoder.tower.forward_intermediates(
                    pixels,
                    indices=[len(encoder.tower.blocks) - 2],
                    norm=False,
                    output_fmt="NLC",
                    return_prefix_tokens=True,
                    intermediates_only=True,
                )
                wanted = torch.cat([prefix, patches], dim=1)
            torch.testing.assert_close(frozen(image), wanted, atol=1e-5, rtol=1e-5)

    again = ImageEncoder(name, weights=str(path), image_size=size, pool=pool).eval()
    for key, value in again.tower.state_dict().items():
        assert value.equal(encoder.tower.state_dict()[key]), key
    with torch.no_grad():
        vector = again(image)
    assert vector.shape == (B, encoder.width) and vector.isfinite().all()
    if pool == "head":
        torch.testing.assert_close(vector, again.tower(pixels))


def test_a_file_of_another_tower_is_refused(tmp_path: Path) -> None:
    model = tiny_clip(image_size=32)
    model.save_tower(tmp_path / "tower.safetensors")
    with pytest.raises(UserError, match=r"image_encoder\.weights=.*weights of test_resnet"):
        ImageEncoder("test_resnet", weights=str(tmp_path / "tower.safetensors"))
    with pytest.raises(UserError, match=r"image_encoder\.position=learned"):
        ImageEncoder(
            "test_vit",
            weights=str(tmp_path / "tower.safetensors"),
            image_size=32,
            position="sincos",
        )


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tower.safetensors"
    path.write_bytes(b"older")

    def full(_: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(clip.os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        tiny_clip(image_size=32).save_tower(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"older"


# -- texts -----------------------------------------------------------------------------------------


def texts(*rows: list[int], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


@torch.no_grad()
def test_a_text_is_the_state_of_its_end() -> None:
    encoder = text_encoder()
    ids, mask = texts([2, 7, END], [2, 9, 8, 11, END], [2, END])
    vector = encoder(ids, mask)
    hidden = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(vector, hidden[[0, 1, 2], [2, 4, 1]])
    # neither padding nor its length matter
    for row, length in enumerate((3, 5, 2)):
        alone = encoder(ids[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(alone[0], vector[row])
    torch.testing.assert_close(encoder(torch.where(mask == 1, ids, 13), mask), vector)
    # every token before it does, and their order
    for position in range(4):
        changed = ids.clone()
        changed[1, position] = 17
        assert not encoder(changed, mask)[1].allclose(vector[1], atol=1e-3), position
    assert not encoder(ids[:, [0, 2, 1, 3, 4]], mask)[1].allclose(vector[1], atol=1e-3)


@torch.no_grad()
def test_text_is_causal() -> None:
    encoder = text_encoder()
    ids, _ = texts([2, 9, 8, 11, END])
    changed = ids.clone()
    changed[0, 3] = 17
    before, after = (encoder.model(input_ids=i).last_hidden_state[0] for i in (ids, changed))
    torch.testing.assert_close(before[:3], after[:3])
    assert not before[3:].allclose(after[3:], atol=1e-3)


@torch.no_grad()
def test_any_ids_of_end_and_padding() -> None:
    """2 is where transformers looks for the largest id; CLIP's own tokenizer pads with the end."""
    for end, pad in ((2, 0), (2, 2), (22, 22), (5, 1)):
        encoder = text_encoder(end_token_id=end, pad_token_id=pad)
        ids, mask = texts([4, 9, end], [4, 20, 8, end], [4, end, 8, 6, end], pad=pad)
        hidden = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(encoder(ids, mask), hidden[[0, 1, 2], [2, 3, 4]])


def test_every_weight_of_the_text_encoder_learns() -> None:
    encoder = text_encoder()
    encoder(*texts([2, 7, END], [2, 9, 8, END])).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match=r"text_encoder\.hidden_size=16 .*num_heads=3"):
        text_encoder(num_heads=3)


# -- both ------------------------------------------------------------------------------------------


def test_both_end_in_one_space() -> None:
    model = tiny_clip(image_size=32)
    text = texts([2, 7, END], [2, 9, 8, END])
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            image_feat, text_feat = model.encode_image(images(32)), model.encode_text(*text)
        for features in (image_feat, text_feat):
            assert features.shape == (2, E) and features.dtype == torch.float32
            torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    assert model.temp.requires_grad and model.temp.item() == pytest.approx(0.07)
    assert model.image_proj.bias is None and model.text_proj.bias is None


def test_the_caller_seeds_what_is_random() -> None:
    encoder, states = ImageEncoder("test_vit", image_size=32), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        text = TextEncoder(vocab_size=VOCAB, end_token_id=END)
        states.append(Clip(encoder, text, embed_dim=E).state_dict())
    for one, other in itertools.combinations(states, 2):
        same = one is states[0] and other is states[1]
        for key in ("image_proj.weight", "text_proj.weight"):
            assert one[key].equal(other[key]) is same
        key = "text_encoder.model.embeddings.token_embedding.weight"
        assert one[key].equal(other[key]) is same
