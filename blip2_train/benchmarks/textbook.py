"""The stage-1 step as the reference takes it (LAVIS, `blip2_qformer.py`), to measure ours against.

It reads the same parameters as our model, so both can be asked for the same losses and gradients,
and is slow where the reference is slow, not more:

- text is padded to its maximum, 32 tokens, in every pass;
- four passes: queries, text, matching (three pairs per sample), captioning;
- `ln_vision` as a layer of its own, and keys and values of the image projected for every row of
  every pass: four times per image;
- attention as softmax(Q K^T + mask) V, each product in memory;
- hard negatives drawn row by row, each read by the host;
- captioning: the whole vocabulary's logits at every position, padding too, in one piece.

Shapes as in `models/qformer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2_train.models.blocks import FeedForward, KeyValue, QFormerLayer
from blip2_train.models.qformer import QFormer
from blip2_train.models.stage1 import Blip2Stage1
from blip2_train.training.objectives import LossConfig

HIDDEN = -10_000.0  # added to the scores of what may not be seen


def textbook_step(
    model: Blip2Stage1,
    image_embeds: Tensor,
    batch: Mapping[str, Any],
    config: LossConfig,
    uniform: Tensor,
) -> dict[str, Tensor]:
    """Losses of one contrastive batch on one process.

    Args:
        model: the stage-1 model.
        image_embeds: [B, P, Dv] tokens of the frozen tower.
        batch: `input_ids` and `attention_mask` int64 [B, T], `image_id` int64 [B].
        config: weights and smoothing; the gathered side carries no gradient.
        uniform: float64 [2, B] in [0, 1): the numbers that draw the negatives.

    Returns:
        `loss`, `loss_itc`, `loss_itm`, `loss_lm`, scalars in nats.
    """
    qformer, ids, mask = model.qformer, batch["input_ids"], batch["attention_mask"]
    B, Q = len(ids), qformer.num_query_tokens
    image = qformer.ln_vision(image_embeds.to(qformer.ln_vision.weight.dtype))

    queries = qformer.norm(qformer.query_tokens.expand(B, -1, -1))
    query_output, query_kv = query_blocks(qformer, qformer.dropout(queries), Q, image=image)
    text_output, _ = query_blocks(
        qformer, _embed(model, ids), 0, mask=_additive(mask[:, None, None])
    )
    image_feats = F.normalize(model.vision_proj(query_output).float(), dim=-1)
    text_feat = F.normalize(model.text_proj(text_output[:, 0]).float(), dim=-1)

    same = batch["image_id"][:, None] == batch["image_id"][None]
    with torch.autocast(ids.device.type, enabled=False):
        sim_i2t = (image_feats @ text_feat.detach().T).max(dim=1).values / model.temp
        sim_t2i = (image_feats.detach() @ text_feat.T).max(dim=1).values.T / model.temp
        target = same.float() / same.sum(dim=1, keepdim=True)
        i2t, t2i = (
            F.cross_entropy(sim, target, label_smoothing=config.itc.smoothing)
            for sim in (sim_i2t, sim_t2i)
        )
        loss_itc = (i2t + t2i) / 2

    other_image = _draw(sim_t2i, same, uniform[0])
    other_text = _draw(sim_i2t, same, uniform[1])
    images = torch.cat([image, torch.stack([image[i] for i in other_image]), image])
    text_ids = torch.cat([ids, ids, torch.stack([ids[i] for i in other_text])])
    text_mask = torch.cat([mask, mask, torch.stack([mask[i] for i in other_text])])
    both = torch.cat([queries.repeat(3, 1, 1), qformer.norm(_sum(model, text_ids))], dim=1)
    seen = torch.cat([mask.new_ones(3 * B, Q), text_mask], dim=1)
    hidden, _ = query_blocks(
        qformer, qformer.dropout(both), Q, mask=_additive(seen[:, None, None]), image=images
    )
    itm_logits = model.itm_head(hidden[:, :Q]).mean(dim=1)
    labels = torch.cat([ids.new_ones(B), ids.new_zeros(2 * B)])
    loss_itm = F.cross_entropy(itm_logits.float(), labels)

    decoder_ids = ids.clone()
    decoder_ids[:, 0] = model.dec_token_id
    T = ids.shape[1]
    causal = torch.ones(T, T, device=ids.device).tril() * mask[:, None]  # [B, T, T]
    visible = torch.cat([causal.new_ones(B, T, Q), causal], dim=2)[:, None]
    hidden, _ = query_blocks(
        qformer, _embed(model, decoder_ids), 0, mask=_additive(visible), past=query_kv
    )
    head = qformer.lm_head
    hidden = head.norm(F.gelu(_linear(head.transform, hidden)))
    logits = F.linear(hidden, qformer.word_embeddings.weight, head.bias)[:, :-1].contiguous()
    targets = ids.masked_fill(mask == 0, -100)[:, 1:]
    loss_lm = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), label_smoothing=config.lm.smoothing
    )
    parts = {"loss_itc": loss_itc, "loss_itm": loss_itm, "loss_lm": loss_lm}
    total = sum(config.weights[name.removeprefix("loss_")] * part for name, part in parts.items())
    return {"loss": total, **parts}  # type: ignore[dict-item]


def _sum(model: Blip2Stage1, ids: Tensor) -> Tensor:
    """Word and position embeddings, [R, T, D]."""
    positions = torch.arange(ids.shape[1], device=ids.device)
    qformer = model.qformer
    return qformer.word_embeddings(ids) + qformer.position_embeddings(positions)


def _embed(model: Blip2Stage1, ids: Tensor) -> Tensor:
    return model.qformer.dropout(model.qformer.norm(_sum(model, ids)))


def _additive(visible: Tensor) -> Tensor:
    return (1 - visible.float()) * HIDDEN


def _draw(sim: Tensor, same: Tensor, uniform: Tensor) -> list[int]:
    """One column per row by the row's softmax, positives left out."""
    found = []
    for row, (weights, number) in enumerate(zip(sim.detach().softmax(dim=1), uniform, strict=True)):
        cumulative = weights.masked_fill(same[row], 0).double().cumsum(dim=0)
        threshold = number * cumulative[-1] * (1 - 2**-40)
        found.append(int(torch.searchsorted(cumulative, threshold, right=True).item()))
    return found


def query_blocks(
    qformer: QFormer,
    hidden: Tensor,
    num_queries: int,
    *,
    mask: Tensor | None = None,
    image: Tensor | None = None,
    past: list[KeyValue] | None = None,
) -> tuple[Tensor, list[KeyValue]]:
    """One pass: states of every position, and every block's keys and values of self-attention.

    Args:
        qformer: whose blocks run.
        hidden: [R, L, D], the queries first.
        num_queries: of a row; they see the image.
        mask: added to the scores of self-attention, broadcast to [R, H, L, K].
        image: [R, P, Dv] behind `ln_vision`.
        past: keys and values in front of the own.

    Returns:
        [R, L, D], and (keys, values), each [R, L, D], of every block.
    """
    keys_values = []
    for i, layer in enumerate(qformer.layers):
        assert isinstance(layer, QFormerLayer)
        own = layer.self_attention
        key, value = _linear(own.key, hidden), _linear(own.value, hidden)
        before = past[i] if past else None
        keys_values.append((key, value))
        if before is not None:
            key, value = torch.cat([before[0], key], dim=1), torch.cat([before[1], value], dim=1)
        hidden = _attention(own, hidden, key, value, mask)
        parts = []
        if num_queries:
            queries = hidden[:, :num_queries]
            cross = layer.cross_attention
            if cross is not None:
                assert image is not None
                seen = _linear(cross.key, image), _linear(cross.value, image)
                queries = _attention(cross, queries, *seen, None)
            parts.append(_feed_forward(layer.query_ffn, queries))
        if hidden.shape[1] > num_queries:
            assert layer.text_ffn is not None
            parts.append(_feed_forward(layer.text_ffn, hidden[:, num_queries:]))
        hidden = torch.cat(parts, dim=1)
    return hidden, keys_values


def _feed_forward(layer: FeedForward, hidden: Tensor) -> Tensor:
    inner = F.gelu(_linear(layer.inner, hidden))
    return layer.norm(layer.dropout(_linear(layer.output, inner)) + hidden)


def _attention(
    layer: nn.Module, hidden: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """[R, L, D] hidden states on [R, K, D] keys and values."""
    layer_any: Any = layer
    query, key, value = (
        x.unflatten(-1, (layer_any.num_heads, -1)).transpose(1, 2)
        for x in (_linear(layer_any.query, hidden), key, value)
    )
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask
    weights = layer_any.dropout(scores.softmax(dim=-1))
    context = (weights @ value).transpose(1, 2).flatten(2)
    return layer_any.norm(layer_any.dropout(_linear(layer_any.output, context)) + hidden)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)
