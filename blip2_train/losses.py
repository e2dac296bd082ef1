"""The objectives of stage 1 as functions of tensors (BLIP-2, section 3.2).

Shapes: B own samples, N samples of the contrastive batch over all ranks, Q queries, E contrastive
width, M caption targets, V vocabulary. Similarities, softmaxes and losses are computed in float32
(or float64, where the inputs are), whatever the autocast around them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Largest intermediate of a similarity, in elements (1 GiB in float32).
SIMILARITY_CHUNK = 2**28


def max_similarity(image_feats: Tensor, text_feats: Tensor) -> Tensor:
    """Cosine of each image with each text: the best of the image's queries.

    Args:
        image_feats: [I, Q, E], L2-normalised.
        text_feats: [C, E], L2-normalised.

    Returns:
        [I, C]. Computed in chunks of images, so that no [I, Q, C] larger than `SIMILARITY_CHUNK`
        elements is ever held.
    """
    with torch.autocast(image_feats.device.type, enabled=False):
        per_image = image_feats.shape[1] * text_feats.shape[0]
        parts = image_feats.split(max(1, SIMILARITY_CHUNK // per_image))
        # [i, Q, E] @ [E, C] -> [i, Q, C] -> [i, C]
        return torch.cat([(part @ text_feats.T).max(dim=1).values for part in parts])


def same_id(image_id: Tensor, image_id_all: Tensor) -> Tensor:
    """Which of all N samples show the same image as each own one: bool [B, N]."""
    return image_id[:, None] == image_id_all[None, :]


def itc_loss(sim_i2t: Tensor, sim_t2i: Tensor, positive: Tensor, smoothing: float) -> Tensor:
    """Image-text contrast, mean over rows and both directions.

    Target of a row: (1 - smoothing) spread evenly over its positives, smoothing over all columns;
    with one positive per row that is plain label smoothing.

    Args:
        sim_i2t: [B, N] similarities of own images with all texts, divided by the temperature.
        sim_t2i: [B, N] of own texts with all images.
        positive: bool [B, N], from `same_id`; at least one per row.
        smoothing: in [0, 1).

    Returns:
        Scalar, nats.
    """
    with torch.autocast(sim_i2t.device.type, enabled=False):
        target = positive.to(sim_i2t.dtype) / positive.sum(dim=1, keepdim=True)
        target = (1 - smoothing) * target + smoothing / positive.shape[1]
        i2t = -(target * F.log_softmax(sim_i2t, dim=1)).sum(dim=1)
        t2i = -(target * F.log_softmax(sim_t2i, dim=1)).sum(dim=1)
        return (i2t.mean() + t2i.mean()) / 2


def negative_weights(sim: Tensor, positive: Tensor) -> Tensor:
    """How likely each sample is drawn as a hard negative: softmax with positives left out.

    Args:
        sim: [B, N] similarities, divided by the temperature.
        positive: bool [B, N] of samples that may not be drawn.

    Returns:
        [B, N]; rows sum to 1, or to 0 where every sample is a positive.
    """
    weights = sim.detach().masked_fill(positive, -math.inf).softmax(dim=1)
    return weights.nan_to_num(0.0)


def draw_negatives(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One column per row, by the inverse of the row's cumulative distribution.

    The uniform number belongs to the row of the *global* batch, so the draw does not depend on
    how rows lie on ranks.

    Args:
        weights: [B, N], not negative; rows need not sum to 1.
        uniform: float64 [B], in [0, 1).

    Returns:
        index int64 [B], and valid bool [B]: False where a row has no weight at all (its index is
        then 0 and must not count).
    """
    cumulative = weights.double().cumsum(dim=1)
    total = cumulative[:, -1:]
    # right=True: the first column whose cumulative weight exceeds the threshold, which is never
    # one of weight 0. The factor keeps the threshold below the total in spite of rounding.
    threshold = uniform[:, None] * total * (1 - 2**-40)
    index = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    valid = total.squeeze(1) > 0
    return torch.where(valid, index, 0), valid


def itm_loss_sum(itm_logits: Tensor, itm_labels: Tensor, row_weight: Tensor) -> Tensor:
    """Image-text matching: cross-entropy summed over rows.

    Args:
        itm_logits: [3B, 2].
        itm_labels: int64 [3B], 1 = the pair matches.
        row_weight: [3B], 0 for a row that has no negative.

    Returns:
        Scalar, nats; divide by the number of rows that count.
    """
    with torch.autocast(itm_logits.device.type, enabled=False):
        logits = itm_logits if itm_logits.dtype == torch.float64 else itm_logits.float()
        rows = F.cross_entropy(logits, itm_labels, reduction="none")
        return (rows * row_weight).sum()


def lm_loss_sum(lm_logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Image-grounded captioning: smoothed cross-entropy summed over target tokens.

    Args:
        lm_logits: [M, V] at positions that have a target.
        targets: int64 [M], the following tokens.
        smoothing: in [0, 1), over all V classes.

    Returns:
        Scalar, nats; divide by the number of targets.
    """
    with torch.autocast(lm_logits.device.type, enabled=False):
        logits = lm_logits if lm_logits.dtype == torch.float64 else lm_logits.float()
        return F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")


# -- what a loss is without learning, and at best --------------------------------------------------


def itm_prior() -> float:
    """Entropy of 1 positive to 2 negatives: the loss of a head that ignores its input."""
    return -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)


def smoothing_floor(classes: int, smoothing: float) -> float:
    """Lowest cross-entropy against smoothed targets of `classes` classes, nats."""
    if smoothing == 0 or classes <= 1:
        return 0.0
    low = smoothing / classes
    high = 1 - smoothing + low
    return -high * math.log(high) - (classes - 1) * low * math.log(low)


def choice_levels(classes: float, smoothing: float) -> tuple[float, float]:
    """Chance level and floor of picking one of so many classes, nats."""
    return math.log(classes), smoothing_floor(round(classes), smoothing)
