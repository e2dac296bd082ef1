"""Validation of a stage-1 model: all losses, matching accuracy per class, retrieval.

Batches are whole on one rank, and their make-up does not depend on the number of ranks: so neither
does any number, and every image counts exactly once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip2_train.data.batch import lm_targets, text_tokens
from blip2_train.distributed import World, gather_objects
from blip2_train.errors import UserError
from blip2_train.evaluation.retrieval import chunks, pairs_to_match, recalls, rerank
from blip2_train.losses import max_similarity
from blip2_train.models.stage1 import Blip2Stage1, widen

# Captions that one matching pass scores against an image.
PAIRS_AT_ONCE = 256


@dataclass
class Features:
    """What retrieval needs of one validation batch; C captions of B images.

    Attributes:
        batch: number of the batch within the whole set.
        image_feats: [B, Q, E] on the CPU.
        text_feat: [C, E] on the CPU.
        input_ids: int64 [C, T] on the CPU.
        attention_mask: int64 [C, T] on the CPU.
        caption_image: int64 [C], row of the image in this batch.
        items: numbers of the images within the validation split.
        text: of the captions.
    """

    batch: int
    image_feats: Tensor
    text_feat: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    caption_image: Tensor
    items: list[int]
    text: list[str]


@dataclass
class Retrieval:
    """Results over the whole validation set, the same on every rank.

    Attributes:
        metrics: recalls by ITC, and re-ranked by ITM under `itm_...` names.
        sims: [I, C] cosines, on the CPU.
        caption_image: int64 [C].
        items: numbers of the I images within the validation split.
        text: of the C captions.
    """

    metrics: dict[str, float]
    sims: Tensor
    caption_image: Tensor
    items: list[int]
    text: list[str]


def first_captions(batch: dict[str, Any]) -> dict[str, Any]:
    """A training-like batch of each image with its first caption, from an evaluation batch."""
    images = len(batch["image_id"])
    caption_image = batch["caption_image"].cpu()
    first = torch.searchsorted(caption_image, torch.arange(images))
    device = batch["input_ids"].device
    mask = batch["attention_mask"][first.to(device)]
    host_mask = mask.cpu()
    return {
        "input_ids": batch["input_ids"][first.to(device)],
        "attention_mask": mask,
        "image_id": batch["image_id"],
        "text_index": text_tokens(host_mask).to(device),
        "lm_index": lm_targets(host_mask).to(device),
        "text_length": int(host_mask.sum(dim=1).max()),
    }


def encode(
    model: Blip2Stage1, image_embeds: Tensor, batch: dict[str, Any], number: int
) -> Features:
    """Contrastive features of a validation batch.

    Args:
        model: the stage-1 model.
        image_embeds: [B, P, Dv] of the tower.
        batch: from `collate_eval`, on the model's device.
        number: of the batch within the whole set.
    """
    image = model.qformer.project_image(image_embeds)
    texts = [
        model.encode_text(batch["input_ids"][part], batch["attention_mask"][part])[1]
        for part in chunks(len(batch["text"]), PAIRS_AT_ONCE)
    ]
    return Features(
        number,
        model.encode_image(image).image_feats.cpu(),
        torch.cat(texts).cpu(),
        batch["input_ids"].cpu(),
        batch["attention_mask"].cpu(),
        batch["caption_image"].cpu(),
        batch["items"],
        batch["text"],
    )


def retrieve(
    model: Blip2Stage1 | None,
    features: list[Features],
    tokens: dict[int, Tensor],
    *,
    rerank_k: int,
    world: World,
) -> Retrieval:
    """Retrieval over the whole set from every rank's features.

    Each rank re-ranks the pairs of its own images, so image tokens never travel.

    Args:
        model: the stage-1 model; None without re-ranking.
        features: of this rank's batches.
        tokens: {batch number: [B, P, Dv]} tower output of this rank's batches.
        rerank_k: how many candidates ITM re-ranks; 0: none.
        world: the ranks.
    """
    everything = [f for part in gather_objects(features, world) for f in part]
    if not everything:
        raise UserError("no validation image can be used; data.validation.* says which are read")
    everything.sort(key=lambda f: f.batch)
    image_feats = torch.cat([f.image_feats for f in everything])
    text_feat = torch.cat([f.text_feat for f in everything])
    starts, start = {}, 0
    for f in everything:
        starts[f.batch], start = start, start + len(f.items)
    caption_image = torch.cat([f.caption_image + starts[f.batch] for f in everything])
    sims = max_similarity(image_feats, text_feat)
    metrics = recalls(sims, sims.T, caption_image)
    if rerank_k:
        assert model is not None, "matching re-ranks"
        ids = torch.cat([f.input_ids for f in everything])
        mask = torch.cat([f.attention_mask for f in everything])
        wanted = pairs_to_match(sims, rerank_k)
        own = {
            starts[number] + row: embeds[row : row + 1]
            for number, embeds in tokens.items()
            for row in range(len(embeds))
        }
        scores = {
            image: match_captions(model, embeds, ids, mask, wanted[image].nonzero().squeeze(1))
            for image, embeds in own.items()
        }
        match = torch.zeros_like(sims)
        for part in gather_objects(scores, world):
            for image, values in part.items():
                match[image, wanted[image]] = values
        i2t, t2i = rerank(sims, match, rerank_k), rerank(sims.T, match.T, rerank_k)
        metrics |= {f"itm_{k}": v for k, v in recalls(i2t, t2i, caption_image).items()}
    items = [item for f in everything for item in f.items]
    return Retrieval(metrics, sims, caption_image, items, [t for f in everything for t in f.text])


def match_captions(
    model: Blip2Stage1, image_embeds: Tensor, ids: Tensor, mask: Tensor, captions: Tensor
) -> Tensor:
    """Matching logits of one image with some captions.

    Args:
        model: the stage-1 model.
        image_embeds: [1, P, Dv].
        ids: int64 [C, T] of all captions, on the CPU.
        mask: int64 [C, T].
        captions: int64 [n], which of them.

    Returns:
        [n] on the CPU: the head's logit for "match", mean over queries.
    """
    image = model.qformer.project_image(image_embeds)
    scores = []
    for part in captions.split(PAIRS_AT_ONCE):
        length = int(mask[part].sum(dim=1).max())
        logits = model.match(
            [(image, len(part))],
            ids[part, :length].to(image_embeds.device),
            mask[part, :length].to(image_embeds.device),
        )
        scores.append(widen(logits[:, 1]).cpu())
    return torch.cat(scores)
