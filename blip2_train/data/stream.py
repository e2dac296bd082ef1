"""The order of `order.py`, carried out over shards: training micro-batches and evaluation images.

The global batch is the unit. A contrastive batch is contiguous in the order, rank r takes a
contiguous slice of each, and loader worker w of W builds the micro-batches w, w + W, ... whole:
what the model sees at a step depends neither on the ranks nor on the workers. The only state is how
many samples were drawn from each source.
"""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from blip2_train.data.batch import EvalSample, Sample, Skipped, sample_id
from blip2_train.data.images import BadImage, load_rgb
from blip2_train.data.order import Mixture, ShuffledOrder
from blip2_train.data.shards import (
    RawSample,
    SampleError,
    ShardError,
    ShardInfo,
    ShardReader,
    offsets_path,
    read_index,
)
from blip2_train.data.text import clean_caption
from blip2_train.errors import UserError
from blip2_train.seeding import stable_hash

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")
CaptionChoice = Literal["uniform", "first", "weighted"]
# The bytes of an image file -> uint8 [3, S, S], and whether it is still to be flipped.
TrainTransformation = Callable[[bytes, torch.Generator], tuple[torch.Tensor, bool]]

RETRY_SECONDS = (1.0, 4.0, 16.0)  # between attempts: a file server that fails over needs some
MAX_OPEN_SHARDS = 64


@dataclass(frozen=True)
class Source:
    """One split of a folder of shards and its share of the mixture."""

    name: str
    folder: Path
    split: str
    weight: float
    shards: list[ShardInfo]  # sorted by name


def open_source(name: str, shards: str | Path, split: str, weight: float = 1.0) -> Source:
    """Read which shards a source has.

    Args:
        name: the source's key in `data.sources`.
        shards: folder with shards and their `index.json`.
        split: the split to use.
        weight: relative weight in the mixture.

    Raises:
        UserError: folder, index or split is missing, or the split is empty; says what there is.
    """
    folder = Path(shards)
    setting = f"data.sources.{name}.shards={folder}"
    if not folder.is_dir():
        near = sorted(path.name for path in folder.parent.glob("*") if path.is_dir())
        raise UserError(
            f"{setting}: there is no such folder; {folder.parent} holds "
            f"{', '.join(near[:20]) or 'no folders'}. Make shards with blip2-prepare."
        )
    try:
        index = read_index(folder)
    except UserError as error:
        raise UserError(f"{setting}: {error}") from None
    chosen = [index[name] for name in sorted(index) if index[name].split == split]
    if not any(info.samples for info in chosen):
        splits = sorted({info.split for info in index.values() if info.samples})
        raise UserError(
            f"{setting}: there are no samples of split {split!r}; its splits are "
            f"{', '.join(splits) or 'all empty'}. Name one of them, or add this one with "
            "blip2-prepare."
        )
    _check_files(setting, folder, chosen)
    return Source(name, folder, split, weight, chosen)


def _check_files(setting: str, folder: Path, shards: Sequence[ShardInfo]) -> None:
    """Refuse shards that are missing or not of the index's size; costs one directory listing."""
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}
    for info in shards:
        size = sizes.get(info.name)
        if size is None:
            found = "is missing"
        elif size != info.bytes:
            found = f"has {size} bytes, index.json says {info.bytes}"
        elif offsets_path(folder / info.name).name not in sizes:
            found = "has no .offsets.npy beside it"
        else:
            continue
        raise UserError(
            f"{setting}: {info.name} {found}. Prepare the folder again; blip2-prepare verify "
            "checks all of it."
        )


class ShardPool:
    """Reads samples by (source, shard, index) and keeps the last used shards open."""

    def __init__(self, max_open: int = MAX_OPEN_SHARDS) -> None:
        """Open nothing yet: every loader worker opens its own files."""
        self._max_open = max_open
        self._readers: OrderedDict[Path, ShardReader] = OrderedDict()

    def read(self, source: Source, shard: int, index: int) -> RawSample:
        """Read one sample; I/O errors are retried, never taken for a bad sample.

        Raises:
            OSError: it failed in every attempt.
            ShardError: the shard is unusable.
            SampleError: this sample alone is.
        """
        info = source.shards[shard]
        path = source.folder / info.name
        for pause in RETRY_SECONDS:
            try:
                return self._reader(path, info).read(index)
            except OSError as error:
                # A stale handle of a network file system never recovers: open the file anew.
                self._close(path)
                log.warning("%s: %s; trying again in %g s", path, error, pause)
                time.sleep(pause)
        return self._reader(path, info).read(index)

    def _reader(self, path: Path, info: ShardInfo) -> ShardReader:
        if path not in self._readers:
            while len(self._readers) >= self._max_open:
                self._close(next(iter(self._readers)))
            self._readers[path] = ShardReader(path, info)
        self._readers.move_to_end(path)
        return self._readers[path]

    def _close(self, path: Path) -> None:
        self._readers.pop(path).close()


class TrainStream(IterableDataset[Batch]):
    """The endless sequence of one rank's micro-batches; use with `DataLoader(batch_size=None)`.

    A sample that cannot be used is replaced by the next usable one of its shard, in stored order;
    caption, crop, flip and `Sample.uniform` are drawn, in this order, from a generator seeded with
    (seed, epoch, source, shard, key). Iterating starts at `drawn` each time.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        transforms: Mapping[str, TrainTransformation | None],
        collate: Callable[[list[Sample], list[Skipped]], Batch],
        *,
        contrastive_batch: int,
        seed: int,
        shuffle_window: int,
        rank: int = 0,
        world: int = 1,
        drawn: Mapping[str, int] | None = None,
        caption: CaptionChoice = "uniform",
        max_words: int = 50,
        prompt: str = "",
        max_open_shards: int = MAX_OPEN_SHARDS,
    ) -> None:
        """Describe the stream; no shard is opened.

        Args:
            sources: in the order that decides ties of the mixture.
            transforms: of each source by name, see `TrainTransform`; None: its images are not
                decoded, for training on text alone.
            collate: samples of a micro-batch, and what was skipped for it -> batch; called in the
                worker, so it must pickle.
            contrastive_batch: samples over all ranks, `batch.size / batch.accumulate`.
            seed: of order, captions and transforms.
            shuffle_window: shards whose samples are mixed.
            rank: this process's slice of each contrastive batch.
            world: number of slices.
            drawn: samples of each source that were drawn before, to continue after them.
            caption: one usable caption `uniform`ly, always the `first`, or drawn as the sample's
                `caption_weights` say (`weighted`; uniformly where it has none or all are 0).
            max_words: of a caption, see `clean_caption`.
            prompt: put in front of every caption.
            max_open_shards: per worker.

        Raises:
            UserError: a value that cannot be carried out.
        """
        super().__init__()
        if contrastive_batch < 1 or contrastive_batch % world:
            raise UserError(
                f"batch.size / batch.accumulate = {contrastive_batch} samples cannot be cut into "
                f"{world} equal slices, one per device; make it a multiple of {world}."
            )
        if caption not in get_args(CaptionChoice):
            choices = " or ".join(repr(choice) for choice in get_args(CaptionChoice))
            raise UserError(f"data.caption={caption!r} must be {choices}.")
        self._sources = {source.name: source for source in sources}
        if unknown := set(drawn or {}) - set(self._sources):
            raise UserError(
                f"samples were drawn from {', '.join(sorted(unknown))} before, but data.sources "
                f"names {', '.join(self._sources)}; the sources of a run cannot change."
            )
        self.mixture = Mixture({source.name: source.weight for source in sources})
        self.drawn = {name: (drawn or {}).get(name, 0) for name in self._sources}
        self._orders = {
            source.name: ShuffledOrder(
                [info.samples for info in source.shards], seed, shuffle_window
            )
            for source in sources
        }
        self._transforms = transforms
        self._collate = collate
        self._contrastive_batch = contrastive_batch
        self._per_device = contrastive_batch // world
        self._rank = rank
        self._seed = seed
        self._caption = caption
        self._max_words = max_words
        self._prompt = prompt
        self._pool = ShardPool(max_open_shards)

    def drawn_after(self, micro_batches: int) -> dict[str, int]:
        """Return the samples drawn from each source, over all ranks, after so many micro-batches.

        Args:
            micro_batches: that each rank has taken since the start at `drawn`.
        """
        return self.mixture.advance(self.drawn, micro_batches * self._contrastive_batch)

    def epochs_after(self, micro_batches: int) -> dict[str, float]:
        """Return how often each source was gone through by then, since the run began.

        Args:
            micro_batches: that each rank has taken since the start at `drawn`.
        """
        drawn = self.drawn_after(micro_batches)
        return {name: drawn[name] / order.num_samples for name, order in self._orders.items()}

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        counts = self.drawn_after(worker)
        while True:
            own = self.mixture.advance(counts, self._rank * self._per_device)
            skipped: list[Skipped] = []
            samples = [
                self._draw(name, n, skipped) for name, n in self.mixture.run(own, self._per_device)
            ]
            yield self._collate(samples, skipped)
            counts = self.mixture.advance(counts, workers * self._contrastive_batch)

    def _draw(self, name: str, n: int, skipped: list[Skipped]) -> Sample:
        """Return sample `n` of a source, or what stands in for it; adds to `skipped`."""
        source = self._sources[name]
        epoch, shard, index = self._orders[name].locate(n)
        info = source.shards[shard]
        for step in range(info.samples):
            place = (index + step) % info.samples
            raw = _read(self._pool, source, shard, place, self._max_words)
            if isinstance(raw, _Usable):
                try:
                    return self._augment(source, info, epoch, raw)
                except BadImage as error:
                    raw = _skip(source, shard, raw.key, str(error))
            skipped.append(raw)
        raise ShardError(
            f"{source.folder / info.name}: none of its {info.samples} samples can be used, the "
            f"last one because of: {skipped[-1]['reason']}"
        )

    def _augment(self, source: Source, info: ShardInfo, epoch: int, raw: _Usable) -> Sample:
        generator = torch.Generator()
        generator.manual_seed(stable_hash(self._seed, epoch, source.name, info.name, raw.key))
        choice = 0
        if self._caption == "weighted" and any(raw.weights):
            weights = torch.tensor(raw.weights, dtype=torch.float64)
            choice = int(torch.multinomial(weights, 1, generator=generator))
        elif self._caption != "first":
            choice = int(torch.randint(len(raw.captions), (1,), generator=generator))
        transform = self._transforms[source.name]
        image, flip = _no_image(), False
        if transform is not None:
            image, flip = transform(raw.image, generator)
        # After all other draws, which stay what they were before there was this one.
        uniform = torch.rand(1, generator=generator).item()
        return Sample(
            image=image,
            text=self._prompt + raw.captions[choice],
            image_id=sample_id(source.name, info.name, raw.key, raw.image_id),
            key=f"{source.name}/{info.name}/{raw.key}",
            captions=raw.captions[choice:] + raw.captions[:choice],
            uniform=uniform,
            flip=flip,
        )


class EvalStream(Dataset[EvalSample | Skipped]):
    """The images of one source in stored order, each with all its captions; see `collate_eval`.

    An image that cannot be used is an item of type `Skipped`: found out when it is read, since
    decoding all in advance would cost an epoch.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image.Image], torch.Tensor] | None,
        *,
        max_images: int | None = None,
        max_words: int = 50,
        prompt: str = "",
        max_open_shards: int = MAX_OPEN_SHARDS,
    ) -> None:
        """Describe the set; no shard is opened.

        Args:
            source: the validation split.
            transform: image -> uint8 [3, S, S]; None: images are not decoded.
            max_images: use an evenly spaced subset of this size where there are more.
            max_words: of a caption, see `clean_caption`.
            prompt: put in front of every caption.
            max_open_shards: per worker.

        Raises:
            UserError: `max_images` is not positive.
        """
        if max_images is not None and max_images < 1:
            raise UserError(f"max_images={max_images}; give 1 or more, or null for all images.")
        self._source = source
        self._transform = transform
        self._max_words = max_words
        self._prompt = prompt
        self._pool = ShardPool(max_open_shards)
        self._ends = np.cumsum([info.samples for info in source.shards])
        self._total = int(self._ends[-1])
        self._length = min(self._total, max_images or self._total)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: int) -> EvalSample | Skipped:
        if not 0 <= item < self._length:
            raise IndexError(f"image {item} of {self._length}")
        place = item * self._total // self._length
        shard = int(np.searchsorted(self._ends, place, side="right"))
        index = place - (int(self._ends[shard - 1]) if shard else 0)
        raw = _read(self._pool, self._source, shard, index, self._max_words)
        if not isinstance(raw, _Usable):
            return raw
        image = _no_image()
        if self._transform is not None:
            try:
                image = self._transform(load_rgb(raw.image))
            except BadImage as error:
                return _skip(self._source, shard, raw.key, str(error))
        name, tar = self._source.name, self._source.shards[shard].name
        captions = [self._prompt + caption for caption in raw.captions]
        image_id = sample_id(name, tar, raw.key, raw.image_id)
        key = f"{name}/{tar}/{raw.key}"
        return EvalSample(image, captions, image_id, key, item)


@dataclass(frozen=True)
class _Usable:
    """A sample that was read; its image is not decoded yet, which may still fail."""

    key: str
    image: bytes
    captions: list[str]  # cleaned, none empty, at least one
    weights: list[float]  # of the captions; empty where the sample has none
    image_id: object


def _no_image() -> torch.Tensor:
    """Return what stands for an image that was not decoded, uint8 [0]."""
    return torch.empty(0, dtype=torch.uint8)


def _read(
    pool: ShardPool, source: Source, shard: int, index: int, max_words: int
) -> _Usable | Skipped:
    """Read a sample or say why it cannot be used."""
    try:
        raw = pool.read(source, shard, index)
        cleaned = [clean_caption(caption, max_words) for caption in raw.meta["captions"]]
        kept = [n for n, caption in enumerate(cleaned) if caption]
        if not kept:
            raise SampleError(raw.key, "no caption is left after cleaning")
    except SampleError as error:
        return _skip(source, shard, error.key, error.reason)
    captions = [cleaned[n] for n in kept]
    weights = raw.meta.get("caption_weights")
    weights = [] if weights is None else [weights[n] for n in kept]
    return _Usable(raw.key, raw.image, captions, weights, raw.meta.get("image_id"))


def _skip(source: Source, shard: int, key: str, reason: str) -> Skipped:
    return {"shard": f"{source.name}/{source.shards[shard].name}", "key": key, "reason": reason}
