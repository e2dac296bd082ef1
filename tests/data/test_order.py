"""Proven here, without a file: the shuffled order and the mixture of sources.

- every epoch holds every sample exactly once, epochs and seeds differ
- samples mix inside a window of shards, and only there; no window is narrower than asked for
- two samples of one shard meet in a batch no more often than chance in such a window has it
- global batches are the same for any ranks and workers, also after going on with others
- `locate` depends on its argument alone, and its values are fixed for ever
- a mixture never strays from its weights, and jumping equals walking; a small source beside a
  large one is gone through exactly, epoch after epoch
- the memory and time of a lookup stay small at a hundred million samples
"""

import itertools
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ranks import LAYOUTS

from blip2_train.data.order import (
    Mixture,
    PartedOrder,
    ShuffledOrder,
    cut,
    micro_batch,
    permutation,
)
from blip2_train.errors import UserError

SHARD_SIZES = st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any)
SEEDS = st.integers(0, 2**70)
WEIGHTS = st.lists(
    st.one_of(
        st.integers(1, 1000),
        st.floats(1e-3, 1e3, allow_nan=False),
        st.sampled_from([0.1, 0.2, 0.3, 1 / 3]),
    ),
    min_size=1,
    max_size=5,
).map(lambda weights: {f"s{i}": weight for i, weight in enumerate(weights)})


def epoch_of(order: ShuffledOrder, epoch: int) -> list[tuple[int, int, int]]:
    first = epoch * order.num_samples
    return [order.locate(n) for n in range(first, first + order.num_samples)]


@given(SHARD_SIZES, SEEDS, st.integers(1, 10), st.integers(0, 50))
def test_each_epoch_holds_each_sample_once(sizes, seed, window, epoch):
    places = epoch_of(ShuffledOrder(sizes, seed, window), epoch)
    expected = [(epoch, shard, i) for shard, size in enumerate(sizes) for i in range(size)]
    assert sorted(places) == expected


@given(SHARD_SIZES, SEEDS, st.integers(1, 10), st.lists(st.integers(0, 200), max_size=20))
def test_a_lookup_depends_on_nothing_before_it(sizes, seed, window, places):
    used = ShuffledOrder(sizes, seed, window)
    assert [used.locate(n) for n in places] == [
        ShuffledOrder(sizes, seed, window).locate(n) for n in places
    ]


@given(SHARD_SIZES, SEEDS, st.integers(1, 10))
def test_samples_mix_within_a_window_of_shards_only(sizes, seed, window):
    order = ShuffledOrder(sizes, seed, window)
    shards = [shard for _, shard, _ in epoch_of(order, 0)]
    filled = sum(size > 0 for size in sizes)
    # Cut where a window ends: no shard stands on both sides, so sets of shards never overlap.
    seen: set[int] = set()
    groups, current = [], Counter()
    for shard in shards:
        current[shard] += 1
        if all(count == sizes[s] for s, count in current.items()):
            groups.append(set(current))
            current = Counter()
    assert not current
    for group in groups:
        assert len(group) <= 2 * window - 1
        assert not group & seen
        seen |= group
    assert len(seen) == filled


@given(st.integers(1, 40), st.integers(1, 45), SEEDS)
def test_no_window_is_narrower_or_much_wider_than_asked_for(shards, window, seed):
    """Shards of one sample show the windows: they hold the places that any seed mixes."""
    order = ShuffledOrder([1] * shards, seed, window)
    windows = [order._window_of(slot) for slot in range(shards)]
    spans = sorted(set(windows))
    assert [number for number, _, _ in spans] == list(range(len(spans)))
    assert [first for _, first, _ in spans] == [0, *(last for _, _, last in spans[:-1])]
    assert all(first <= slot < last for slot, (_, first, last) in enumerate(windows))
    widths = [last - first for _, first, last in spans]
    assert min(widths) >= min(window, shards)
    assert max(widths) <= max(window, 2 * window - 1)
    assert max(widths) - min(widths) <= 1


def test_a_shard_without_samples_takes_no_place_in_a_window():
    order = ShuffledOrder([0, 30, 0, 0, 30, 0], 1, 2)
    halves = [shard for _, shard, _ in epoch_of(order, 0)[:30]]
    assert set(halves) == {1, 4}


@given(st.integers(1, 20), st.integers(1, 24), st.integers(2, 30), st.integers(4, 24), SEEDS)
@example(9, 8, 30, 8, 0)  # a last window of the one shard that is left over would show here
@settings(max_examples=20, deadline=None)
def test_samples_of_one_shard_meet_no_more_often_than_by_chance(shards, window, size, batch, seed):
    """As many pairs of one shard in a batch as K shards would have it, K the narrowest window."""
    mixed = min(window, shards)
    chance = batch * (batch - 1) / (2 * mixed)
    order = ShuffledOrder([size] * shards, seed, window)
    # Enough whole epochs for some 4000 such pairs: then 10 % more is six standard deviations.
    batches = -(-4000 // chance)
    epochs = int(-(-batches * batch // order.num_samples))
    drawn = [order.locate(n)[1] for n in range(epochs * order.num_samples)]
    whole = range(0, len(drawn) - batch + 1, batch)
    pairs = 0
    for start in whole:
        counts = Counter(drawn[start : start + batch]).values()
        pairs += sum(count * (count - 1) // 2 for count in counts)
    assert pairs <= 1.1 * chance * len(whole)


def test_epochs_seeds_and_windows_differ():
    sizes = [50] * 8
    order = ShuffledOrder(sizes, 3, 4)
    first = [place[1:] for place in epoch_of(order, 0)]
    assert first != [place[1:] for place in epoch_of(order, 1)]
    assert first != [place[1:] for place in epoch_of(ShuffledOrder(sizes, 4, 4), 0)]
    # Two windows of one epoch are not shuffled alike: compare slots, not shards.
    assert [i for _, i in first[:200]] != [i for _, i in first[200:]]


def test_all_of_a_window_is_mixed():
    order = ShuffledOrder([100] * 4, 0, 4)
    early = Counter(shard for _, shard, _ in epoch_of(order, 0)[:100])
    assert set(early) == {0, 1, 2, 3}
    assert max(early.values()) < 50


def test_a_window_of_one_shard_reads_shard_by_shard():
    shards = [shard for _, shard, _ in epoch_of(ShuffledOrder([3, 4, 2], 1, 1), 0)]
    assert sum(a != b for a, b in pairwise(shards)) == 2


def test_the_order_is_fixed_for_ever():
    """A resumed run must see the order of the run it continues, whatever numpy is installed now."""
    assert permutation([7, 0, 1, 0], 8).tolist() == FIXED_PERMUTATION
    order = ShuffledOrder([2, 3, 1, 4], 5, 2)
    assert [order.locate(n) for n in (0, 1, 2, 9, 10, 1000)] == FIXED_PLACES
    order = ShuffledOrder([2, 3, 1, 0, 4, 2], 5, 2)  # five shards with samples: windows of 2 and 3
    assert [order.locate(n) for n in (0, 1, 2, 9, 10, 1000)] == FIXED_UNEVEN_PLACES


FIXED_PERMUTATION = [5, 1, 2, 7, 6, 4, 0, 3]
FIXED_PLACES = [(0, 3, 1), (0, 3, 3), (0, 3, 2), (0, 0, 1), (1, 1, 2), (100, 1, 1)]
FIXED_UNEVEN_PLACES = [(0, 5, 1), (0, 4, 1), (0, 4, 0), (0, 1, 1), (0, 1, 0), (83, 0, 0)]


def test_a_hundred_million_samples_are_looked_up_quickly():
    order = ShuffledOrder([1000] * 100_000, 0, 16)
    for n in range(5 * 10**8, 5 * 10**8 + 20_000):
        order.locate(n)
    held = sum(value.nbytes for value in vars(order).values() if isinstance(value, np.ndarray))
    assert held < 4e6


SOURCES = st.lists(SHARD_SIZES, min_size=1, max_size=3)
PLACE = tuple[str, int, int, int]  # source, epoch, shard, index


def global_batches(
    sources: list[list[int]],
    weights: list[int],
    window: int,
    drawn: dict[str, int],
    count: int,
    batch: int,
    layout: tuple[int, int],
    parts: int = 1,
) -> list[list[PLACE]]:
    """What the ranks of a layout train on together, as their loaders put it together."""
    world, workers = layout
    names = [f"s{i}" for i in range(len(sources))]
    mixture = Mixture(dict(zip(names, weights, strict=False)))
    ranks = []
    for rank in range(world):
        orders = [  # each loader worker has a copy of its own
            {
                name: PartedOrder(sizes, 5, window, parts)
                for name, sizes in zip(names, sources, strict=True)
            }
            for _ in range(max(1, workers))
        ]
        numbers = [itertools.count(worker, len(orders)) for worker in range(len(orders))]
        built = []
        for own, number in itertools.islice(
            itertools.cycle(zip(orders, numbers, strict=True)), count
        ):
            places = micro_batch(mixture, drawn, next(number), batch, rank, world, parts)
            built.append([(name, *own[name].locate(part, n)) for name, part, n in places])
        ranks.append(built)
    return [[place for part in parts for place in part] for parts in zip(*ranks, strict=True)]


@given(
    SOURCES,
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.integers(1, 4),
    st.integers(0, 10),
    st.permutations(LAYOUTS),
)
@settings(max_examples=25, deadline=None)
def test_ranks_and_workers_do_not_change_a_batch(sources, weights, window, stop, layouts):
    """Nor does going on after any batch with others, from the counts alone."""
    batch, count = 24, 10
    mixture = Mixture({f"s{i}": weight for i, weight in enumerate(weights[: len(sources)])})
    start = dict.fromkeys(mixture.names, 0)
    expected = global_batches(sources, weights, window, start, count, batch, (1, 0))
    walked = [
        (name, *ShuffledOrder(sources[int(name[1:])], 5, window).locate(n))
        for name, n in mixture.run(start, count * batch)
    ]
    assert [place for places in expected for place in places] == walked
    later = mixture.advance(start, stop * batch)
    for first, second in zip(layouts, layouts[1:] + layouts[:1], strict=True):
        before = global_batches(sources, weights, window, start, stop, batch, first)
        after = global_batches(sources, weights, window, later, count - stop, batch, second)
        assert before + after == expected


@given(
    st.lists(st.integers(2, 7), min_size=1, max_size=9),
    st.sampled_from([2, 3, 4, 6, 8, 12]),
    st.integers(0, 10),
    st.permutations(LAYOUTS),
)
@settings(max_examples=8, deadline=None)
def test_nor_do_they_where_the_order_is_cut_into_parts(sizes, parts, stop, layouts):
    batch, count, sources = 24, 10, [sizes, [parts, *sizes]]
    sources[0] = [parts, *sizes, 1]
    weights = [3, 2]
    mixture = Mixture({"s0": 3, "s1": 2})
    start = dict.fromkeys(mixture.names, 0)
    expected = global_batches(sources, weights, 2, start, count, batch, (1, 0), parts)
    share = batch // parts
    later = mixture.advance(start, stop * share)
    later = {name: drawn * parts for name, drawn in later.items()}
    for first, second in zip(layouts, layouts[1:] + layouts[:1], strict=True):
        before = global_batches(sources, weights, 2, start, stop, batch, first, parts)
        after = global_batches(sources, weights, 2, later, count - stop, batch, second, parts)
        assert before + after == expected
    for part in range(parts):
        rows = [row for places in expected for row in places[part * share : (part + 1) * share]]
        names = [name for name, *_ in rows]
        assert names == [name for name, _ in mixture.run(start, count * share)]


@given(SHARD_SIZES, st.integers(1, 12), SEEDS, st.integers(1, 4))
def test_parts_share_the_samples_out_evenly(sizes, parts, seed, window):
    if sum(sizes) < parts:
        with pytest.raises(UserError, match=f"data.locality={parts}"):
            PartedOrder(sizes, seed, window, parts)
        return
    order = PartedOrder(sizes, seed, window, parts)
    total, seen = sum(sizes), []
    for part in range(parts):
        length = (part + 1) * total // parts - part * total // parts
        epochs = [[order.locate(part, e * length + n) for n in range(length)] for e in (0, 3)]
        places = [{place[1:] for place in epoch} for epoch in epochs]
        assert places[0] == places[1] and len(places[0]) == length
        seen += places[0]
    assert sorted(seen) == [(shard, n) for shard, size in enumerate(sizes) for n in range(size)]


def test_a_part_needs_few_shards():
    pieces = cut([(shard, 100) for shard in range(64)], 8)
    assert all(len(part) == 8 for part in pieces)


@given(SHARD_SIZES, SEEDS, st.integers(1, 4), st.integers(0, 60))
def test_the_shards_near_a_place_are_those_read_next(sizes, seed, window, n):
    order = ShuffledOrder(sizes, seed, window)
    near = order.shards_near(n)
    windows, seen = [], []
    place = n
    while len(windows) < 2:  # walk to the end of the window after this one
        epoch, shard, _ = order.locate(place)
        here = (epoch, order._samples_of[1])
        if here not in windows:
            windows.append(here)
        seen.append(shard)
        place += 1
    assert set(seen) <= set(near)
    assert len(near) <= 2 * (2 * window - 1)


@pytest.mark.parametrize(
    ("sizes", "seed", "window", "named"),
    [
        ([], 0, 1, "0 samples"),
        ([0, 0], 0, 1, "0 samples"),
        ([1], -1, 1, "seed=-1"),
        ([1], 0, 0, "data.shuffle_window=0"),
    ],
)
def test_an_impossible_order_is_refused(sizes, seed, window, named):
    with pytest.raises(UserError, match=named):
        ShuffledOrder(sizes, seed, window)


def test_sources_interleave_by_weight():
    mixture = Mixture({"a": 3, "b": 1})
    drawn = [name for name, _ in mixture.run({"a": 0, "b": 0}, 8)]
    assert drawn == ["a", "a", "b", "a", "a", "a", "b", "a"]


def test_a_tie_goes_to_the_first_source():
    assert Mixture({"b": 1, "a": 1}).next_source({"a": 4, "b": 4}) == "b"
    assert Mixture({"b": 0.1, "a": 0.1, "c": 0.1}).next_source({"b": 1, "a": 0, "c": 0}) == "a"


def test_a_weight_is_the_decimal_number_that_was_written():
    # 0.7 is a little less than 7 times 0.1 in binary: the tie would go to the second source.
    assert Mixture({"a": 0.7, "b": 0.1}).next_source({"a": 3, "b": 0}) == "a"


def test_only_ratios_count():
    counts = {"a": 0, "b": 0, "c": 0}
    runs = [
        list(Mixture({"a": 0.1 * k, "b": 0.2 * k, "c": 0.7 * k}).run(counts, 50)) for k in (1, 10)
    ]
    assert runs[0] == runs[1]


@given(WEIGHTS, st.integers(0, 300))
def test_a_mixture_follows_its_weights_at_every_place(weights, length):
    mixture = Mixture(weights)
    total = sum(weights.values())
    counts = dict.fromkeys(weights, 0)
    for place, (name, n) in enumerate(mixture.run(counts, length), start=1):
        assert n == counts[name]
        counts[name] += 1
        for source, weight in weights.items():
            share = weight / total
            # |drawn - share * place| <= 1/2 + share * sources / 2, by the rule of rounding.
            bound = 0.5 + share * len(weights) / 2
            assert abs(counts[source] - share * place) <= bound + 1e-6


@given(WEIGHTS, st.lists(st.integers(0, 40), min_size=5, max_size=5), st.integers(0, 200))
def test_jumping_equals_walking(weights, start, length):
    """Also from counts that do not lie on the mixture's own path."""
    mixture = Mixture(weights)
    counts = dict(zip(weights, start, strict=False))
    before = dict(counts)
    walked = Counter(counts)
    walked.update(name for name, _ in mixture.run(counts, length))
    assert mixture.advance(counts, length) == {name: walked[name] for name in weights}
    assert counts == before


@pytest.mark.parametrize("weights", [(3, 1), (1, 1, 1), (0.7, 0.2, 0.1), (5, 3, 2, 2)])
def test_jumping_equals_walking_at_every_length(weights):
    mixture = Mixture({f"s{i}": weight for i, weight in enumerate(weights)})
    zero = walked = dict.fromkeys(mixture.names, 0)
    for length, (name, _) in enumerate(mixture.run(zero, 150)):
        assert mixture.advance(zero, length) == walked
        walked = walked | {name: walked[name] + 1}


@given(WEIGHTS, st.integers(0, 10**9), st.integers(0, 10**9))
@settings(max_examples=30)
def test_two_jumps_are_one(weights, first, second):
    mixture = Mixture(weights)
    zero = dict.fromkeys(weights, 0)
    assert mixture.advance(mixture.advance(zero, first), second) == mixture.advance(
        zero, first + second
    )


def test_a_far_jump_is_no_walk(monkeypatch):
    mixture = Mixture({"coco": 566_747, "vg": 768_231, "cc": 2_881_393, "laion": 1.15e8})
    steps, next_source = [], mixture.next_source
    monkeypatch.setattr(mixture, "next_source", lambda c: steps.append(1) or next_source(c))
    counts = mixture.advance(dict.fromkeys(mixture.names, 0), 10**9)
    assert sum(counts.values()) == 10**9 and len(steps) < 100


@given(st.integers(1, 5), st.integers(100, 3000), st.sampled_from([1, 3, 20]))
@settings(max_examples=20, deadline=None)
def test_a_small_source_beside_a_large_one_stays_exact(small, large, share):
    """Many epochs of a few samples while the large source has few: each of them is whole."""
    mixture = Mixture({"large": 20, "small": share})
    orders = {
        "large": ShuffledOrder([large // 2, large - large // 2], 1, 2),
        "small": ShuffledOrder([1] * small, 1, 2),
    }
    seen: dict[str, list[tuple[int, int, int]]] = {"large": [], "small": []}
    for name, n in mixture.run({"large": 0, "small": 0}, 2000):
        seen[name].append(orders[name].locate(n))
    assert len(seen["small"]) == pytest.approx(2000 * share / (20 + share), abs=1)
    for name, order in orders.items():
        every = {place[1:] for place in epoch_of(order, 0)}
        for epoch in range(len(seen[name]) // order.num_samples):
            first = epoch * order.num_samples
            places = seen[name][first : first + order.num_samples]
            assert {place[0] for place in places} == {epoch}
            assert {place[1:] for place in places} == every


@pytest.mark.parametrize("weight", [0, -1, 0.0, float("nan"), float("inf")])
def test_a_weight_that_is_not_positive_is_refused(weight):
    with pytest.raises(UserError, match=r"data\.sources\.vg\.weight"):
        Mixture({"coco": 1, "vg": weight})


def test_no_source_is_refused():
    with pytest.raises(UserError, match=r"data\.sources"):
        Mixture({})
