"""What a language model sees, said so that the host does not wait for the device.

Given a plain mask [B, T], transformers looks whether it is all ones: a value that the host has to
wait for, in the middle of a step. There are other ways to say the same of texts that are padded on
the right; which of them a model understands is found out on two made-up samples.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# Ways to say which positions are visible, best first:
#   square  every pair of positions as a bool [B, 1, T, T] (of an encoder [B, 1, 1, T])
#   none    nothing: causality hides what stands behind a text from the text (decoder-only)
#   rows    the plain mask
FORMS = ("square", "none", "rows")


def mask_inputs(
    form: str,
    attention_mask: Tensor,
    decoder_attention_mask: Tensor | None = None,
    *,
    encoder_decoder: bool = False,
) -> dict[str, Any]:
    """Arguments of a model's forward that say what is visible.

    Args:
        form: one of `FORMS`.
        attention_mask: int64 [B, T], 1 = token, padded on the right.
        decoder_attention_mask: int64 [B, S] of an encoder-decoder, padded on the right.
        encoder_decoder: what the model is.
    """
    visible = attention_mask.bool()[:, None, None]  # [B, 1, 1, T]
    if encoder_decoder:
        if form == "rows":
            return {
                "attention_mask": attention_mask,
                "decoder_attention_mask": decoder_attention_mask,
            }
        return {"attention_mask": visible}  # the decoder is causal
    if form == "square":
        positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        causal = positions[:, None] >= positions
        return {"attention_mask": visible & causal, "position_ids": positions[None]}
    return {"attention_mask": attention_mask if form == "rows" else None}


def window(lm: PreTrainedModel) -> int | None:
    """How far back the shortest-sighted layer sees, None where all see everything.

    One square mask is for all layers alike: of a longer input it would show such a layer too much.
    """
    keys = ("sliding_window", "attention_chunk_size")
    found = [size for key in keys if (size := getattr(lm.config, key, None)) is not None]
    if not found and set(getattr(lm.config, "layer_types", None) or ()) - {"full_attention"}:
        return 0  # layers of another kind, whose sight nothing tells
    return min(found, default=None)


@torch.no_grad()
def find_form(lm: PreTrainedModel, longest: int | None = None) -> str:
    """The best of `FORMS` that this model understands.

    It must give the logits that the plain mask gives, and what stands in the padding must not
    change them.

    Args:
        lm: on a real device; its mode is left as it was.
        longest: positions of the longest input, None if any length may come.
    """
    if isinstance(next(lm.parameters()), FakeTensor):
        return "rows"  # without values nothing can be tried
    sight = window(lm)
    sees_all = sight is None or (longest is not None and longest <= sight)
    training = lm.training
    lm.eval()
    device = next(lm.parameters()).device
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], device=device)
    ids = (torch.arange(12, device=device).view(2, 6) + 5) % lm.config.vocab_size
    # the same tokens where the mask is 1, others in the padding
    other = torch.where(mask == 1, ids, (ids + 7) % lm.config.vocab_size)
    wanted = _logits(lm, "rows", ids, mask)
    waits: dict[str, int] = {}
    for form in FORMS:
        if form == "square" and not sees_all:
            continue
        if form == "none" and lm.config.is_encoder_decoder:
            continue
        try:
            with _Waits() as counted:
                found = _logits(lm, form, ids, mask)
            unmoved = found.equal(_logits(lm, form, other, mask))
        except Exception as error:  # whatever a model runs into that does not know the form
            log.debug("%s does not take masks of form %s: %s", type(lm).__name__, form, error)
            continue
        if unmoved and close(found, wanted):
            waits[form] = counted.count
    lm.train(training)
    form = min(waits, key=lambda form: waits[form], default="rows")
    if waits.get(form, 1):
        log.info(
            "%s knows no mask that the host need not look at: it waits for the device in each pass",
            type(lm).__name__,
        )
    return form


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal but for the order of sums; half precision rounds results of the same product apart."""
    tolerance = 1e-4 if ours.dtype in (torch.float32, torch.float64) else 3e-2
    if ours.shape != theirs.shape:
        return False
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def _logits(lm: PreTrainedModel, form: str, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits at all real positions, [M, V]."""
    inputs: Mapping[str, Any]
    if lm.config.is_encoder_decoder:
        # the decoder reads half as much, and its second row is padded too
        real = mask[:, ::2]
        masks = mask_inputs(form, mask, real, encoder_decoder=True)
        inputs = {**masks, "decoder_input_ids": ids[:, ::2]}
    else:
        inputs, real = mask_inputs(form, mask), mask
    return lm(input_ids=ids, use_cache=False, **inputs).logits[real == 1]


class _Waits(TorchDispatchMode):
    """Counts how often the host asks for a value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))
