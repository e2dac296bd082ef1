"""Matching logits of many (image, caption) pairs, as re-ranking needs them.

Pairs lie sorted by image and are cut into portions of so many pairs and images at most. A portion's
images are read and pass the tower once; only its own keys and values are in memory, and portions
are shared evenly among ranks, however unevenly the pairs lie on images.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip2_train.data.batch import EvalSample
from blip2_train.data.stream import EvalStream
from blip2_train.evaluation.inference import Blip2
from blip2_train.evaluation.ranking import Shortlist
from blip2_train.evaluation.retrieval import chunks
from blip2_train.evaluation.work import Work
from blip2_train.models.stage1 import widen

PAIRS_AT_ONCE = 256  # of one pass of the Q-Former
PAIRS_OF_A_PORTION = 4096


class Pairs:
    """Distinct pairs of images and captions, sorted by image, then caption.

    Args:
        captions: shortlist of each image.
        images: shortlist of each caption.

    Attributes:
        image: int64 [n].
        caption: int64 [n].
    """

    def __init__(self, captions: Shortlist, images: Shortlist) -> None:
        self.total = len(images.index)  # captions
        rows = torch.arange(len(captions.index))[:, None]
        columns = torch.arange(self.total)[:, None]
        codes = [rows * self.total + captions.index, images.index * self.total + columns]
        self.codes = torch.cat([code.flatten() for code in codes]).unique()  # sorted
        self.image = self.codes // self.total
        self.caption = self.codes % self.total

    def __len__(self) -> int:
        return len(self.codes)

    def find(self, image: Tensor, caption: Tensor) -> Tensor:
        """Numbers of pairs that are among them; the tensors broadcast."""
        return torch.searchsorted(self.codes, image * self.total + caption)

    def portions(self, images: int) -> list[slice]:
        """Consecutive pairs: at most `PAIRS_OF_A_PORTION` of them, of at most so many images."""
        _, counts = self.image.unique_consecutive(return_counts=True)
        portions, start, end, held = [], 0, 0, 0
        for count in counts.tolist():
            if held == images or (held and end + count - start > PAIRS_OF_A_PORTION):
                portions.append(slice(start, end))
                start, held = end, 0
            while end + count - start > PAIRS_OF_A_PORTION:  # more pairs than fit, of one image
                portions.append(slice(start, start + PAIRS_OF_A_PORTION))
                count -= start + PAIRS_OF_A_PORTION - end
                start = end = start + PAIRS_OF_A_PORTION
            end, held = end + count, held + 1
        if end > start:
            portions.append(slice(start, end))
        return portions


@dataclass(frozen=True)
class Portion:
    """Some pairs, with the images read; made by a loader process.

    Attributes:
        pixels: uint8 [b, 3, S, S] of the images.
        counts: pairs of each image.
        caption: int64 [n], captions of the pairs, image by image.
    """

    pixels: Tensor
    counts: list[int]
    caption: Tensor


class Portions:
    """Portions of pairs, numbered, read when they are asked for.

    Args:
        pairs: all of them.
        images: the split.
        items: numbers within the split of the images that `pairs` counts.
        at_once: images of a portion.
    """

    def __init__(
        self, pairs: Pairs, images: EvalStream, items: Sequence[int], at_once: int
    ) -> None:
        self.pairs = pairs
        self.images = images
        self.items = items
        self.slices = pairs.portions(at_once)

    def __len__(self) -> int:
        return len(self.slices)

    @property
    def digest(self) -> str:
        """Of the pairs and how they lie in portions: the number of portions does not tell."""
        found = hashlib.sha256(self.pairs.codes.numpy().tobytes())
        found.update(repr(self.slices).encode())
        return found.hexdigest()[:8]

    def __getitem__(self, number: int) -> Portion:
        part = self.slices[number]
        found, counts = self.pairs.image[part].unique_consecutive(return_counts=True)
        samples = [self.images[self.items[image]] for image in found.tolist()]
        pixels = [sample.image for sample in samples if isinstance(sample, EvalSample)]
        assert len(pixels) == len(samples), "an image could be read before, and cannot any more"
        return Portion(torch.stack(pixels), counts.tolist(), self.pairs.caption[part])


def match_pairs(
    blip2: Blip2,
    pairs: Pairs,
    images: EvalStream,
    items: Sequence[int],
    texts: Sequence[str],
    work: Work,
    *,
    batch_size: int,
) -> Tensor:
    """Matching logits of pairs; all ranks call it.

    Args:
        blip2: of stage 1.
        pairs: wanted.
        images: the split.
        items: numbers of the images within it.
        texts: of the captions.
        work: shares the portions among ranks.
        batch_size: images of a portion, at most.

    Returns:
        float32 [n] on the CPU, the head's logit for "match" of each pair.
    """
    portions = Portions(pairs, images, items, batch_size)

    def match(batch: list[Any]) -> Tensor:
        return torch.cat([_match(blip2, portion, texts) for portion in batch])

    return torch.cat([torch.empty(0), *work.map(f"matching-{portions.digest}", portions, 1, match)])


def _match(blip2: Blip2, portion: Portion, texts: Sequence[str]) -> Tensor:
    model = blip2.model
    ends = torch.tensor(portion.counts).cumsum(dim=0).tolist()
    starts = [0, *ends[:-1]]
    scores = []
    with blip2.autocast():
        image = model.qformer.project_image(model.vision(portion.pixels.to(blip2.device)))
        for part in chunks(ends[-1], PAIRS_AT_ONCE):
            # the rows of an image look at it side by side; nothing is copied
            shown = [
                ([(key[b : b + 1], value[b : b + 1]) for key, value in image], rows)
                for b, (start, end) in enumerate(zip(starts, ends, strict=True))
                if (rows := min(end, part.stop) - max(start, part.start)) > 0
            ]
            ids, mask = blip2.tokens([texts[n] for n in portion.caption[part].tolist()])
            scores.append(widen(model.match(shown, ids, mask)[:, 1]).float().cpu())
    return torch.cat(scores)
