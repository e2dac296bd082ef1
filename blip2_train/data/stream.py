"""The order of `order.py`, carried out over shards: training micro-batches and evaluation images.

The global batch is the unit. A contrastive batch is contiguous in the order, rank r takes a
contiguous slice of each, and loader worker w of W builds the micro-batches w, w + W, ... whole:
what the model sees at a step depends neither on the ranks nor on the workers. The only state is how
many samples were drawn from each source.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from blip2_train.data.batch import EvalSample, Sample, Skipped, sample_id
from blip2_train.data.features import CachedFeatures
from blip2_train.data.images import BadImage, load_rgb
from blip2_train.data.order import Mixture, PartedOrder, micro_batch
from blip2_train.data.pool import Reading, ShardPool
from blip2_train.data.question_batch import asked_sample, drawn_question
from blip2_train.data.shards import ShardError
from blip2_train.data.source import Source, StoredShard
from blip2_train.data.tar import RawSample, SampleError
from blip2_train.data.text import clean_caption
from blip2_train.errors import UserError
from blip2_train.seeding import stable_hash

Batch = TypeVar("Batch")
CaptionChoice = Literal["uniform", "first", "weighted"]
TextKind = Literal["captions", "questions"]
# The bytes of an image file -> uint8 [3, S, S], and whether it is still to be flipped.
TrainTransformation = Callable[[bytes, torch.Generator], tuple[torch.Tensor, bool]]


class TrainStream(IterableDataset[Batch]):
    """The endless sequence of one rank's micro-batches; use with `DataLoader(batch_size=None)`.

    A sample that cannot be used is replaced by the next usable one of its shard, in stored order,
    and with `on_bad_shard="skip"` one of a shard that cannot be read by one of the next shard;
    caption or answer, crop, flip and `Sample.uniform` are drawn, in this order, from a generator
    seeded with (seed, epoch, source, shard, key). Iterating starts at `drawn` each time.
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
        locality: int = 1,
        text: TextKind = "captions",
        caption: CaptionChoice = "uniform",
        max_words: int = 50,
        prompt: str = "",
        reading: Reading | None = None,
        features: CachedFeatures | None = None,
    ) -> None:
        """Describe the stream; no shard is opened.

        Args:
            sources: in the order that decides ties of the mixture.
            transforms: of each source by name, see `TrainTransform`; None: its images are not
                decoded, for training on text alone.
            collate: samples of a micro-batch, and what was skipped for it -> batch; called in the
                worker, so it must pickle.
            contrastive_batch: samples over all ranks, see `config.BatchPlan`.
            seed: of order, captions and transforms.
            shuffle_window: shards whose samples are mixed, at least (see `ShuffledOrder`).
            rank: this process's slice of each contrastive batch.
            world: number of slices.
            drawn: samples of each source that were drawn before, to continue after them.
            locality: parts that each source's order is cut into, see `PartedOrder`.
            text: what is learned of an image: one of its captions, or the answer of one of its
                annotators to one of its questions. Samples without any cannot be used.
            caption: one usable caption `uniform`ly, always the `first`, or drawn as the sample's
                `caption_weights` say (`weighted`; uniformly where it has none or all are 0).
            max_words: of a caption, see `clean_caption`, or of a question.
            prompt: put in front of every caption; of questions, see `ask`.
            reading: how shards are read.
            features: of the frozen tower, in place of images; nothing is transformed then.

        Raises:
            UserError: a value that cannot be carried out.
        """
        super().__init__()
        if contrastive_batch < 1 or contrastive_batch % world:
            raise UserError(
                f"a contrastive batch of {contrastive_batch} samples cannot be cut into "
                f"{world} equal slices, one per device; make it a multiple of {world}."
            )
        if contrastive_batch % locality:
            raise UserError(
                f"a contrastive batch of {contrastive_batch} samples is not divisible by "
                f"data.locality={locality}; change one of them."
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
        self._orders = self._order_all(sources, seed, shuffle_window, locality)
        self._transforms = transforms
        self._collate = collate
        self._contrastive_batch = contrastive_batch
        self._rank = rank
        self._world = world
        self._locality = locality
        self._seed = seed
        self._text = text
        self._caption = caption
        self._max_words = max_words
        self._prompt = prompt
        self._reading = dataclasses.replace(reading or Reading(), need_captions=text == "captions")
        self._features = features
        self._pool = ShardPool(self._reading)
        self._remote = {source.name for source in sources if source.remote}
        self._near: dict[tuple[str, int], list[int]] = {}  # shards that were asked for ahead

    def _order_all(
        self, sources: Sequence[Source], seed: int, shuffle_window: int, locality: int
    ) -> dict[str, PartedOrder]:
        return {
            source.name: PartedOrder(
                [info.samples for info in source.shards], seed, shuffle_window, locality
            )
            for source in sources
        }

    def drawn_after(self, micro_batches: int) -> dict[str, int]:
        """Return the samples drawn from each source, over all ranks, after so many micro-batches.

        Args:
            micro_batches: that each rank has taken since the start at `drawn`.
        """
        share = micro_batches * self._contrastive_batch // self._locality
        parts = {name: count // self._locality for name, count in self.drawn.items()}
        after = self.mixture.advance(parts, share)
        return {name: count * self._locality for name, count in after.items()}

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
        for number in itertools.count(worker, workers):
            places = list(
                micro_batch(
                    self.mixture,
                    self.drawn,
                    number,
                    self._contrastive_batch,
                    self._rank,
                    self._world,
                    self._locality,
                )
            )
            self._fetch_ahead(places)
            skipped: list[Skipped] = []
            samples = [self._draw(name, part, n, skipped) for name, part, n in places]
            yield self._collate(samples, skipped)

    def _draw(self, name: str, part: int, n: int, skipped: list[Skipped]) -> Sample:
        """Return sample `n` of a part of a source, or what stands in for it; adds to `skipped`."""
        source = self._sources[name]
        epoch, first, index = self._orders[name].locate(part, n)
        for step in range(len(source.shards)):
            info = source.shards[(first + step) % len(source.shards)]
            if not info.samples:
                continue
            try:
                return self._draw_from(source, info, epoch, index, skipped)
            except ShardError as error:
                if self._reading.on_bad_shard == "error":
                    raise
                skipped.append(_skipped(source, info, f"#{index}", f"bad shard: {error}"))
        raise ShardError(
            f"data.sources.{name}: none of its {len(source.shards)} shards can be read"
        )

    def _draw_from(
        self, source: Source, info: StoredShard, epoch: int, index: int, skipped: list[Skipped]
    ) -> Sample:
        """Return the first usable sample of a shard from `index` on, round its end."""
        for step in range(info.samples):
            place = (index + step) % info.samples
            need_captions = self._reading.need_captions
            raw = _read(self._pool, source, info, place, self._max_words, need_captions)
            if isinstance(raw, Usable):
                try:
                    return self._augment(source, info, place, epoch, raw)
                except BadImage as error:
                    raw = _skipped(source, info, raw.key, str(error))
                except SampleError as error:
                    raw = _skipped(source, info, error.key, error.reason)
            skipped.append(raw)
        raise ShardError(
            f"{info.location}: none of its {info.samples} samples can be used, the last one "
            f"because of: {skipped[-1]['reason']}"
        )

    def _fetch_ahead(self, places: Sequence[tuple[str, int, int]]) -> None:
        """Have the shards fetched that are read now and next, where they are somewhere else."""
        firsts = {(name, part): n for name, part, n in reversed(places) if name in self._remote}
        for (name, part), n in firsts.items():
            near = self._orders[name].shards_near(part, n)
            if self._near.get((name, part)) != near:
                self._near[name, part] = near
                self._pool.fetch_ahead(self._sources[name].shards[shard] for shard in near)

    def _augment(
        self, source: Source, info: StoredShard, place: int, epoch: int, raw: Usable
    ) -> Sample:
        generator = torch.Generator()
        generator.manual_seed(stable_hash(self._seed, epoch, source.name, info.name, raw.key))
        question, choice = None, 0
        if self._text == "questions":
            place_of = (self._seed, source.name, info.name, raw.key)
            question = drawn_question(raw.meta, self._max_words, epoch, place_of, generator)
        elif self._caption == "weighted" and any(raw.weights):
            weights = torch.tensor(raw.weights, dtype=torch.float64)
            choice = int(torch.multinomial(weights, 1, generator=generator))
        elif self._caption != "first":
            choice = int(torch.randint(len(raw.captions), (1,), generator=generator))
        transform = self._transforms[source.name]
        image, flip = _no_image(), False
        if self._features is not None:
            image = self._features.read(info, place)
            torch.rand(1, generator=generator)  # the flip, so that what follows stays the same
        elif transform is not None:
            image, flip = transform(raw.image, generator)
        # After all other draws, which stay what they were before there was this one.
        uniform = torch.rand(1, generator=generator).item()
        common: dict[str, Any] = {
            "image": image,
            "image_id": sample_id(source.name, info.name, raw.key, raw.image_id),
            "key": f"{source.name}/{info.name}/{raw.key}",
            "uniform": uniform,
            "flip": flip,
        }
        if question is not None:
            return asked_sample(*question, self._prompt, **common)
        return Sample(
            text=self._prompt + raw.captions[choice],
            captions=raw.captions[choice:] + raw.captions[:choice],
            **common,
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
        reading: Reading | None = None,
        features: CachedFeatures | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        """Describe the set; no shard is opened.

        Args:
            source: the validation split.
            transform: image -> uint8 [3, S, S]; None: images are not decoded.
            max_images: use an evenly spaced subset of this size where there are more.
            max_words: of a caption, see `clean_caption`.
            prompt: put in front of every caption.
            reading: how shards are read; with `need_captions` off, images without captions are
                used too.
            features: of the frozen tower, in place of images.
            extra: fields of the samples' json that items hold as they stand there, in `extra`; a
                sample that lacks one has no such key. "captions" are the captions before cleaning.

        Raises:
            UserError: `max_images` is not positive.
        """
        if max_images is not None and max_images < 1:
            raise UserError(f"max_images={max_images}; give 1 or more, or null for all images.")
        self.name, self.split = source.name, source.split
        self._source = source
        self._transform = transform
        self._max_words = max_words
        self._prompt = prompt
        self._reading = reading or Reading()
        self._features = features
        self._extra = tuple(extra)
        self._pool = ShardPool(self._reading)
        self._ends = np.cumsum([info.samples for info in source.shards])
        self._total = int(self._ends[-1])
        self._length = min(self._total, max_images or self._total)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: int) -> EvalSample | Skipped:
        info, index = self._place(item)
        try:
            raw = _read(
                self._pool,
                self._source,
                info,
                index,
                self._max_words,
                self._reading.need_captions,
            )
            if not isinstance(raw, Usable):
                return raw
            try:
                image = self._image(info, index, raw)
            except BadImage as error:
                return _skipped(self._source, info, raw.key, str(error))
        except ShardError as error:
            if self._reading.on_bad_shard == "error":
                raise
            return _skipped(self._source, info, f"#{index}", f"bad shard: {error}")
        name, tar = self._source.name, info.name
        captions = [self._prompt + caption for caption in raw.captions]
        image_id = sample_id(name, tar, raw.key, raw.image_id)
        key = f"{name}/{tar}/{raw.key}"
        extra = {name: raw.meta[name] for name in self._extra if name in raw.meta}
        return EvalSample(image, captions, image_id, key, item, extra)

    @property
    def source(self) -> Source:
        """What the images are taken from."""
        return self._source

    def undecoded(self) -> EvalStream:
        """The same items, their images not decoded: where the text alone is wanted."""
        other = copy.copy(self)
        other._transform = other._features = None
        return other

    def picture(self, item: int) -> Image.Image:
        """An image that can be used, to look at: as the tower sees it, or saw it.

        Raises:
            SampleError: it cannot be read; neither could item `item`.
            BadImage: it cannot be decoded.
        """
        info, index = self._place(item)
        image = load_rgb(self._pool.read(info, index).image)
        if self._transform is None:
            return image
        return Image.fromarray(self._transform(image).permute(1, 2, 0).numpy())

    def _place(self, item: int) -> tuple[StoredShard, int]:
        """The shard of an item, and its number there."""
        if not 0 <= item < self._length:
            raise IndexError(f"image {item} of {self._length}")
        place = item * self._total // self._length
        shard = int(np.searchsorted(self._ends, place, side="right"))
        return self._source.shards[shard], place - (int(self._ends[shard - 1]) if shard else 0)

    def _image(self, info: StoredShard, index: int, raw: Usable) -> torch.Tensor:
        if self._features is not None:
            return self._features.read(info, index)
        if self._transform is None:
            return _no_image()
        return self._transform(load_rgb(raw.image))


@dataclass(frozen=True)
class Usable:
    """A sample that was read; its image is not decoded yet, which may still fail."""

    key: str
    image: bytes
    captions: list[str]  # cleaned, none empty; at least one, unless that was not asked for
    weights: list[float]  # of the captions; empty where the sample has none
    image_id: object
    meta: dict[str, Any]  # as of `RawSample`


def _no_image() -> torch.Tensor:
    """Return what stands for an image that was not decoded, uint8 [0]."""
    return torch.empty(0, dtype=torch.uint8)


def _skipped(source: Source, info: StoredShard, key: str, reason: str) -> Skipped:
    return {"shard": f"{source.name}/{info.name}", "key": key, "reason": reason}


def _read(
    pool: ShardPool,
    source: Source,
    info: StoredShard,
    index: int,
    max_words: int,
    need_captions: bool = True,
) -> Usable | Skipped:
    """Read a sample or say why it cannot be used."""
    try:
        found = usable(pool.read(info, index), max_words, need_captions)
    except SampleError as error:
        found = error
    if isinstance(found, Usable):
        return found
    return _skipped(source, info, found.key, found.reason)


def usable(raw: RawSample, max_words: int, need_captions: bool = True) -> Usable | SampleError:
    """Clean a sample's captions, or say why it cannot be used; its image may yet be undecodable."""
    cleaned = [clean_caption(caption, max_words) for caption in raw.meta["captions"]]
    kept = [n for n, caption in enumerate(cleaned) if caption]
    if need_captions and not kept:
        return SampleError(raw.key, "no caption is left after cleaning")
    captions = [cleaned[n] for n in kept]
    weights = raw.meta.get("caption_weights")
    weights = [] if weights is None else [weights[n] for n in kept]
    return Usable(raw.key, raw.image, captions, weights, raw.meta.get("image_id"), raw.meta)
