"""Linear layers of a frozen tower in float8 (e4m3), by torchao.

A weight is rounded once, with a scale for each of its rows; what a layer is given is rounded in
every call, with a scale for each token. Products are summed in float32 and come out in bfloat16.
Scales by row and not one a tensor: a trained transformer has channels and tokens far larger than
the others, which one scale would round to nothing.
"""

import importlib.util

import torch
from torch import nn

from blip2_train.errors import UserError

MULTIPLE = 16  # of which both sides of a weight must be, for float8 products
LEAST_CAPABILITY = (8, 9)  # of GPUs that have them: Ada, Hopper and newer
# A row of zeros has no scale; torchao would divide by nothing.
SMALLEST = 1e-12


def check_package() -> None:
    """Whether torchao is installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UserError("vision.precision=float8 needs torchao; pip install 'blip2-train[torchao]'")


def check_device(device: torch.device) -> None:
    """Whether the device multiplies float8; processors do, slowly.

    Raises:
        UserError: it is a GPU that does not.
    """
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise UserError(
            "vision.precision=float8 needs GPUs of compute capability 8.9 or more (Ada, Hopper and "
            f"newer), and {torch.cuda.get_device_name(device)} has "
            f"{'.'.join(map(str, capability))}; set vision.precision=native"
        )


def suitable_linears(module: nn.Module) -> list[nn.Linear]:
    """The linear layers whose shapes float8 products take."""
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.Linear)
        and layer.in_features % MULTIPLE == 0
        and layer.out_features % MULTIPLE == 0
    ]


def quantize_linears(module: nn.Module) -> None:
    """Puts float8 weights in place of those of `suitable_linears`; all else stays as it is.

    These are the tensors that torchao's `quantize_` makes with
    `Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())`. That function refuses
    processors, and sets torch's precision of float32 products and its compiler's options, which
    are not the tower's to set.

    Args:
        module: frozen, in bfloat16, on any device; changed in place.
    """
    # torchao takes seconds to import
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    for attention in module.modules():
        # timm adds the bias of queries, keys and values apart where this is set; otherwise it
        # gives the weight by keyword, which torchao does not understand
        if hasattr(attention, "qkv_bias_separate"):
            attention.qkv_bias_separate = True  # type: ignore[assignment]
    for layer in suitable_linears(module):
        weight = Float8Tensor.from_hp(
            layer.weight.detach(),
            granularity=PerRow(),
            # Hopper's fast sums, as is torchao's default; the start-up check measures them too
            mm_config=Float8MMConfig(use_fast_accum=True),
            hp_value_lb=SMALLEST,
            act_quant_kwargs=QuantizeTensorToFloat8Kwargs(
                granularity=PerRow(), hp_value_lb=SMALLEST
            ),
        )
        layer.weight = nn.Parameter(weight, requires_grad=False)
