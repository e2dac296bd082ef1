"""The image tower where it is trained.

Proven: its gradient is the derivative of the losses of both stages, by differences, and in stage 1
that of the textbook's step behind a tower written out; blocks recomputed, and parts of a cached
batch, give the same and keep less; it computes in eval mode, under autocast with float32 weights;
what its features do not depend on is frozen; its layers are numbered as the reference numbers them;
positions are fitted to other image sizes; DDP watches it.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import PATCHES, VOCAB, loss_config, tiny_batch
from torch import Tensor, nn

from blip2_train.benchmarks.textbook import textbook_step
from blip2_train.config import plan_batch
from blip2_train.distributed import World
from blip2_train.errors import UserError
from blip2_train.models.counting import saved_bytes
from blip2_train.models.freezing import freeze_unreached
from blip2_train.models.qformer import QFormer
from blip2_train.models.stage1 import Blip2Stage1
from blip2_train.models.stage2 import Blip2Stage2
from blip2_train.models.tower_training import layers_of
from blip2_train.models.vision import VisionTower
from blip2_train.training.objectives import stage1_step
from blip2_train.training.optimizer import parameter_groups
from blip2_train.training.stage1 import Stage1Module
from blip2_train.training.stage2 import stage2_step

B = 6
WIDTH = 64  # of test_vit


def tower(name: str = "test_vit", **options: Any) -> VisionTower:
    given = {"weights": "random", "image_size": 32, "trainable": True} | options
    return VisionTower(name, **given)


def images(count: int = B, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def model_of(vision: VisionTower) -> Blip2Stage1:
    """A tower with a Q-Former of width 16 behind it, in float64."""
    torch.manual_seed(0)
    qformer = QFormer(
        vocab_size=VOCAB, vision_width=vision.width, hidden_size=16, num_layers=3, num_heads=2,
        intermediate_size=24, num_query_tokens=4, max_positions=16, dropout=0.0,
    )  # fmt: skip
    for parameter in qformer.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    model = Blip2Stage1(vision, qformer, dec_token_id=VOCAB - 1, end_token_id=3, embed_dim=6)
    return model.double()


def stage1_loss(model: Blip2Stage1, gradient: str = "full", parts: int = 1) -> Tensor:
    batch = tiny_batch(B)
    negatives = torch.arange(B).roll(1), torch.arange(B).roll(2)
    tokens = model.vision(images())
    config = loss_config(gradient)
    return stage1_step(model, tokens, batch, config, negatives=negatives, parts=parts)["loss"]


class EndsInWords(nn.Module):
    """Stands for a language model: the same loss on whatever it reads, smooth and of one size."""

    width, dtype, is_encoder_decoder, vocab_size = 8, torch.float64, False, 11

    def embed(self, ids: Tensor) -> Tensor:
        return torch.ones(*ids.shape, self.width, dtype=self.dtype)

    def loss_sum(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return inputs_embeds.sin().sum()


def stage2_loss(model: Any) -> Tensor:
    ids = torch.ones(B, 3, dtype=torch.int64)
    index = torch.arange(B * 3)
    batch = {"input_ids": ids, "attention_mask": ids, "lm_index": index, "lm_targets": index}
    return stage2_step(model, model.vision(images()), batch, "global", World())["loss"]


def stage2_model() -> Any:
    first = model_of(tower())
    torch.manual_seed(1)
    return Blip2Stage2(first.vision, first.qformer, EndsInWords()).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [1, 2])
def test_the_gradient_is_the_derivative(stage: int) -> None:
    """Along a random direction of all the tower's weights, by central differences."""
    model = model_of(tower()) if stage == 1 else stage2_model()
    loss: Callable[[], Tensor]
    loss = functools.partial(stage1_loss if stage == 1 else stage2_loss, model)
    loss().backward()
    generator = torch.Generator().manual_seed(0)
    weights = list(model.vision.parameters())
    step = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
    slope = sum((w.grad * d).sum() for w, d in zip(weights, step, strict=True))  # type: ignore[operator]
    values = []
    with torch.no_grad():
        for sign in (1, -2):  # to one side, then to the other
            for weight, direction in zip(weights, step, strict=True):
                weight.add_(sign * 1e-7 * direction)
            values.append(loss().item())
    assert abs(float(slope)) > 1e-2
    assert float(slope) == pytest.approx((values[0] - values[1]) / 2e-7, rel=1e-6)


def written_out(vision: VisionTower, image: Tensor) -> Tensor:
    """A vision transformer's blocks one after the other, [B, 3, 32, 32] -> [B, P, Dv]."""
    vit: Any = vision.tower
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (vision.mean, vision.std))
    pixels = ((image / 255 - mean) / std).double()
    patches = vit.patch_embed.proj(pixels).flatten(2).mT
    x = torch.cat([vit.cls_token.expand(len(image), -1, -1), patches], dim=1) + vit.pos_embed
    for block in vit.blocks:
        attention = block.attn
        q, k, v = attention.qkv(block.norm1(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        x = x + block.ls1(attention.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)))
        mlp = block.mlp
        x = x + block.ls2(mlp.fc2(nn.functional.gelu(mlp.fc1(block.norm2(x)))))
    return x


def test_the_gradient_is_that_of_the_textbook() -> None:
    """Which takes its losses in float32."""
    gradients = []
    uniform = torch.rand(2, B, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch, config = tiny_batch(B), loss_config()
    for textbook in (False, True):
        model = model_of(tower())
        if textbook:
            tokens = written_out(model.vision, images())  # type: ignore[arg-type]
            out = textbook_step(model, tokens, batch, config, uniform)
        else:
            out = stage1_step(model, model.vision(images()), batch, config, uniform=uniform)
        out["loss"].backward()
        gradients.append({k: p.grad for k, p in model.vision.named_parameters()})
    largest = max(g.abs().max().item() for g in gradients[1].values() if g is not None)
    assert largest > 1e-3
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradients[1][name] is not None
        gap = (gradient - gradients[1][name]).abs().max().item()  # type: ignore[operator]
        assert gap <= 1e-5 * largest, name


@pytest.mark.parametrize(
    ("name", "drop"), [("test_vit", True), ("eva02_tiny_patch14_224", True), ("test_resnet", False)]
)
def test_recomputed_blocks_give_the_same_and_keep_less(name: str, drop: bool) -> None:
    found, kept = [], []
    for checkpointing in (False, True):
        vision = tower(
            name, image_size=56 if "patch14" in name else 64, drop_last_block=drop,
            gradient_checkpointing=checkpointing,
        ).double()  # fmt: skip
        image = images(3, vision.image_size)
        loss = functools.partial(lambda vision, image: vision(image).sin().sum(), vision, image)
        kept.append(saved_bytes(loss, vision.parameters()))
        loss().backward()
        found.append({k: p.grad for k, p in vision.named_parameters()})
    for key, gradient in found[0].items():
        assert (gradient is None) == (found[1][key] is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, found[1][key], atol=1e-12, rtol=1e-12, msg=key)
    assert kept[1] < 0.8 * kept[0]


def test_parts_of_a_cached_batch_forget_the_tower() -> None:
    """As much of it is kept as of a frozen one: the tokens."""
    found, kept = [], []
    for parts in (1, 3):
        model = model_of(tower())
        module = Stage1Module(
            model, loss=loss_config("full"), seed=0, optimizer={}, schedule={},
            batch=plan_batch(B, parts, 1, cache=parts > 1),
        )  # fmt: skip
        tokens = module.image_tokens(images())
        batch = tiny_batch(B)
        given = torch.arange(B).roll(1), torch.arange(B).roll(2)
        step = stage1_step(model, tokens, batch, module.loss, negatives=given, parts=parts)
        step["loss"].backward()
        found.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
        make = functools.partial(module.image_tokens, images())
        kept.append(saved_bytes(make, model.parameters()))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-10, rtol=1e-8, msg=name)
    assert kept[1] <= images().nbytes < 0.1 * kept[0]


def test_it_computes_as_in_evaluation() -> None:
    """Whatever `.train()` says: with dropout in its options nothing is dropped."""
    options = {"proj_drop_rate": 0.5, "drop_path_rate": 0.5, "pos_drop_rate": 0.5}
    vision, plain = tower(options=options), tower()
    model = nn.Sequential(vision).train()
    assert model.training and not any(part.training for part in vision.modules())
    assert vision(images()).equal(plain(images()))
    assert vision(images()).requires_grad
    frozen = tower(trainable=False)
    assert frozen(images()).equal(plain(images())) and not frozen(images()).requires_grad


def test_batch_norms_keep_their_statistics() -> None:
    vision = tower("test_resnet", drop_last_block=False, image_size=64).train()
    before = {name: buffer.clone() for name, buffer in vision.named_buffers()}
    vision(images(size=64)).sum().backward()
    assert before and all(b.equal(before[name]) for name, b in vision.named_buffers())


def test_autocast_computes_and_float32_learns() -> None:
    vision = tower()
    plain = vision(images())
    with torch.autocast("cpu", torch.bfloat16):
        cast = vision(images())
    assert not cast.float().equal(plain) and cast.float().allclose(plain, atol=0.1)
    cast.float().sum().backward()
    for name, parameter in vision.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "drop", "unread"),
    [
        ("test_vit", True, r"^$"),
        ("test_vit3", False, r"tower\.attn_pool\."),
        ("resnet50_clip", False, r"tower\.head\."),
        ("test_convnext", False, r"tower\.head\.norm\."),
    ],
)
def test_what_features_do_not_depend_on_is_frozen(name: str, drop: bool, unread: str) -> None:
    vision = tower(name, drop_last_block=drop, image_size=64)
    for key, parameter in vision.named_parameters():
        assert parameter.requires_grad is (re.match(unread, key) is None), key
    vision(images(2, 64)).square().sum().backward()
    for key, parameter in vision.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, key


def test_no_rehearsal_freezes_it() -> None:
    """A made-up batch may begin behind the tower."""
    model = model_of(tower())
    module = Stage1Module(
        model, loss=loss_config(lm=0.0), seed=0, optimizer={}, schedule={},
        batch=plan_batch(B, 1, 1),
    )  # fmt: skip
    unreached = freeze_unreached(model, module.rehearsal_loss)
    assert unreached and all(name.startswith("qformer.lm_head.") for name in unreached)
    assert all(p.requires_grad for p in model.vision.parameters())


def test_ddp_watches_what_is_trained() -> None:
    for trainable in (False, True):
        module = Stage1Module(
            model_of(tower("test_resnet", drop_last_block=False, trainable=trainable)),
            loss=loss_config(), seed=0, optimizer={}, schedule={}, batch=plan_batch(B, 1, 1),
        )  # fmt: skip
        ignored = set(module._ddp_params_and_buffers_to_ignore)
        weights = {f"model.vision.{name}" for name, _ in module.model.vision.named_parameters()}
        buffers = {f"model.vision.{name}" for name, _ in module.model.vision.named_buffers()}
        assert buffers and ignored == (buffers if trainable else weights | buffers)


# -- layers ----------------------------------------------------------------------------------------


def reference_layer(name: str, blocks: int) -> int:
    """How the reference numbers the layers of ViT-g."""
    if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return blocks


@pytest.mark.parametrize(
    ("name", "blocks", "options"),
    [
        ("eva_giant_patch14_clip_224.laion400m", 39, {}),
        ("vit_large_patch14_clip_quickgelu_224.openai", 23, {}),
        ("test_vit", 6, {"drop_last_block": False}),  # with a norm behind its blocks
    ],
)
def test_layers_are_the_reference_s(name: str, blocks: int, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        vision = tower(name, image_size=None, **options)
    layers = layers_of(name, vision.tower)
    assert layers.keys() == {key for key, _ in vision.tower.named_parameters()}
    for key, layer in layers.items():
        # the norm in front of CLIP's blocks is not among the reference's names for ViT-g
        wanted = 0 if key.startswith("norm_pre") else reference_layer(key, blocks)
        assert layer == wanted, key


def test_groups_scale_the_tower_alone() -> None:
    model = model_of(tower(drop_last_block=False))
    groups = parameter_groups(model, 0.05, 0.5)
    names = {p: n for n, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names.pop(parameter)
            layer = reference_layer(name.removeprefix("vision.tower."), 6)
            scale = 0.5 ** (7 - layer) if name.startswith("vision.") else 1.0
            assert group["lr_scale"] == scale, name
            bare = parameter.ndim == 1 or name.endswith(".bias")
            assert group["weight_decay"] == (0.0 if bare else 0.05), name
    assert names == {}
    assert [g["lr_scale"] for g in parameter_groups(model, 0.05)] == [1.0, 1.0]


def test_a_model_whose_layers_timm_does_not_know() -> None:
    model = model_of(tower("test_resnet", drop_last_block=False))
    model.vision.tower.group_matcher = None  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"optimizer\.layer_decay=1"):
        parameter_groups(model, 0.05, 0.9)


# -- image size ------------------------------------------------------------------------------------


def test_positions_are_fitted() -> None:
    small, large = tower(), tower(image_size=64)
    table = small.state_dict()["tower.pos_embed"]
    assert table.shape == (1, PATCHES, WIDTH)
    fitted = large.fitted("tower.pos_embed", table)
    grid = table[0, 1:].T.view(1, WIDTH, 2, 2)
    wanted = nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False)
    assert fitted.shape == (1, 17, WIDTH) and fitted[0, 0].equal(table[0, 0])
    assert fitted[0, 1:].equal(wanted.view(WIDTH, 16).T)
    assert small.fitted("tower.pos_embed", table) is table
    assert large.fitted("tower.cls_token", table) is table
    for other in (torch.zeros(1, 4, WIDTH), torch.zeros(1, 5, 3), torch.zeros(2)):
        assert large.fitted("tower.pos_embed", other) is other  # and refused by its shape
