"""How much captions depend on their image: the probe of whether a model reads images at all.

A captioner can lower its loss a long way by learning the language of captions. So each caption's
loss with its own image is compared with its loss with another image of the batch, and with a blank
one. Losses are unsmoothed nats per token: a gap of g says that the right image makes a token e^g
times as likely, in the geometric mean.

Shapes as in `models/qformer.py`; B images with one caption each, M caption targets.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2_train.distributed import World, gather_objects
from blip2_train.evaluation.retrieval import chunks
from blip2_train.models.blocks import KeyValue
from blip2_train.models.stage1 import Blip2Stage1, widen

# Nats per token; below it captions hardly depend on the image.
GAP_WARNING = 0.05
# Positions whose logits over the vocabulary are held at a time.
TOKENS_AT_ONCE = 2048


def other_rows(image_id: Tensor) -> tuple[Tensor, Tensor]:
    """Another image for each row: the first one after it, cyclically, with a different id.

    With distinct ids that is a rotation by one, so every image is used once.

    Args:
        image_id: int64 [B], B >= 1.

    Returns:
        index int64 [B], and valid bool [B]: False where all rows have the same id (the index must
        then not count).
    """
    rows = torch.arange(len(image_id), device=image_id.device)
    following = (rows[:, None] + rows + 1) % len(rows)  # [B, B], ends with the row itself
    differs = image_id[following] != image_id[:, None]
    first = differs.int().argmax(dim=1, keepdim=True)  # of equal ones the first
    return following.gather(1, first).squeeze(1), differs.any(dim=1)


def token_nats(logits: Tensor, targets: Tensor, rows: Tensor, count: int) -> Tensor:
    """Unsmoothed cross-entropy, summed over the tokens of each row.

    Args:
        logits: [M, V] at positions that have a target.
        targets: int64 [M], the following tokens.
        rows: int64 [M], to which row each belongs.
        count: number of rows (B).

    Returns:
        float64 [B], nats.
    """
    with torch.autocast(logits.device.type, enabled=False):
        nats = F.cross_entropy(widen(logits), targets, reduction="none").double()
        return nats.new_zeros(count).index_add(0, rows, nats)


class Grounding:
    """Sums over batches; waits for the device only when read."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def add(
        self,
        right: Tensor,
        shuffled: Tensor,
        blank: Tensor,
        tokens: Tensor,
        valid: Tensor,
        alone: Tensor | None = None,
    ) -> None:
        """Adds the captions of one batch, each with three images.

        Args:
            right: [B] nats of each caption with its own image, summed over its tokens.
            shuffled: [B] with another image.
            blank: [B] with the blank image.
            tokens: [B] tokens of each caption.
            valid: bool [B], False where there was no other image; its `shuffled` does not count.
            alone: [B] of the language model by itself, where there is one.
        """
        by_itself = torch.full_like(right, torch.nan) if alone is None else alone
        everywhere = torch.stack(
            [right.double(), blank.double(), tokens.double(), by_itself.double()]
        )
        # not multiplied by `valid`: a value that does not count may be anything
        where_valid = torch.stack([right.double(), shuffled.double(), tokens.double()])
        where_valid = where_valid.masked_fill(~valid, 0.0)
        self.batches.append(torch.cat([everywhere, where_valid]).sum(dim=1))

    def read(self, world: World) -> dict[str, float]:
        """Means over all ranks since the last reading, and starts anew.

        All ranks call it, also those that added nothing.

        Returns:
            In nats per token: `lm_right` and `lm_blank` over all captions, `lm_shuffled` over those
            that had another image; `lm_alone`, without any image, where `add` was told;
            `grounding_gap`, shuffled less right, both over the latter; and
            `grounding_gap_blank`, blank less right. Names are missing where there is no caption to
            take them from: nothing was added, or no caption had another image.
        """
        own = torch.stack(self.batches).sum(dim=0).tolist() if self.batches else [0.0] * 7
        self.batches = []
        sums = [sum(values) for values in zip(*gather_objects(own, world), strict=True)]
        right, blank, tokens, alone, right_valid, shuffled, tokens_valid = sums
        metrics = {}
        if tokens:
            metrics["lm_right"] = right / tokens
            metrics["lm_blank"] = blank / tokens
            metrics["grounding_gap_blank"] = (blank - right) / tokens
            if not math.isnan(alone):
                metrics["lm_alone"] = alone / tokens
        if tokens_valid:
            metrics["lm_shuffled"] = shuffled / tokens_valid
            metrics["grounding_gap"] = (shuffled - right_valid) / tokens_valid
        return metrics


def describe_grounding(metrics: Mapping[str, float]) -> str:
    """Part of a log line; says so where captions hardly depend on the image.

    Args:
        metrics: from `Grounding.read`, perhaps among others.
    """
    parts = ", ".join(
        f"{name} {metrics[f'lm_{name}']:.2f}"
        for name in ("right", "shuffled", "blank", "alone")
        if f"lm_{name}" in metrics
    )
    if "grounding_gap" not in metrics:
        return f"grounding gap unknown: no caption had another image ({parts or 'no captions'})"
    gap = metrics["grounding_gap"]
    line = f"grounding gap {gap:.2f} nats/token ({parts})"
    return line if gap >= GAP_WARNING else f"{line}: CAPTIONS HARDLY DEPEND ON THE IMAGE"


# -- stage 1 ---------------------------------------------------------------------------------------


def caption_nats(model: Blip2Stage1, query_kv: list[KeyValue], batch: Mapping[str, Any]) -> Tensor:
    """Nats of each caption of a batch, given what its row of `query_kv` shows.

    Args:
        model: the stage-1 model.
        query_kv: of B images, from `encode_image`.
        batch: training-like, as `first_captions` gives it.

    Returns:
        float64 [B].
    """
    ids, T = batch["input_ids"], batch["text_length"]
    index = batch["lm_index"]
    row, position = index // ids.shape[1], index % ids.shape[1]
    targets = ids.flatten()[index + 1]
    hidden = model.caption(ids[:, :T], query_kv)[row, position]  # [M, D]
    parts = [
        token_nats(model.lm_logits(hidden[part]), targets[part], row[part], len(ids))
        for part in chunks(len(index), TOKENS_AT_ONCE)
    ]
    return torch.stack(parts).sum(dim=0)


def stage1_grounding(
    model: Blip2Stage1, image_embeds: Tensor, blank_embeds: Tensor, batch: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `Grounding.add` takes, of one batch; every image passes the queries once.

    Args:
        model: the stage-1 model.
        image_embeds: [B, P, Dv] of the tower.
        blank_embeds: [1, P, Dv] of the tower, see its `blank`.
        batch: training-like, as `first_captions` gives it.
    """
    other, valid = other_rows(batch["image_id"])
    B = len(other)
    own = model.encode_image(model.qformer.project_image(image_embeds)).query_kv
    blank = model.encode_image(model.qformer.project_image(blank_embeds)).query_kv
    shuffled = [(key[other], value[other]) for key, value in own]
    blank = [(key.expand(B, -1, -1, -1), value.expand(B, -1, -1, -1)) for key, value in blank]
    return (
        caption_nats(model, own, batch),
        caption_nats(model, shuffled, batch),
        caption_nats(model, blank, batch),
        batch["attention_mask"].sum(dim=1) - 1,  # the first is given, not predicted
        valid,
    )
