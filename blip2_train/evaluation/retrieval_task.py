"""`task=retrieval`: which caption belongs to which image, by contrast and re-ranked by matching."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip2_train.data.batch import EvalSample
from blip2_train.data.stream import EvalStream
from blip2_train.errors import UserError
from blip2_train.evaluation.inference import Blip2
from blip2_train.evaluation.matching import Pairs, match_pairs
from blip2_train.evaluation.ranking import Shortlist, contrast, reranked_ranks
from blip2_train.evaluation.retrieval import recalls_of_ranks
from blip2_train.evaluation.samples import Row
from blip2_train.evaluation.task import Outcome, Task
from blip2_train.evaluation.work import Work

SHOWN = 3  # that the page shows of what was found


@dataclass
class Encoded:
    """The features of a whole split.

    Attributes:
        image_feats: float32 [I, Q, E].
        text_feat: float32 [C, E].
        caption_image: int64 [C].
        texts: of the captions.
        items: numbers of the images within the split.
        skipped: samples that could not be used.
        repeated: samples whose image came before; their captions belong to that one.
    """

    image_feats: Tensor
    text_feat: Tensor
    caption_image: Tensor
    texts: list[str]
    items: list[int]
    skipped: list[dict[str, str]]
    repeated: int


class RetrievalTask(Task):
    """Recall at 1, 5 and 10 both ways.

    Args:
        k: best of each image and of each caption by contrast that matching ranks again; 0: none.

    Raises:
        UserError: `k` is no whole number of at least 0.
    """

    def __init__(self, k: int = 128) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 0:
            raise UserError(f"task.k={k} must be a whole number of at least 0")
        self.k = k

    def check(self, blip2: Blip2) -> None:
        """Refuses a model that was not trained by contrast."""
        blip2.needs("stage1", "clip", loss="itc")

    def run(self, blip2: Blip2, images: EvalStream, work: Work) -> Outcome:
        """Evaluates; all ranks call it."""
        split = encode_split(blip2, images, work, self.batch_size)
        k = self.k if blip2.kind == "stage1" and blip2.cfg["loss"]["weights"]["itm"] else 0
        found = contrast(
            split.image_feats,
            split.text_feat,
            split.caption_image,
            k=max(k, SHOWN),
            world=work.world,
            device=blip2.device,
        )
        rank_i2t, captions, nearest = found.rank_i2t, found.captions, found.images
        metrics = recalls_of_ranks(found.rank_i2t, found.rank_t2i)
        counts = {
            "images": len(split.items),
            "captions": len(split.texts),
            "skipped": len(split.skipped),
            "repeated images": split.repeated,
        }
        if k:
            captions, nearest = captions.best(k), nearest.best(k)
            pairs = Pairs(captions, nearest)
            counts["matched pairs"] = len(pairs)
            logits = match_pairs(
                blip2, pairs, images, split.items, split.texts, work, batch_size=self.batch_size
            )
            rank_i2t, rank_t2i, captions, nearest = rerank(
                pairs, logits, captions, nearest, split.caption_image
            )
            again = recalls_of_ranks(rank_i2t, rank_t2i)
            metrics |= {f"itm_{name}": value for name, value in again.items()}
        best: list[Row] = []
        worst: list[Row] = []
        if work.world.rank == 0 and self.samples:
            order = rank_i2t.argsort(stable=True).tolist()
            rows = _Rows(split, images, captions, nearest, rank_i2t)
            best = [rows.of(image) for image in order[: self.samples]]
            rest = order[len(best) :]
            worst = [rows.of(image) for image in rest[::-1][: self.samples]]
        text = "Green: belongs together. What each image finds, and which images its first caption "
        text += "finds; the rank is that of its best caption among those of other images."
        return Outcome(metrics, counts, best=best, worst=worst, skipped=split.skipped, text=text)


def encode_split(blip2: Blip2, images: EvalStream, work: Work, batch_size: int) -> Encoded:
    """Contrastive features of all images and captions of a split; all ranks call it.

    Raises:
        UserError: no image of it can be used.
    """

    def encode(items: list[Any]) -> dict[str, Any]:
        samples = [item for item in items if isinstance(item, EvalSample)]
        texts = [caption for sample in samples for caption in sample.captions]
        pixels = [sample.image for sample in samples]
        size = blip2.image_size
        empty = torch.empty(0, 3, size, size, dtype=torch.uint8)
        return {
            "image": blip2.encode_image(torch.stack(pixels) if pixels else empty),
            "text": blip2.encode_text(texts),
            "texts": texts,
            "counts": [len(sample.captions) for sample in samples],
            "items": [sample.item for sample in samples],
            "ids": [sample.image_id for sample in samples],
            "skipped": [dict(item) for item in items if not isinstance(item, EvalSample)],
        }

    parts = work.map("features", images, batch_size, encode)
    skipped = [line for part in parts for line in part["skipped"]]
    items = [item for part in parts for item in part["items"]]
    ids = [image_id for part in parts for image_id in part["ids"]]
    counts = [count for part in parts for count in part["counts"]]
    if not items:
        reason = f", the first because of: {skipped[0]['reason']}" if skipped else ""
        raise UserError(f"none of the {len(images)} images can be used{reason}")
    first: dict[int, int] = {}  # image id -> its number among those that are kept
    kept: list[int] = []
    owner: list[int] = []
    for row, image_id in enumerate(ids):
        if image_id not in first:
            first[image_id] = len(kept)
            kept.append(row)
        owner.append(first[image_id])
    image_feats = torch.cat([part["image"] for part in parts])
    return Encoded(
        image_feats if len(kept) == len(ids) else image_feats[kept],
        torch.cat([part["text"] for part in parts]),
        torch.tensor(owner).repeat_interleave(torch.tensor(counts)),
        [text for part in parts for text in part["texts"]],
        [items[row] for row in kept],
        skipped,
        len(ids) - len(kept),
    )


def rerank(
    pairs: Pairs,
    logits: Tensor,
    captions: Shortlist,
    images: Shortlist,
    caption_image: Tensor,
) -> tuple[Tensor, Tensor, Shortlist, Shortlist]:
    """Ranks both ways by cosine plus matching logit, and the shortlists in that order.

    Args:
        pairs: all pairs of both lists.
        logits: [n] of them.
        captions: shortlist of each of I images.
        images: shortlist of each of C captions.
        caption_image: int64 [C].

    Returns:
        int64 [I] and [C]; the shortlists, best first.
    """
    numbers = torch.arange(len(captions.index))[:, None]
    owned = caption_image.bincount(minlength=len(numbers))
    match = logits[pairs.find(numbers, captions.index)]
    own = caption_image[captions.index] == numbers
    rank_i2t = reranked_ranks(captions, match, own, owned, len(caption_image))
    match_t2i = logits[pairs.find(images.index, torch.arange(len(caption_image))[:, None])]
    own_t2i = images.index == caption_image[:, None]
    ones = torch.ones_like(caption_image)
    rank_t2i = reranked_ranks(images, match_t2i, own_t2i, ones, len(numbers))
    return rank_i2t, rank_t2i, _sorted(captions, match), _sorted(images, match_t2i)


def _sorted(listed: Shortlist, match: Tensor) -> Shortlist:
    score = listed.score + match
    order = score.argsort(dim=1, descending=True, stable=True)
    return Shortlist(listed.index.gather(1, order), score.gather(1, order))


class _Rows:
    """Rows of the page."""

    def __init__(
        self,
        split: Encoded,
        images: EvalStream,
        captions: Shortlist,
        nearest: Shortlist,
        ranks: Tensor,
    ) -> None:
        self.split = split
        self.images = images
        self.captions = captions
        self.nearest = nearest
        self.ranks = ranks

    def of(self, image: int) -> Row:
        """What was found for an image, and for its first caption."""
        split = self.split
        own = (split.caption_image == image).nonzero().squeeze(1).tolist()
        texts = self.captions.index[image, :SHOWN].tolist()
        found = self.nearest.index[own[0], :SHOWN].tolist()
        return Row(
            self._picture(image),
            {},
            [split.texts[caption] for caption in own],
            [(split.texts[t], int(split.caption_image[t]) == image) for t in texts],
            split.texts[own[0]],
            [(self._picture(other), other == image) for other in found],
            notes={"rank": str(int(self.ranks[image]) + 1)},
        )

    def _picture(self, image: int) -> Any:
        return self.images.picture(self.split.items[image])
