"""Linear layers of a language model that never learns."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from blip2_train.models.linear import Linear


def use_fast_products(lm: nn.Module) -> None:
    """Has plain linear layers multiply as those of the Q-Former do, see `models.linear`."""
    for module in lm.modules():
        if type(module) is nn.Linear and type(module.weight.data) is Tensor:
            module.__class__ = Linear  # the same layer with another forward pass


def let_gradients_through(lm: nn.Module) -> None:
    """Gives linear layers of packed weights, whose kernels have no backward, one."""
    for module in lm.modules():
        if isinstance(module, nn.Linear) and type(module.weight.data) is not Tensor:
            module.forward = functools.partial(_linear, module)  # type: ignore[method-assign]


def _linear(layer: Any, x: Tensor) -> Tensor:
    return _FrozenLinear.apply(layer.weight, layer.bias, x)


class _FrozenLinear(torch.autograd.Function):
    """A linear layer with a gradient to its input, whatever its weight is packed in."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        eye = torch.eye(ctx.weight.shape[1], dtype=grad.dtype, device=grad.device)
        return None, None, grad @ F.linear(eye, ctx.weight).t()  # the layer's own unpacking
