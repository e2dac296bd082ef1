"""The image tower's linear layers in float8.

Proven on a processor, where torchao computes the same arithmetic slowly: a layer gives the product
of rounded rows and weights, to the rounding of its result, and zero where a row is zero; weights
are those that torchao's own conversion makes; layers of other sizes, convolutions and norms stay;
every way in which timm calls a layer works; the digest stays that of the original weights; the
tower can be moved, counted, compiled and given to DDP; what cannot be is named in a UserError.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from faulty_server import free_port
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from blip2_train.errors import UserError
from blip2_train.models import float8
from blip2_train.models.float8 import quantize_linears, suitable_linears
from blip2_train.models.freezing import parameter_table
from blip2_train.models.vision import VisionTower

pytest.importorskip("torchao")

LARGEST = 448.0  # of e4m3


def tower(name: str = "test_vit", *, converted: bool = True, **options: Any) -> VisionTower:
    settings = {"weights": "random", "dtype": "bfloat16", "precision": "float8", "image_size": 32}
    vision = VisionTower(name, **(settings | options))
    if converted:
        vision.convert()
    return vision


def images(size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, size, size), generator=generator, dtype=torch.uint8)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in e4m3 and their scales, both float64; the scales are rounded to bfloat16 first."""
    scale = (x.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=1e-30)
    return (x.float() / scale.float()).clamp(-LARGEST, LARGEST).to(
        torch.float8_e4m3fn
    ).double(), scale.double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inner", "outer", "rows"), [(64, 48, 35), (352, 1408, 5), (16, 16, 1)])
@torch.no_grad()
def test_a_layer_is_the_product_of_what_was_rounded(
    inner: int, outer: int, rows: int, bias: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(inner, outer, bias=bias).bfloat16()
    x = torch.randn(3, rows, inner).bfloat16()
    x[..., 2] *= 50  # an outlier channel, and a long token
    x[0] *= 50
    (a, a_scale), (b, b_scale) = rounded(x), rounded(layer.weight)
    wanted = (a @ b.T) * a_scale * b_scale.T
    if bias:
        wanted = wanted + layer.bias.double()
    exact = F.linear(x, layer.weight, layer.bias)
    quantize_linears(layer)
    out = layer(x)
    assert out.dtype == torch.bfloat16 and out.shape == (3, rows, outer)
    # bfloat16's rounding of the result; sums that cancel have the error of float32's
    torch.testing.assert_close(out.double(), wanted, rtol=2**-8, atol=1e-4 * wanted.abs().max())
    assert not out.equal(exact)


@torch.no_grad()
def test_rows_of_zeros_give_zeros() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16).bfloat16()
    layer.weight[3] = 0
    x = torch.randn(4, 32).bfloat16()
    x[1] = 0
    bias = layer.bias.clone()
    quantize_linears(layer)
    out = layer(x)
    assert out.isfinite().all() and out[1].equal(bias) and (out[:, 3] == bias[3]).all()
    quantize_linears(zero := nn.Linear(16, 16).bfloat16().requires_grad_(False))
    assert zero(torch.zeros(0, 16, dtype=torch.bfloat16)).shape == (0, 16)


@torch.no_grad()
def test_torchao_makes_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        quant_api,
        quantize_,
    )

    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda _: None)
    torch.manual_seed(0)
    ours, theirs = nn.Linear(64, 32).bfloat16(), nn.Linear(64, 32).bfloat16()
    theirs.load_state_dict(ours.state_dict())
    quantize_linears(ours)
    # inductor's options and torch's precision of float32 products would be set for all tests
    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), set_inductor_config=False
    )
    quantize_(theirs, config)
    a, b = ours.weight, theirs.weight
    assert type(a.data) is type(b.data)
    assert a.qdata.view(torch.uint8).equal(b.qdata.view(torch.uint8)) and a.scale.equal(b.scale)
    assert (a.block_size, a.mm_config, a.kernel_preference, a.dtype) == (
        b.block_size, b.mm_config, b.kernel_preference, b.dtype,
    )  # fmt: skip
    assert a.act_quant_kwargs.granularity == b.act_quant_kwargs.granularity
    assert a.act_quant_kwargs.float8_dtype == b.act_quant_kwargs.float8_dtype
    x = torch.randn(5, 64).bfloat16()
    assert ours(x).equal(theirs(x))


def test_only_linear_layers_of_fitting_sizes_are_converted() -> None:
    vision = tower("vit_tiny_patch16_224", options={"depth": 3, "mlp_ratio": 4.05})
    assert vision.tower.blocks[0].mlp.fc1.out_features == 777
    converted = {name for name, p in vision.named_parameters() if hasattr(p, "qdata")}
    assert converted == {
        f"tower.blocks.{block}.attn.{layer}.weight" for block in (0, 1) for layer in ("qkv", "proj")
    }
    assert len(suitable_linears(vision)) == 4
    assert vision(images()).isfinite().all()


# EVA's and BEiT's biases of queries and values are parameters of their own, as ViT-g's are.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_vit", {}),
        ("test_vit3", {}),
        ("eva_giant_patch14_clip_224", {"embed_dim": 64, "num_heads": 2, "depth": 3}),
        ("eva02_tiny_patch14_224", {"depth": 3}),
        ("beit_base_patch16_224", {"embed_dim": 64, "num_heads": 2, "depth": 3}),
    ],
)
def test_features_are_nearly_the_native_ones(name: str, options: dict[str, int]) -> None:
    size = 42 if "14" in name else 224 if "beit" in name else 32
    vision = tower(name, converted=False, image_size=size, options=options)
    for parameter in vision.parameters():  # biases matter
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    image = images(size)
    native = vision(image)
    digest = vision.digest()
    vision.convert()
    features = vision(image)
    assert features.dtype == torch.bfloat16 and not features.equal(native)
    similarity = F.cosine_similarity(features.float(), native.float(), dim=-1)
    assert similarity.min() > 0.99
    assert vision.digest() == digest
    vision.convert()  # once is enough
    assert vision(image).equal(features) and vision.digest() == digest


def test_the_digest_is_that_of_the_original_weights() -> None:
    assert tower().digest() == tower(precision="native").digest() != tower(seed=1).digest()


def test_native_towers_stay_as_they_are() -> None:
    vision = tower(precision="native", dtype="float32")
    assert not any(hasattr(p, "qdata") for p in vision.parameters())


def test_a_converted_tower_is_an_ordinary_frozen_module() -> None:
    vision = tower()
    wanted = vision(images())
    parent = nn.ModuleDict({"vision": vision, "head": nn.Linear(vision.width, 3)})
    parent.train().to("cpu")
    assert vision(images()).equal(wanted)
    assert not any(p.requires_grad for p in vision.parameters()) and not vision.training
    parent["head"](vision(images()).float()).sum().backward()
    assert all(p.grad is None for p in vision.parameters())
    counts = {
        r["dtype"]: r["parameters"] for r in parameter_table(parent) if r["state"] == "frozen"
    }
    assert counts["float8_e4m3fn"] == sum(each.weight.numel() for each in suitable_linears(vision))
    assert sum(counts.values()) == sum(p.numel() for p in tower(converted=False).parameters())
    assert {p.device.type for p in vision.to("meta").parameters()} == {"meta"}


def test_its_arithmetic_is_counted() -> None:
    counts = []
    for vision in (tower(), tower(precision="native")):
        with FlopCounterMode(display=False) as counter:
            vision(images())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_its_blocks_compile_without_a_break() -> None:
    for name, options in (("test_vit", {}), ("eva02_tiny_patch14_224", {"depth": 3})):
        vision = tower(name, image_size=28 if options else 32, options=options)
        image = images(vision.image_size)
        wanted = vision(image)
        for block in vision.tower.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(vision(image), wanted, rtol=0.02, atol=0.02)
        torch._dynamo.reset()


def test_ddp_leaves_it_alone() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = tower()
            self.head = nn.Linear(self.vision.width, 2)
            self._ddp_params_and_buffers_to_ignore = [
                f"vision.{name}" for name, _ in self.vision.named_parameters()
            ]

        def forward(self, image: Tensor) -> Tensor:
            return self.head(self.vision(image).float())

    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1
    )
    try:
        model = DistributedDataParallel(Model())
        model(images()).sum().backward()
        assert model.module.head.weight.grad is not None
    finally:
        dist.destroy_process_group()


# -- what cannot be had ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float32"}, "vision.dtype=float32; set vision.dtype=bfloat16"),
        ({"precision": "float16"}, "vision.precision=float16 must be one of native, float8"),
        ({"name": "test_resnet", "drop_last_block": False}, "test_resnet has no linear layer"),
    ],
)
def test_what_does_not_suit_is_refused(options: dict[str, Any], said: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=said):
        tower(**options)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"needs torchao; pip install 'blip2-train\[torchao\]'"):
        tower(converted=False)


@pytest.mark.parametrize("capability", [(7, 0), (8, 0), (8, 6)])
def test_gpus_without_float8_products_are_refused(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    said = rf"Old GPU has {capability[0]}\.{capability[1]}; set vision.precision=native"
    with pytest.raises(UserError, match=said):
        float8.check_device(torch.device("cuda", 0))


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)])
def test_newer_gpus_are_not(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    float8.check_device(torch.device("cuda", 0))
