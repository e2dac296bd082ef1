"""The head of a language model: the last and by far the largest product, made where it is needed.

Any model of transformers is asked for its logits at some positions alone, or for what its head
would multiply there; which of the two is right is found out on a made-up sample.

Shapes: M positions, V vocabulary, Dl width of what the head is given.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blip2_train.errors import UserError
from blip2_train.models.lm_masks import close

log = logging.getLogger(__name__)

# What can be asked of a model, best first:
#   states  the head's input at some positions: the logits are the head's output and nothing more
#   rows    logits at some positions: something is done to them after the head (scaling, capping)
#   whole   logits at all positions: the head does not take single rows
FORMS = ("states", "rows", "whole")


def target_logits(lm: PreTrainedModel, index: Tensor, **inputs: Any) -> Tensor:
    """Logits at some positions only: the head sees no other row.

    Whatever the model does after its head (scaling, capping) is done all the same.

    Args:
        lm: a model of transformers.
        index: int64 [M], flat positions of the (decoder's) input.
        inputs: of the model's forward.

    Returns:
        [M, V].
    """
    handle = lm.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: (args[0].flatten(0, 1)[index], *args[1:])
    )
    try:
        return lm(**inputs, use_cache=False).logits
    finally:
        handle.remove()


def target_states(lm: PreTrainedModel, index: Tensor, **inputs: Any) -> Tensor:
    """What the head is given at some positions; it multiplies nothing itself.

    Args:
        lm: of form "states".
        index: int64 [M], flat positions of the (decoder's) input.
        inputs: of the model's forward.

    Returns:
        [M, Dl].
    """
    found = []

    def take(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found.append(args[0].flatten(0, 1)[index])
        return (args[0].flatten(0, 1)[:0], *args[1:])

    handle = lm.get_output_embeddings().register_forward_pre_hook(take)
    try:
        lm(**inputs, use_cache=False)
    finally:
        handle.remove()
    return found[0]


@torch.no_grad()
def find_head(lm: PreTrainedModel, name: str) -> str:
    """The best of `FORMS` that this model understands.

    Args:
        lm: on a real device, in eval mode.
        name: for messages.

    Raises:
        UserError: the model takes embeddings for something else than the tokens they are of.
    """
    table, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    vocabulary: int = getattr(head, "out_features", lm.config.vocab_size)
    device: Any = table.weight.device
    ids = (torch.arange(8, device=device).view(2, 4) + 5) % vocabulary
    mask = torch.ones_like(ids)
    inputs = {"attention_mask": mask}
    if lm.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids.flip(0), "decoder_attention_mask": mask}
    from_tokens = lm(**inputs, input_ids=ids, use_cache=False).logits
    inputs["inputs_embeds"] = table(ids)
    full = lm(**inputs, use_cache=False).logits
    if not close(full, from_tokens):
        raise UserError(
            f"language_model.name={name} cannot be used: its output for token embeddings is not "
            "that for the tokens; take another model"
        )
    index = torch.tensor([6, 0, 3], device=device)
    wanted = full.flatten(0, 1)[index]
    try:
        rows = target_logits(lm, index, **inputs)
    except Exception as error:  # whatever a head that wants three dimensions runs into
        reason = str(error)
    else:
        if close(rows, wanted):
            return "states" if _is_last(lm, index, inputs) else "rows"
        reason = "the logits differ"
    log.info(
        "the head of %s does not take single rows (%s): all logits are computed, and those of "
        "the targets taken from them",
        name,
        reason,
    )
    return "whole"


def _is_last(lm: PreTrainedModel, index: Tensor, inputs: dict[str, Any]) -> bool:
    """Whether the head's output, whatever it be, is what the model returns.

    Large numbers in its place show a cap that those of a made-up sample may not reach.
    """
    head, put = lm.get_output_embeddings(), []

    def replace(_: Any, __: Any, output: Tensor) -> Tensor:
        numbers = torch.linspace(-1e4, 1e4, output.numel(), device=output.device)
        put.append(numbers.view_as(output).to(output.dtype))
        return put[0]

    handle = head.register_forward_hook(replace)
    try:
        found = target_logits(lm, index, **inputs)
        handle.remove()
        states = target_states(lm, index, **inputs)
        return found.equal(put[0]) and close(head(states), target_logits(lm, index, **inputs))
    except Exception as error:  # a quantized kernel may take no empty input
        log.debug("%s does not run without its head: %s", type(lm).__name__, error)
        return False
    finally:
        handle.remove()
