"""Proven here, without a file: the shuffled order and the mixture of sources.

- every epoch holds every sample exactly once, epochs and seeds differ
- samples mix inside a window of shards, and only there
- `locate` depends on its argument alone, and its values are fixed for ever
- a mixture never strays from its weights, and jumping equals walking
- the memory and time of a lookup stay small at a hundred million samples
"""

import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2_train.data.order import Mixture, ShuffledOrder, permutation
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
        assert len(group) <= window
        assert not group & seen
        seen |= group
    assert len(seen) == filled


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


FIXED_PERMUTATION = [5, 1, 2, 7, 6, 4, 0, 3]
FIXED_PLACES = [(0, 3, 1), (0, 3, 3), (0, 3, 2), (0, 0, 1), (1, 1, 2), (100, 1, 1)]


def test_a_hundred_million_samples_are_looked_up_quickly():
    order = ShuffledOrder([1000] * 100_000, 0, 16)
    start = time.perf_counter()
    for n in range(5 * 10**8, 5 * 10**8 + 20_000):
        order.locate(n)
    assert time.perf_counter() - start < 2  # takes 0.1 s; a list of all samples would take 10 s
    held = sum(value.nbytes for value in vars(order).values() if isinstance(value, np.ndarray))
    assert held < 4e6


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


def test_a_far_jump_is_cheap():
    mixture = Mixture({"coco": 566_747, "vg": 768_231, "cc": 2_881_393, "laion": 1.15e8})
    counts = mixture.advance(dict.fromkeys(mixture.names, 0), 10**9)
    start = time.perf_counter()
    for _ in range(100):
        counts = mixture.advance(counts, 1680 * 8)
    assert time.perf_counter() - start < 1  # walking takes some 0.02 s for each


@pytest.mark.parametrize("weight", [0, -1, 0.0, float("nan"), float("inf")])
def test_a_weight_that_is_not_positive_is_refused(weight):
    with pytest.raises(UserError, match=r"data\.sources\.vg\.weight"):
        Mixture({"coco": 1, "vg": weight})


def test_no_source_is_refused():
    with pytest.raises(UserError, match=r"data\.sources"):
        Mixture({})
