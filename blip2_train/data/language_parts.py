"""Parts of a batch whose texts are of similar length, so that a language model reads less padding.

Padded to the longest text of the batch, a quarter of a caption's positions are padding, and of an
encoder-decoder's, whose captions are cut at random, half of them. Sorted and cut into parts that
are padded each for itself, less of it is left; what the model says of a text does not change.

B: texts of the batch, b: of a part, M: its targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blip2_train.data.batch import Sample, Skipped, text_bucket

LEAST = 8  # texts of a part; fewer leave a GPU with too little to do at a time
SIDES = {"input_ids": "attention_mask", "target_ids": "target_mask"}


def collate_in_parts(
    samples: Sequence[Sample],
    skipped: Sequence[Skipped],
    *,
    collate: Callable[..., Mapping[str, Any]],
    parts: int,
    **settings: Any,
) -> dict[str, Any]:
    """A training batch of stage 2 with its `parts`.

    Args:
        samples: of a `TrainStream`.
        skipped: samples that were replaced.
        collate: `collate_causal` or `collate_seq2seq`.
        parts: see `text_parts`.
        settings: of `collate`.
    """
    batch = collate(samples, skipped, **settings)
    return {**batch, "parts": text_parts(batch, parts, settings["bucket"])}


def text_parts(text: Mapping[str, Tensor], parts: int, bucket: int) -> list[dict[str, Tensor]]:
    """Cuts the texts of a batch into parts of similar length.

    Args:
        text: of a `CausalBatch` or a `Seq2SeqBatch`, on the host.
        parts: at most so many, of equal numbers of texts, `LEAST` or more.
        bucket: their lengths are multiples of it, but at most those of `text`.

    Returns:
        Parts, each with the text's tensors of its rows alone, and `rows` int64 [b], the rows of
        the batch that these are.
    """
    sides = {ids: mask for ids, mask in SIDES.items() if ids in text}
    lengths = {ids: text[mask].sum(dim=1) for ids, mask in sides.items()}
    B, predicted = len(text["input_ids"]), text[list(sides)[-1]]
    is_target = torch.zeros(predicted.numel(), dtype=torch.bool)
    is_target[text["lm_index"]] = True
    # the two sides of a caption that is cut share its words: where one is long, the other is short
    order = (lengths["input_ids"] - lengths.get("target_ids", 0)).argsort(stable=True)
    found = []
    for rows in order.tensor_split(max(1, min(parts, B // LEAST))):
        part = {"rows": rows}
        for ids, mask in sides.items():
            longest = int(lengths[ids][rows].max())
            width = text_bucket(longest, bucket, text[ids].shape[1])
            part[ids], part[mask] = text[ids][rows, :width], text[mask][rows, :width]
        here = is_target.view_as(predicted)[rows, : part[list(sides)[-1]].shape[1]]
        part["lm_index"] = here.flatten().nonzero().squeeze(1)
        part["lm_targets"] = part[list(sides)[-1]].flatten()[part["lm_index"]]
        found.append(part)
    return found
