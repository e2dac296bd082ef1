"""Weights of linear layers in 8 bits, by torchao: a quarter of the memory, products as before."""

import importlib.util
from typing import Any

from torch import nn

from blip2_train.errors import UserError
from blip2_train.models.blocks import CrossAttention


def check_package() -> None:
    """Whether torchao is installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UserError("int8 weights need torchao; pip install 'blip2-train[torchao]'")


def quantize_linears(module: nn.Module) -> int:
    """Stores the weights of linear layers as int8 with a scale for each row.

    The projections of the image stay as they are: `ln_vision` is folded into them in every call.

    Args:
        module: changed in place; it can no longer be trained.

    Returns:
        The number of layers.
    """
    # torchao takes seconds to import
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    kept = {
        id(layer)
        for attention in module.modules()
        if isinstance(attention, CrossAttention)
        for layer in (attention.key, attention.value)
    }
    layers = [m for m in module.modules() if isinstance(m, nn.Linear) and id(m) not in kept]
    chosen = {id(layer) for layer in layers}

    def is_chosen(layer: Any, _: str) -> bool:
        return id(layer) in chosen

    quantize_(module, Int8WeightOnlyConfig(), filter_fn=is_chosen)
    return len(layers)
