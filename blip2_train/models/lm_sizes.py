"""What a quantized language model takes, told from its shapes."""

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

# Bytes of a weight as it is packed, scales included, where the packing itself wants a GPU or
# another package: torchao keeps a scale and a zero point in bfloat16 for 128 weights, bitsandbytes
# a float32 for a row (int8, less than 0.1 %: left out) or for 64 weights (nf4).
PACKED = {
    "torchao_int4": 0.5 + 4 / 128,
    "bitsandbytes_int8": 1.0,
    "bitsandbytes_nf4": 0.5 + 4 / 64,
}


def quantize_shapes(lm: PreTrainedModel, quantization: str) -> float:
    """Quantizes a model without values as far as that can be done.

    torchao_int8 is done by torchao itself, so that a trace meets what its products keep; of the
    others only the sizes are known.

    Args:
        lm: of fake tensors; its linear layers are changed in place.
        quantization: of `lm_weights.QUANTIZATIONS`; the packages are there.

    Returns:
        Bytes that the weights take less than their tensors say.
    """
    names = set(_quantized(lm))
    if quantization == "torchao_int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(lm, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in names)
        return 0.0
    saved = 0.0
    for name in names:
        weight = lm.get_parameter(f"{name}.weight")
        saved += weight.numel() * (weight.element_size() - PACKED[quantization])
    return saved


def _quantized(lm: PreTrainedModel) -> list[str]:
    """Linear layers that the library quantizes: not the head, nor what is tied to it."""
    wide = list(lm._keep_in_fp32_modules or ())
    kept = HfQuantizer.get_modules_to_not_convert(lm, None, wide)
    return [
        name
        for name, module in lm.named_modules()
        if isinstance(module, nn.Linear) and should_convert_module(name, kept)
    ]
