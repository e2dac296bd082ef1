"""Grounding of a stage-2 model: does what the language model says depend on the image?"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from blip2_train.evaluation.grounding import other_rows, token_nats
from blip2_train.models.stage2 import Blip2Stage2, question_of


def stage2_grounding(
    model: Blip2Stage2, image_embeds: Tensor, blank_embeds: Tensor, batch: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss of each caption with its own, another, a blank and no image.

    Args:
        model: the stage-2 model.
        image_embeds: [B, P, Dv] tokens of the tower.
        blank_embeds: [1, P, Dv] of a blank image.
        batch: `image_id` int64 [B]; the text as `Blip2Stage2.text_logits` takes it; `lm_targets`;
            of questions also `question_ids` and `question_mask`, which stay with their row.

    Returns:
        right, shuffled, blank: [B] summed nats; tokens: [B] that were predicted; valid: bool [B],
        False where no other image was there; alone: [B] nats of the language model by itself,
        without queries (see `Grounding.add`).
    """
    B = len(image_embeds)
    other, valid = other_rows(batch["image_id"])
    question = question_of(batch)
    if question is None:
        query_output = model.encode_image(model.qformer.project_image(image_embeds))
        shuffled = query_output[other]
        blank = model.encode_image(model.qformer.project_image(blank_embeds))
        blanks = blank.expand(B, -1, -1)
    else:  # the question of a row, and another image
        query_output, shuffled, blanks = (
            model.encode_image(model.qformer.project_image(embeds), question)
            for embeds in (image_embeds, image_embeds[other], blank_embeds.expand(B, -1, -1))
        )
    length = batch["target_ids" if "target_ids" in batch else "input_ids"].shape[1]
    rows = batch["lm_index"] // length

    def nats(queries: Tensor) -> Tensor:
        return token_nats(model.text_logits(queries, batch), batch["lm_targets"], rows, B)

    tokens = rows.bincount(minlength=B)
    logits, predicted = model.logits_without_image(batch)
    alone = token_nats(logits, batch["lm_targets"][predicted], rows[predicted], B)
    return nats(query_output), nats(shuffled), nats(blanks), tokens, valid, alone
