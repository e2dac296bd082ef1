"""Image-text retrieval: recall at K from contrastive similarities, and re-ranked by matching.

Shapes: I images, C captions; every caption belongs to one image.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from blip2_train.distributed import World

# Score of a pair that was not re-ranked: below every re-ranked one.
NOT_RANKED = -100.0


def recalls(score_i2t: Tensor, score_t2i: Tensor, caption_image: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways, in percent; ties count against us.

    An image's rank is that of the best-ranked of its captions.

    Args:
        score_i2t: [I, C], higher is better.
        score_t2i: [C, I].
        caption_image: int64 [C], the image of each caption; every image has at least one.

    Returns:
        `i2t_r1`, `i2t_r5`, `i2t_r10`, `t2i_r1`, ... and `r_mean`, the mean of the six.
    """
    own = torch.zeros(score_i2t.shape, dtype=torch.bool, device=caption_image.device)
    own[caption_image, torch.arange(len(caption_image), device=own.device)] = True
    own = own.to(score_i2t.device)
    best = score_i2t.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
    # "not below" instead of "at least": a score that is not a number must count against us, too
    rank_i2t = (~(score_i2t < best) & ~own).sum(dim=1)
    mine = score_t2i.gather(1, caption_image.to(score_t2i.device)[:, None])
    rank_t2i = (~(score_t2i < mine)).sum(dim=1) - 1
    return recalls_of_ranks(rank_i2t, rank_t2i)


def recalls_of_ranks(rank_i2t: Tensor, rank_t2i: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways, in percent.

    Args:
        rank_i2t: int64 [I], wrong captions that are not below the image's best right one.
        rank_t2i: int64 [C], wrong images that are not below the right one.
    """
    metrics = {}
    for direction, rank in (("i2t", rank_i2t), ("t2i", rank_t2i)):
        for k in (1, 5, 10):
            metrics[f"{direction}_r{k}"] = 100.0 * (rank < k).double().mean().item()
    metrics["r_mean"] = sum(metrics.values()) / 6
    return metrics


def shortlist(sims: Tensor, k: int) -> Tensor:
    """The k best columns of each row: bool of the shape of `sims`."""
    best = sims.topk(min(k, sims.shape[1]), dim=1).indices
    return torch.zeros_like(sims, dtype=torch.bool).scatter_(1, best, True)


def rerank(sims: Tensor, match: Tensor, k: int) -> Tensor:
    """Scores that matching re-ranks among each row's k best by contrast, as the reference does.

    Args:
        sims: [rows, columns] cosines (not divided by the temperature).
        match: [rows, columns] matching logits, needed at `shortlist(sims, k)` only.
        k: how many of each row are re-ranked.

    Returns:
        [rows, columns]: cosine plus matching logit, `NOT_RANKED` elsewhere.
    """
    return torch.where(shortlist(sims, k), sims + match, NOT_RANKED)


def pairs_to_match(sims: Tensor, k: int) -> Tensor:
    """Pairs that re-ranking needs in either direction: bool [I, C] for cosines [I, C]."""
    return shortlist(sims, k) | shortlist(sims.T, k).T


def mean_r1(metrics: dict[str, float]) -> float:
    """The score by which checkpoints are compared, percent."""
    return (metrics["i2t_r1"] + metrics["t2i_r1"]) / 2


def chunks(count: int, size: int) -> Iterable[slice]:
    """Slices that cover `count` items, `size` at a time."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def own_batches(count: int, size: int, world: World) -> list[list[int]]:
    """Item numbers of the validation batches that this rank works on."""
    return [list(range(s.start, s.stop)) for s in chunks(count, size)][world.rank :: world.size]


def describe_recalls(metrics: Mapping[str, float], images: int) -> str:
    """One line: recall at 1, 5 and 10 both ways, by contrast and re-ranked."""
    names = {
        "i2t": "i2t", "t2i": "t2i", "itm_i2t": "re-ranked i2t", "itm_t2i": "re-ranked t2i",
    }  # fmt: skip
    recalls = "  ".join(
        f"{name} R@1/5/10 " + "/".join(f"{metrics[f'{key}_r{k}']:.1f}" for k in (1, 5, 10))
        for key, name in names.items()
        if f"{key}_r1" in metrics
    )
    return f"{recalls}  (chance R@1 {100 / images:.2f})"
