"""Ranks and shortlists of image-text retrieval, without a matrix of all images and all captions.

Similarities are computed block by block, counted and forgotten: of each row only its best k stay.
Blocks have the same shape whatever the number of ranks, so no result depends on it.

Shapes: I images with Q queries each, C captions, E width of the features.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from blip2_train.distributed import World, gather_objects
from blip2_train.evaluation.retrieval import NOT_RANKED
from blip2_train.models.linear import product

QUERIES_AT_ONCE = 2048  # rows of a block
CAPTIONS_AT_ONCE = 1024  # columns of a block
MERGED_AT_ONCE = 4096  # captions whose shortlists ranks exchange at a time
INDEX_BITS = 32


@dataclass
class Shortlist:
    """The best of each row, best first; of equal ones those with the lower index.

    Attributes:
        index: int64 [rows, k], columns; fewer than k where there are not so many.
        score: [rows, k], cosines.
    """

    index: Tensor
    score: Tensor

    def best(self, k: int) -> "Shortlist":
        """The first k of each row."""
        return Shortlist(self.index[:, :k], self.score[:, :k])


@dataclass
class Contrast:
    """Retrieval by contrast, the same on every rank, on the CPU.

    Attributes:
        rank_i2t: int64 [I], captions of others that are not below the image's best own caption.
        rank_t2i: int64 [C], other images that are not below the caption's own.
        captions: shortlist of each image.
        images: shortlist of each caption.
    """

    rank_i2t: Tensor
    rank_t2i: Tensor
    captions: Shortlist
    images: Shortlist


@torch.no_grad()
def contrast(
    image_feats: Tensor,
    text_feat: Tensor,
    caption_image: Tensor,
    *,
    k: int,
    world: World | None = None,
    device: torch.device | None = None,
) -> Contrast:
    """Ranks images and captions by the maximum over queries of the cosine; all ranks call it.

    Ties count against us, and so does a similarity that is no number.

    Args:
        image_feats: [I, Q, E], L2-normalised, the same on every rank, as are the next two.
        text_feat: [C, E].
        caption_image: int64 [C], the image of each caption; every image has at least one.
        k: length of the shortlists.
        world: the ranks, which share the blocks.
        device: computes; None: where the features are.
    """
    world, device = world or World(), device or image_feats.device
    blocks = _Blocks(image_feats, text_feat, caption_image, device)
    own = list(range(blocks.count))[world.rank :: world.size]

    best = torch.full((blocks.images,), -torch.inf, dtype=image_feats.dtype)  # of own captions
    mine = torch.full((blocks.captions,), torch.nan, dtype=image_feats.dtype)  # of the own image
    for n in own:
        _score_own(blocks, n, best, mine)
    for rank, (theirs, scores) in enumerate(
        gather_objects(_sparse(blocks, own, best, mine), world)
    ):
        where, columns = blocks.rows_of(range(rank, blocks.count, world.size))
        best[where], mine[columns] = theirs, scores

    k_captions, k_images = min(k, blocks.captions), min(k, blocks.images)
    rank_i2t = torch.zeros(blocks.images, dtype=torch.int64)
    rank_t2i = torch.zeros(blocks.captions, dtype=torch.int64)
    captions: dict[int, Tensor] = {}  # block -> keys [b, k]
    images = torch.full((blocks.captions, k_images), LOWEST)
    quiet = None if world.rank == 0 else True  # None: shown on a terminal
    for n in tqdm(own, desc="contrast", unit="block", disable=quiet):
        rows = blocks.rows(n)
        keys = torch.full((len(rows), k_captions), LOWEST, device=device)
        above = torch.zeros(len(rows), dtype=torch.int64, device=device)
        own_best = best[rows.start : rows.stop].to(device)[:, None]
        numbers = torch.arange(rows.start, rows.stop, device=device)
        for part in blocks.parts():
            sims = blocks.sims(n, part)
            others = blocks.caption_image[part] != numbers[:, None]
            # "not below" instead of "at least": what is no number counts against us, too
            above += (~(sims < own_best) & others).sum(dim=1)
            own_mine = mine[part].to(device)
            rank_t2i[part] += (~(sims < own_mine) & others).sum(dim=0).cpu()
            columns = torch.arange(part.start, part.stop, device=device)
            keys = _merged(keys, to_keys(sims, columns), k_captions)
            found = to_keys(sims.T.contiguous(), numbers)
            images[part] = _merged(images[part].to(device), found, k_images).cpu()
        rank_i2t[rows.start : rows.stop] = above.cpu()
        captions[n] = keys.cpu()

    captions_of: dict[int, Tensor] = {}
    for ranks, shortlists in gather_objects((rank_i2t[blocks.rows_of(own)[0]], captions), world):
        where = blocks.rows_of(sorted(shortlists))[0]
        rank_i2t[where] = ranks
        captions_of |= shortlists
    rank_t2i = torch.stack(gather_objects(rank_t2i, world)).sum(dim=0)
    for start in range(0, blocks.captions, MERGED_AT_ONCE):
        some = slice(start, start + MERGED_AT_ONCE)
        everyones = torch.cat(gather_objects(images[some].clone(), world), dim=1)
        images[some] = everyones.topk(k_images, dim=1).values
    of_images = torch.cat([captions_of[n] for n in range(blocks.count)])
    return Contrast(rank_i2t, rank_t2i, from_keys(of_images), from_keys(images))


def reranked_ranks(
    listed: Shortlist, match: Tensor, own: Tensor, owned: Tensor, total: int
) -> Tensor:
    """Ranks within shortlists by cosine plus matching logit, as the reference re-ranks.

    What is not in a row's list has `NOT_RANKED`. Ties count against us.

    Args:
        listed: of n rows.
        match: [n, k] matching logits.
        own: bool [n, k], which of them are right.
        owned: int64 [n], right ones of each row, the unlisted included.
        total: columns there are.

    Returns:
        int64 [n]: wrong ones that are not below the best right one.
    """
    score = listed.score + match
    found = own.sum(dim=1)
    best = score.masked_fill(~own, -torch.inf).amax(dim=1)
    # an own one that is unlisted has NOT_RANKED; a maximum with no number is no number
    best = torch.where(found < owned, torch.maximum(best, best.new_tensor(NOT_RANKED)), best)
    listed_wrong = (~own).sum(dim=1)
    unlisted_wrong = (total - owned) - listed_wrong
    above = (~(score < best[:, None]) & ~own).sum(dim=1)
    return above + torch.where(~(best > NOT_RANKED), unlisted_wrong, 0)


# -- keys: a score and an index in one number, whose order is that of a shortlist ------------------

LOWEST = torch.iinfo(torch.int64).min


def to_keys(score: Tensor, index: Tensor) -> Tensor:
    """Distinct int64 [rows, columns] that sort by score and, of equal scores, by lower index.

    Args:
        score: [rows, columns], taken in float32; what is no number comes first.
        index: int64 [columns], below 2 ** 32.
    """
    score = score.float() + 0.0  # there is no -0.0 then
    bits = score.view(torch.int32).long()  # these sort as the numbers do, negative ones backwards
    ordered = torch.where(bits >= 0, bits, bits ^ (2**31 - 1))
    ordered = torch.where(score.isnan(), 2**31 - 1, ordered)
    return (ordered << INDEX_BITS) + (2**INDEX_BITS - 1 - index)


def from_keys(keys: Tensor) -> Shortlist:
    """Scores and indices again, in descending order of the keys [rows, k]."""
    keys = keys.sort(dim=1, descending=True).values
    ordered = keys >> INDEX_BITS
    index = 2**INDEX_BITS - 1 - (keys - (ordered << INDEX_BITS))
    bits = torch.where(ordered >= 0, ordered, ordered ^ (2**31 - 1))
    return Shortlist(index, bits.int().view(torch.float32))


def _merged(keys: Tensor, more: Tensor, k: int) -> Tensor:
    return torch.cat([keys, more], dim=1).topk(k, dim=1).values


# -- blocks ----------------------------------------------------------------------------------------


class _Blocks:
    """Similarities of some images with some captions, always of one shape."""

    def __init__(
        self, image_feats: Tensor, text_feat: Tensor, caption_image: Tensor, device: torch.device
    ) -> None:
        self.images, queries = image_feats.shape[:2]
        self.captions = len(text_feat)
        self.size = min(self.images, max(1, QUERIES_AT_ONCE // queries))
        self.width = min(self.captions, CAPTIONS_AT_ONCE)
        self.count = -(-self.images // self.size)
        self.image_feats = image_feats.to(device)
        self.text_feat = text_feat.to(device)
        self.caption_image = caption_image.to(device)
        # captions by their images: those of a block stand together
        self.order = caption_image.cpu().argsort(stable=True)
        self.starts = torch.searchsorted(
            caption_image.cpu()[self.order], torch.arange(self.images + 1)
        )

    def rows(self, n: int) -> range:
        """Images of a block."""
        return range(n * self.size, min((n + 1) * self.size, self.images))

    def columns(self, n: int) -> Tensor:
        """int64, the captions that belong to the images of a block."""
        rows = self.rows(n)
        return self.order[int(self.starts[rows.start]) : int(self.starts[rows.stop])]

    def rows_of(self, numbers: "range | list[int]") -> tuple[Tensor, Tensor]:
        """int64, images and captions of some blocks."""
        nothing = torch.empty(0, dtype=torch.int64)
        rows = [torch.tensor(self.rows(n)) for n in numbers]
        columns = [self.columns(n) for n in numbers]
        return torch.cat([nothing, *rows]), torch.cat([nothing, *columns])

    def parts(self) -> Iterator[slice]:
        """Columns of the blocks."""
        for start in range(0, self.captions, self.width):
            yield slice(start, min(start + self.width, self.captions))

    def sims(self, n: int, columns: "slice | Tensor") -> Tensor:
        """[b, c] similarities of a block's images with at most `width` captions."""
        rows = self.rows(n)
        image = _padded(self.image_feats[rows.start : rows.stop], self.size)
        text = self.text_feat[columns]
        count = len(text)
        # One shape for all: another one might be multiplied by another kernel, which rounds
        # differently, and ties would not be ties.
        with torch.autocast(image.device.type, enabled=False):
            found = product(image.flatten(0, 1), _padded(text, self.width))
        return found.view(self.size, -1, self.width).amax(dim=1)[: len(rows), :count]


def _padded(rows: Tensor, count: int) -> Tensor:
    missing = count - len(rows)
    return rows if not missing else F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing))


def _score_own(blocks: _Blocks, n: int, best: Tensor, mine: Tensor) -> None:
    """Similarities of a block's images with their own captions, into `best` and `mine`."""
    first = blocks.rows(n).start
    for columns in blocks.columns(n).split(blocks.width):
        sims = blocks.sims(n, columns.to(blocks.text_feat.device)).cpu()
        owner = blocks.caption_image[columns.to(blocks.caption_image.device)].cpu()
        mine[columns] = sims[owner - first, torch.arange(len(columns))]
        for image, score in zip(owner.tolist(), mine[columns], strict=True):
            best[image] = torch.maximum(best[image], score)  # no number stays none


def _sparse(blocks: _Blocks, own: list[int], best: Tensor, mine: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = blocks.rows_of(own)
    return best[rows], mine[columns]
