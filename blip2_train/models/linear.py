"""Linear layers: `F.linear`, at the processor's full speed and with less memory.

Torch's wheels multiply float32 matrices with MKL, which runs AVX2 code on AMD's processors; oneDNN,
which they hold too, uses AVX-512 where there is one: twice the speed. On any other device, in any
other precision and under a compiler the products are torch's own.

Shapes: [..., I] in, [..., O] out.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

PLAIN = (Tensor, nn.Parameter)


class Linear(nn.Linear):
    """`nn.Linear`, see the top of this file."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`: [..., I], [O, I] and [O] -> [..., O]."""
    if not _suits_onednn(x) or type(weight) not in PLAIN:  # it may be packed
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, False)
    return out.view(*x.shape[:-1], len(weight))


def gelu_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """`layer(F.gelu(x))`, with x kept for the backward pass and not its gelu too.

    The gelu is taken once more there, which costs what reading it would; it is a third of what a
    feed-forward keeps. Compiled, it is kept or not as `training.compiling` says.

    Args:
        x: [..., I].
        layer: from I to O.

    Returns:
        [..., O].
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return layer(F.gelu(x))
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    out: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias, True)
    return out.view(*x.shape[:-1], layer.out_features)


class _Linear(torch.autograd.Function):
    """Of x [n, I], or of its gelu, in the precision of x; weights may have another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        # behind a frozen weight only a gelu's input is read again
        ctx.save_for_backward(x if gelu or weight.requires_grad else None, weight)
        ctx.gelu = gelu
        bias = None if bias is None else bias.to(x.dtype)
        return product(F.gelu(x) if gelu else x, weight.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = product(grad, weight.to(grad.dtype).T)
            if ctx.gelu:
                of_x = torch.ops.aten.gelu_backward(of_x, x)
        if ctx.needs_input_grad[1]:
            of_weight = product(grad.T, (F.gelu(x) if ctx.gelu else x).T).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum(dim=0).to(weight.dtype)
        return of_x, of_weight, of_bias, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[n, I], [O, I] and [O] -> [n, O]; where no gradient is asked for."""
    if _suits_onednn(x):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return F.linear(x, weight, bias)


def _suits_onednn(x: Tensor) -> bool:
    return (
        _ONEDNN
        and type(x) in PLAIN  # no tensors without values, as --dry-run has them
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _flops(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
if _ONEDNN:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)
