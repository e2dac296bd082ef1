"""Where the Q-Former's queries look in an image.

Shapes as in `models/qformer.py`.
"""

import torch
from PIL import Image
from torch import Tensor

from blip2_train.models.attention import split_heads
from blip2_train.models.blocks import CrossAttention
from blip2_train.models.qformer import ImageKV, QFormer


@torch.no_grad()
def attention_maps(qformer: QFormer, image: ImageKV) -> Tensor:
    """Cross-attention weights of the query pass, mean over heads.

    Training never holds these weights: they are computed here from what enters each
    cross-attention.

    Args:
        qformer: in evaluation mode.
        image: keys and values of B images.

    Returns:
        [layers with cross-attention, B, Q, P]; the last dimension sums to 1.
    """
    found: list[Tensor] = []

    def weigh(module: CrossAttention, inputs: tuple) -> None:
        queries, ((key, _), _) = inputs[0], inputs[1][0]
        query = module.query(queries).unflatten(0, (len(key), -1))
        query = split_heads(query, module.num_heads)  # [B, H, Q, Dh]
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        found.append(scores.softmax(dim=-1).mean(dim=1))

    modules = [module for module in qformer.modules() if isinstance(module, CrossAttention)]
    hooks = [module.register_forward_pre_hook(weigh) for module in modules]
    try:
        qformer.forward_queries(image)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def overlay(image: Image.Image, weights: Tensor) -> Image.Image:
    """The image, dark where a query does not look.

    Args:
        image: as the model saw it.
        weights: [P] of a square map of tokens, without class token.
    """
    side = round(weights.numel() ** 0.5)
    if side * side != weights.numel():
        raise ValueError(f"{weights.numel()} tokens are no square map")
    share = (weights / weights.max()).view(side, side)
    mask = Image.fromarray((255 * share).round().to(torch.uint8).numpy())
    mask = mask.resize(image.size, Image.Resampling.BICUBIC)
    return Image.composite(image, image.point(lambda value: value * 0.2), mask)
