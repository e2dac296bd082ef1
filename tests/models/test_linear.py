"""The Q-Former's linear layers: torch's own, whatever multiplies the matrices.

Proven: values and gradients are those of `F.linear` and `F.gelu`, in every precision, with and
without bias; the gelu is not kept; arithmetic is counted in full; nothing is taken that has no
values or may not be cast.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from blip2_train.models import linear as linears
from blip2_train.models.linear import Linear, gelu_linear, linear


def layer(dtype: torch.dtype = torch.float32) -> Linear:
    torch.manual_seed(0)
    return Linear(12, 7).to(dtype)


def same(ours: Any, theirs: Any, tolerance: float, **autocast: Any) -> None:
    """Values and gradients of two functions of x [3, 5, 12] and a layer."""
    results = []
    for function in (ours, theirs):
        own = layer(torch.float64 if tolerance < 1e-8 else torch.float32)
        x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1)).to(own.weight.dtype)
        x.requires_grad_()
        with torch.autocast("cpu", **(autocast or {"enabled": False})):
            out = function(x, own)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
        (out * weights).sum().backward()
        results.append([out, x.grad, own.weight.grad, own.bias.grad])
    for one, two in zip(*results, strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape
        torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("tolerance", [1e-5, 1e-12])
def test_linear_is_torchs(tolerance: float) -> None:
    same(lambda x, own: own(x), lambda x, own: F.linear(x, own.weight, own.bias), tolerance)
    same(
        lambda x, own: linear(x, own.weight, None) + own.bias,
        lambda x, own: F.linear(x, own.weight) + own.bias,
        tolerance,
    )


@pytest.mark.parametrize("tolerance", [1e-5, 1e-12])
def test_gelu_linear_is_torchs(tolerance: float) -> None:
    same(gelu_linear, lambda x, own: F.linear(F.gelu(x), own.weight, own.bias), tolerance)


@pytest.mark.parametrize("shape", [(12,), (0, 12), (2, 0, 12), (1, 12)])
def test_any_number_of_rows(shape: tuple[int, ...]) -> None:
    own, x = layer(), torch.randn(shape, requires_grad=True)
    for out in (own(x), gelu_linear(x, own)):
        assert out.shape == (*shape[:-1], 7)
        own.zero_grad()
        out.sum().backward()
        assert own.weight.grad is not None and own.weight.grad.isfinite().all()


def test_under_autocast_both_are_torchs() -> None:
    half = {"dtype": torch.bfloat16}
    same(lambda x, own: own(x), lambda x, own: F.linear(x, own.weight, own.bias), 1e-2, **half)
    plain = lambda x, own: F.linear(F.gelu(x.bfloat16()), own.weight, own.bias)  # noqa: E731
    same(gelu_linear, plain, 5e-2, **half)


def test_only_what_the_gelu_is_taken_of_is_kept() -> None:
    own, kept = layer(), []
    x = torch.randn(5, 12, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = gelu_linear(x, own)
    assert sorted(t.data_ptr() for t in kept) == sorted([x.data_ptr(), own.weight.data_ptr()])
    with torch.no_grad():
        torch.testing.assert_close(gelu_linear(x, own), out)


def test_arithmetic_is_counted() -> None:
    own, x = layer(), torch.randn(5, 12, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        own(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * 12 * 7


def test_onednn_takes_only_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "_ONEDNN", True)
    x = torch.randn(2, 3)
    assert linears._suits_onednn(x) and linears._suits_onednn(nn.Parameter(x))
    assert not linears._suits_onednn(x.double())
    assert not linears._suits_onednn(x[:0])
    assert not linears._suits_onednn(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not linears._suits_onednn(x)
    with FakeTensorMode():
        assert not linears._suits_onednn(torch.randn(2, 3))


@pytest.mark.parametrize("weighs", [True, False])
def test_a_frozen_layer_keeps_no_input(weighs: bool) -> None:
    own, kept = layer().requires_grad_(weighs), []
    x = torch.randn(3, 5, 12, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = own(x)
    assert (x.untyped_storage().data_ptr() in kept) is weighs
    out.sum().backward()
    assert x.grad is not None and x.grad.allclose(own.weight.sum(dim=0).expand_as(x))
