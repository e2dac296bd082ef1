"""The stage-2 step as the reference takes it (LAVIS: `blip2_opt.py`, `blip2_t5.py`).

It reads the same parameters as our model, and is slow where the reference is slow, not more:

- `ln_vision` as a layer of its own, with a gradient to its output, and keys and values of the image
  projected from it by every block;
- attention as softmax(Q K^T + mask) V, each product in memory, in Q-Former and language model;
- the language model is the library's own forward with labels: the whole vocabulary's logits at
  every position, queries and padding too, then their cross-entropy in float32, in one piece.

Text is padded to the longest of the batch, which the reference does in this stage.

Shapes as in `models/stage2.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from blip2_train.benchmarks.textbook import query_blocks
from blip2_train.models.linear import Linear
from blip2_train.models.stage2 import Blip2Stage2

IGNORED = -100  # label of what is no target


def textbook_stage2_step(
    model: Blip2Stage2, image_embeds: Tensor, text: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Loss of one batch on one process.

    Args:
        model: the stage-2 model.
        image_embeds: [B, P, Dv] tokens of the frozen tower.
        text: int64 `input_ids`, `attention_mask` [B, T] of a decoder-only model, whose every token
            is a target; of an encoder-decoder [B, P], and `target_ids`, `target_mask` [B, T].

    Returns:
        `loss` and `loss_lm`, the same scalar, nats per token.
    """
    language_model = model.language_model
    soft = model.lm_proj(textbook_queries(model, image_embeds)).to(language_model.dtype)
    embeds = torch.cat([soft, language_model.embed(text["input_ids"])], dim=1)
    mask = torch.cat([text["attention_mask"].new_ones(soft.shape[:2]), text["attention_mask"]], 1)
    inputs = {"inputs_embeds": embeds, "attention_mask": mask}
    if language_model.is_encoder_decoder:
        said, start = text["target_ids"], language_model.decoder_start_token_id
        inputs["labels"] = said.masked_fill(text["target_mask"] == 0, IGNORED)
        inputs["decoder_input_ids"] = F.pad(said[:, :-1], (1, 0), value=start)
        inputs["decoder_attention_mask"] = text["target_mask"]
    else:
        labels = text["input_ids"].masked_fill(text["attention_mask"] == 0, IGNORED)
        nothing = labels.new_full(soft.shape[:2], IGNORED)
        inputs["labels"] = torch.cat([nothing, labels], dim=1)
    # the reference's autocast would have norms compute in float32 too: it is left out
    plain = torch.autocast(embeds.device.type, enabled=False)
    with plain, as_published(language_model.lm), torch.compiler.set_stance("force_eager"):
        loss = language_model.lm(**inputs, use_cache=False).loss
    return {"loss": loss, "loss_lm": loss}


def textbook_queries(model: Blip2Stage2, image_embeds: Tensor) -> Tensor:
    """Queries see each other and the image: [B, P, Dv] -> [B, Q, D]."""
    qformer = model.qformer
    image = qformer.ln_vision(image_embeds.to(qformer.ln_vision.weight.dtype))
    queries = qformer.norm(qformer.query_tokens.expand(len(image), -1, -1))
    hidden, _ = query_blocks(
        qformer, qformer.dropout(queries), qformer.num_query_tokens, image=image
    )
    return hidden


@contextlib.contextmanager
def as_published(lm: PreTrainedModel) -> Iterator[None]:
    """Inside, attention of a language model is softmax(Q K^T) V, and linear layers are torch's."""
    usual = lm.config._attn_implementation
    ours = [module for module in lm.modules() if type(module) is Linear]
    lm.set_attn_implementation("eager")
    for module in ours:
        module.__class__ = nn.Linear  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in ours:
            module.__class__ = Linear
        lm.set_attn_implementation(usual)
