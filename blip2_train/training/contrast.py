"""One step of stage 0: joins model, contrastive loss and other ranks.

Shapes: B own samples, N = B * ranks, T text tokens (trimmed), E contrastive width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from blip2_train import losses
from blip2_train.distributed import World, all_gather, all_gather_with_grad
from blip2_train.models.clip import Clip
from blip2_train.training.objectives import ALONE, ItcConfig

# CLIP keeps the factor of its similarities at 100 or less; ours is 1 / temp.
TEMP_RANGE = (0.01, 0.5)


def clip_step(
    model: Clip, batch: Mapping[str, Any], loss: ItcConfig, *, world: World = ALONE
) -> dict[str, Tensor]:
    """Loss of one contrastive batch, and what it was computed from.

    With `loss.gradient` "full" the gradient does not depend on the number of ranks; with
    "reference" it does not either, but is another one: the gathered side is held constant. Batch
    norms are the exception: each rank normalises by its own samples.

    Args:
        model: image and text encoder.
        batch: `image` [B, 3, S, S], `input_ids` and `attention_mask` int64 [B, T_max], `image_id`
            int64 [B], and `text_length`: T, to which text is trimmed.
        loss: smoothing, and whether the gathered side learns.
        world: the ranks that share the contrastive batch.

    Returns:
        `loss` and `loss_itc`, the same scalar (nats), whose mean over ranks is the loss of the
        global batch; `image_feat` and `text_feat` [B, E]; `sim_i2t` and `sim_t2i` [B, N], divided
        by the temperature; `positive` bool [B, N].
    """
    T = batch["text_length"]
    image_feat = model.encode_image(batch["image"])
    text_feat = model.encode_text(batch["input_ids"][:, :T], batch["attention_mask"][:, :T])
    gather = all_gather_with_grad if loss.gradient == "full" else all_gather
    image_feat_all, text_feat_all = gather(image_feat, world), gather(text_feat, world)
    image_id_all = all_gather(batch["image_id"], world)
    with torch.autocast(image_feat.device.type, enabled=False):
        sim_i2t = image_feat @ text_feat_all.T / model.temp
        sim_t2i = text_feat @ image_feat_all.T / model.temp
    positive = losses.same_id(batch["image_id"], image_id_all)
    loss_itc = losses.itc_loss(sim_i2t, sim_t2i, positive, loss.smoothing)
    return {
        "loss": loss_itc,
        "loss_itc": loss_itc,
        "image_feat": image_feat,
        "text_feat": text_feat,
        "sim_i2t": sim_i2t,
        "sim_t2i": sim_t2i,
        "positive": positive,
    }
