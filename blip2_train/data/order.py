"""Which sample stands at which place: pure functions of (seed, position), no file is opened here.

Nothing depends on ranks, loader workers or on what was drawn before, so any place of the order can
be looked up directly: resuming in the middle costs what starting costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np

from blip2_train.errors import UserError

# Third word of the entropy: keeps the streams of shards, of samples and of parts apart.
_SHARDS, _SAMPLES, _PARTS = 0, 1, 2


def permutation(entropy: Sequence[int], length: int) -> np.ndarray:
    """Return a permutation of `range(length)`, int64 [length], that no release of numpy changes.

    NumPy guarantees the raw output of a bit generator for ever, but not `Generator.permutation`.

    Args:
        entropy: what the permutation is a function of, non-negative integers.
        length: number of items.
    """
    bits = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(length)
    return np.argsort(bits, kind="stable").astype(np.int64, copy=False)


class ShuffledOrder:
    """The endless shuffled order of one source: from a global index to a sample.

    In each epoch the shards are permuted, then samples are permuted inside windows of consecutive
    permuted shards, so that a reader needs only one window's shards at a time. Every epoch holds
    every sample exactly once.

    N shards are cut into max(1, N // shuffle_window) windows of N / windows shards, rounded up or
    down: none is narrower than min(shuffle_window, N), in which samples of one shard would meet
    more often, and none is wider than 2 * shuffle_window - 1. Shards without samples do not count.

    Memory: 32 bytes per shard and 8 bytes per sample of one window.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, shuffle_window: int) -> None:
        """Describe the order.

        Args:
            shard_sizes: samples of each shard, in a fixed order.
            seed: non-negative.
            shuffle_window: least number of shards whose samples are mixed with each other.

        Raises:
            UserError: a value out of range, or no sample at all.
        """
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self._sizes.sum())
        if self.num_samples == 0 or self._sizes.min() < 0:
            raise UserError(
                f"{self.num_samples} samples in {len(shard_sizes)} shards: none to draw."
            )
        if seed < 0:
            raise UserError(f"seed={seed} is negative; give 0 or more.")
        if shuffle_window < 1:
            raise UserError(f"data.shuffle_window={shuffle_window} shards; give 1 or more.")
        self._seed = seed
        self._filled = np.flatnonzero(self._sizes)
        self._windows = max(1, len(self._filled) // shuffle_window)
        # One epoch's shards and one window's samples: the order is read front to back, so the
        # neighbours of the last place looked up are what is asked for next.
        self._epoch = -1
        self._shards = self._ends = np.empty(0, dtype=np.int64)
        self._samples_of: tuple[int, int] = (-1, -1)
        self._samples = np.empty(0, dtype=np.int64)

    def locate(self, n: int) -> tuple[int, int, int]:
        """Return where the sample at place `n` of the order lies.

        Args:
            n: global index, 0 or more; epochs follow each other without a gap.

        Returns:
            Epoch, shard (index into `shard_sizes`), and index of the sample in that shard.
        """
        epoch, place = divmod(n, self.num_samples)
        if epoch != self._epoch:
            drawn = permutation([self._seed, epoch, _SHARDS, 0], len(self._filled))
            self._shards = self._filled[drawn]
            self._ends = np.cumsum(self._sizes[self._shards])
            self._epoch = epoch
        slot = int(np.searchsorted(self._ends, place, side="right"))
        window, first, last = self._window_of(slot)
        start = int(self._ends[first - 1]) if first else 0
        if self._samples_of != (epoch, window):
            length = int(self._ends[last - 1]) - start
            self._samples = permutation([self._seed, epoch, _SAMPLES, window], length)
            self._samples_of = (epoch, window)
        place = start + int(self._samples[place - start])
        slot = int(np.searchsorted(self._ends, place, side="right"))
        before = int(self._ends[slot - 1]) if slot else 0
        return epoch, int(self._shards[slot]), place - before

    def shards_near(self, n: int) -> list[int]:
        """Return the shards that a reader at place `n` needs now and next, in this order.

        Args:
            n: global index.

        Returns:
            Those of the window that holds `n` and of the window after it.
        """
        epoch, _, _ = self.locate(n)
        slot = int(np.searchsorted(self._ends, n % self.num_samples, side="right"))
        window, first, last = self._window_of(slot)
        if window + 1 < self._windows:
            _, _, last = self._window_of(last)
            return self._shards[first:last].tolist()
        drawn = permutation([self._seed, epoch + 1, _SHARDS, 0], len(self._filled))
        _, _, end = self._window_of(0)
        return [*self._shards[first:last].tolist(), *self._filled[drawn][:end].tolist()]

    def _window_of(self, slot: int) -> tuple[int, int, int]:
        """Return the window of a place among the permuted shards, its first and its end.

        Window w begins at floor(w * shards / windows).
        """
        shards = len(self._filled)
        window = ((slot + 1) * self._windows - 1) // shards
        first, last = (w * shards // self._windows for w in (window, window + 1))
        return window, first, last


class PartedOrder:
    """The order of one source as `parts` orders beside each other, each over its own samples.

    A contrastive batch takes as many samples from each part, in the order of the parts, so that the
    ranks of one machine need the shards of their own parts alone (`data.locality`). The parts are
    fixed for the run and differ by one sample at most; a shard may belong to two. Each part goes
    through its epochs by itself. One part is the order of all shards.
    """

    def __init__(
        self, shard_sizes: Sequence[int], seed: int, shuffle_window: int, parts: int = 1
    ) -> None:
        """Describe the order.

        Args:
            shard_sizes: samples of each shard, in a fixed order.
            seed: non-negative.
            shuffle_window: as for `ShuffledOrder`; within a part.
            parts: number of parts, at most the number of samples.

        Raises:
            UserError: as for `ShuffledOrder`.
        """
        self.num_samples = sum(shard_sizes)
        # Shards that were written one after another may be alike: dealt out in a random order.
        order = range(len(shard_sizes))
        if parts > 1:
            order = permutation([seed, 0, _PARTS, 0], len(shard_sizes)).tolist()
        self._pieces = cut([(shard, shard_sizes[shard]) for shard in order], parts)
        self._orders = [
            ShuffledOrder([count for _, _, count in pieces], seed, shuffle_window)
            for pieces in self._pieces
        ]

    def locate(self, part: int, n: int) -> tuple[int, int, int]:
        """Return where the sample at place `n` of a part lies: epoch, shard, index in the shard."""
        epoch, piece, index = self._orders[part].locate(n)
        shard, first, _ = self._pieces[part][piece]
        return epoch, shard, first + index

    def shards_near(self, part: int, n: int) -> list[int]:
        """Return the shards that a reader at place `n` of a part needs now and next."""
        return [self._pieces[part][piece][0] for piece in self._orders[part].shards_near(n)]


def cut(shards: Sequence[tuple[int, int]], parts: int) -> list[list[tuple[int, int, int]]]:
    """Cut shards that lie one after another into parts of equal numbers of samples.

    Args:
        shards: of each its number and its samples.
        parts: number of parts.

    Returns:
        For each part its pieces: number of the shard, first sample in it, samples.

    Raises:
        UserError: there are fewer samples than parts.
    """
    total = sum(samples for _, samples in shards)
    if total < parts:
        raise UserError(f"{total} samples cannot be cut into data.locality={parts} parts.")
    pieces: list[list[tuple[int, int, int]]] = [[] for _ in range(parts)]
    start = 0
    part = 0
    for shard, samples in shards:
        first = 0
        while first < samples:
            end_of_part = (part + 1) * total // parts
            count = min(samples - first, end_of_part - start - first)
            pieces[part].append((shard, first, count))
            first += count
            if start + first == end_of_part:
                part += 1
        start += samples
    return pieces


class Mixture:
    """How sources interleave: sample by sample, in proportion to their weights.

    Error diffusion: the next sample comes from the source that is furthest behind its share, the
    one with the smallest (drawn + 1/2) / weight; the first such source on a tie. The only state is
    the number drawn from each source. In this form the places of a source are an arithmetic
    progression, so a jump over any number of samples is computed, not walked (`advance`). All
    arithmetic is in integers: a weight counts as the decimal number that was written.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Describe the mixture.

        Args:
            weights: relative weight of each source; only their ratios count.

        Raises:
            UserError: there is no source, or a weight is not a positive number.
        """
        if not weights:
            raise UserError("data.sources is empty; name at least one source.")
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(
                    f"data.sources.{name}.weight={weight} must be positive; remove the source "
                    "to leave it out."
                )
        exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
        common = math.lcm(*(weight.denominator for weight in exact.values()))
        shares = {name: int(weight * common) for name, weight in exact.items()}
        multiple = math.lcm(*shares.values())
        # Source s gives its sample j (from 0) at time (2 j + 1) * stride[s].
        self._stride = {name: multiple // share for name, share in shares.items()}
        self.names = tuple(weights)

    def next_source(self, counts: Mapping[str, int]) -> str:
        """Return the source of the next sample.

        Args:
            counts: samples drawn so far from each source.
        """
        return min(self.names, key=lambda name: (2 * counts[name] + 1) * self._stride[name])

    def run(self, counts: Mapping[str, int], length: int) -> Iterator[tuple[str, int]]:
        """Walk over the next `length` samples.

        Args:
            counts: samples drawn from each source before the walk; not changed.
            length: samples to walk over.

        Yields:
            The source and the index within that source.
        """
        counts = dict(counts)
        for _ in range(length):
            name = self.names[0] if len(self.names) == 1 else self.next_source(counts)
            yield name, counts[name]
            counts[name] += 1

    def advance(self, counts: Mapping[str, int], length: int) -> dict[str, int]:
        """Return the counts after `length` more samples: those of `run`, without the walk.

        Args:
            counts: samples drawn so far from each source; not changed.
            length: samples to draw, 0 or more.
        """
        if len(self.names) == 1:
            return {self.names[0]: counts[self.names[0]] + length}
        target = sum(counts[name] for name in self.names) + length
        late = self._counts_at(counts, 1)
        low, high = 0, 1  # by `low` fewer samples than `target` are drawn, by `high` no fewer
        while sum(late.values()) < target:
            low, high = high, 2 * high
            late = self._counts_at(counts, high)
        while high - low > 1:
            middle = (low + high) // 2
            if sum(self._counts_at(counts, middle).values()) < target:
                low = middle
            else:
                high = middle
        counts = self._counts_at(counts, low) if length else dict(counts)
        for _ in range(target - sum(counts.values())):  # those that tie at time `high`
            counts[self.next_source(counts)] += 1
        return counts

    def _counts_at(self, counts: Mapping[str, int], time: int) -> dict[str, int]:
        """Return how many samples each source has given when all due up to `time` are drawn."""
        return {
            name: max(counts[name], (time // stride + 1) // 2)
            for name, stride in self._stride.items()
        }


def micro_batch(
    mixture: Mixture,
    drawn: Mapping[str, int],
    number: int,
    contrastive_batch: int,
    rank: int = 0,
    world: int = 1,
    parts: int = 1,
) -> Iterator[tuple[str, int, int]]:
    """Walk over what one rank's micro-batch holds: its slice of a contrastive batch.

    Loader workers do not come in: worker w of W builds the micro-batches w, w + W, ...

    Args:
        mixture: of the sources.
        drawn: samples of each source that were drawn before micro-batch 0; multiples of `parts`.
        number: of the micro-batch.
        contrastive_batch: samples over all ranks, a multiple of `world` and of `parts`.
        rank: whose slice.
        world: number of slices.
        parts: of each source's order. Every part has the same mixture, so that how much of it was
            drawn is the same for all.

    Yields:
        The source, the part, and the index within the order of that part.
    """
    size, share = contrastive_batch // world, contrastive_batch // parts
    drawn = mixture.advance({name: drawn[name] // parts for name in drawn}, number * share)
    start, end = rank * size, (rank + 1) * size
    for part in range(start // share, -(-end // share)):
        first, last = max(start, part * share), min(end, (part + 1) * share)
        before = mixture.advance(drawn, first - part * share)
        for name, n in mixture.run(before, last - first):
            yield name, part, n
