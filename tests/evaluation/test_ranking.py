"""Retrieval without a matrix of all images and captions.

Proven: ranks, metrics and shortlists equal a naive oracle on any features, with ties, duplicates,
several captions per image in any order and features that are no numbers; so do re-ranked ones;
the same on 1, 2 and 3 processes, with blocks of any size; keys sort as scores do and come back as
they were; pairs are cut into portions that cover each once and are never too large.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor

from blip2_train.distributed import current_world
from blip2_train.evaluation import matching, ranking
from blip2_train.evaluation.matching import Pairs
from blip2_train.evaluation.ranking import (
    Contrast,
    Shortlist,
    contrast,
    from_keys,
    reranked_ranks,
    to_keys,
)
from blip2_train.evaluation.retrieval import recalls, recalls_of_ranks, rerank
from blip2_train.evaluation.retrieval_task import rerank as rerank_lists


def problem(seed: int, images: int, captions: int, queries: int, levels: int) -> dict[str, Any]:
    """Features of few whole numbers, so that products are exact and many are equal."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-levels, levels + 1, shape, generator=generator).float() / 8

    owner = torch.arange(images).repeat(-(-captions // images))[:captions]
    return {
        "image_feats": draw(images, queries, 6),
        "text_feat": draw(captions, 6),
        "caption_image": owner[torch.randperm(captions, generator=generator)],
    }


def dense(case: dict[str, Any]) -> Tensor:
    """[I, C], a loop over all pairs."""
    rows = [
        [max((query @ text).item() for query in image) for text in case["text_feat"]]
        for image in case["image_feats"]
    ]
    return torch.tensor(rows)


def naive_ranks(i2t: Tensor, t2i: Tensor, owner: list[int]) -> tuple[list[int], list[int]]:
    images, captions = i2t.shape
    of_images, of_captions = [], []
    for image in range(images):
        own = [c for c in range(captions) if owner[c] == image]
        best = max(i2t[image, c].item() for c in own)
        others = [c for c in range(captions) if owner[c] != image]
        of_images.append(sum(not i2t[image, c].item() < best for c in others))
    for caption in range(captions):
        mine = t2i[caption, owner[caption]].item()
        others = [i for i in range(images) if i != owner[caption]]
        of_captions.append(sum(not t2i[caption, i].item() < mine for i in others))
    return of_images, of_captions


def naive_list(row: Tensor, k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda n: (-row[n].item(), n))[:k]


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    images = draw(st.integers(1, 9))
    captions = draw(st.integers(images, 3 * images))
    return problem(
        draw(st.integers(0, 2**31)), images, captions, draw(st.integers(1, 3)),
        draw(st.sampled_from([0, 1, 4, 1000])),
    )  # fmt: skip


def with_blocks(queries: int, captions: int, action: Any) -> Any:
    """`action()` with blocks of another size."""
    before = ranking.QUERIES_AT_ONCE, ranking.CAPTIONS_AT_ONCE, ranking.MERGED_AT_ONCE
    ranking.QUERIES_AT_ONCE, ranking.CAPTIONS_AT_ONCE, ranking.MERGED_AT_ONCE = queries, captions, 2
    try:
        return action()
    finally:
        ranking.QUERIES_AT_ONCE, ranking.CAPTIONS_AT_ONCE, ranking.MERGED_AT_ONCE = before


@settings(max_examples=80, deadline=None)
@given(problems(), st.integers(0, 12), st.integers(1, 8), st.integers(1, 7))
def test_ranks_and_shortlists_equal_a_naive_loop(
    case: dict[str, Any], k: int, queries: int, width: int
) -> None:
    found: Contrast = with_blocks(queries, width, lambda: contrast(**case, k=k))
    sims, owner = dense(case), case["caption_image"].tolist()
    of_images, of_captions = naive_ranks(sims, sims.T, owner)
    assert found.rank_i2t.tolist() == of_images
    assert found.rank_t2i.tolist() == of_captions
    metrics = recalls_of_ranks(found.rank_i2t, found.rank_t2i)
    assert metrics == pytest.approx(recalls(sims, sims.T, case["caption_image"]))
    for listed, scores in ((found.captions, sims), (found.images, sims.T)):
        assert listed.index.tolist() == [naive_list(row, k) for row in scores]
        assert listed.score.equal(scores.gather(1, listed.index))


@settings(max_examples=80, deadline=None)
@given(problems(), st.integers(1, 12), st.integers(0, 2**31), st.sampled_from([2, 300]))
def test_reranked_equals_a_naive_loop(case: dict[str, Any], k: int, seed: int, levels: int) -> None:
    found = contrast(**case, k=k)
    sims, owner = dense(case), case["caption_image"]
    generator = torch.Generator().manual_seed(seed)
    match = torch.randint(-levels, levels, sims.shape, generator=generator) / 2.0
    scores = {}
    for name, cosine, logits in (("i2t", sims, match), ("t2i", sims.T, match.T)):
        scores[name] = torch.full(cosine.shape, -100.0)
        for row, values in enumerate(cosine):
            listed = naive_list(values, k)
            scores[name][row, listed] = values[listed] + logits[row, listed]
    pairs = Pairs(found.captions, found.images)
    logits = match[pairs.image, pairs.caption]
    rank_i2t, rank_t2i, captions, images = rerank_lists(
        pairs, logits, found.captions, found.images, owner
    )
    want = naive_ranks(scores["i2t"], scores["t2i"], owner.tolist())
    assert (rank_i2t.tolist(), rank_t2i.tolist()) == want
    metrics = recalls_of_ranks(rank_i2t, rank_t2i)
    assert metrics == pytest.approx(recalls(scores["i2t"], scores["t2i"], owner))
    for listed, score in ((captions, scores["i2t"]), (images, scores["t2i"])):
        assert listed.score.equal(score.gather(1, listed.index))
        assert (listed.score.diff(dim=1) <= 0).all()


def test_the_same_lists_as_validation_where_nothing_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    feats = torch.nn.functional.normalize(torch.randn(40, 4, 16, generator=generator), dim=-1)
    texts = torch.nn.functional.normalize(torch.randn(100, 16, generator=generator), dim=-1)
    owner = torch.arange(100) % 40
    found = contrast(feats, texts, owner, k=7)
    sims = (feats.flatten(0, 1) @ texts.T).view(40, 4, 100).amax(dim=1)
    match = torch.randn(40, 100, generator=generator)
    pairs = Pairs(found.captions, found.images)
    ranks = rerank_lists(
        pairs, match[pairs.image, pairs.caption], found.captions, found.images, owner
    )
    i2t, t2i = rerank(sims, match, 7), rerank(sims.T, match.T, 7)
    assert recalls_of_ranks(*ranks[:2]) == recalls(i2t, t2i, owner)


def test_what_is_no_number_counts_against_us() -> None:
    case = problem(0, 12, 12, 2, 4)
    case["image_feats"][3] = math.nan
    case["text_feat"][5] = math.nan
    found = contrast(**case, k=4)
    sims = (case["image_feats"] @ case["text_feat"].T).amax(dim=1)
    of_images, of_captions = naive_ranks(sims, sims.T, case["caption_image"].tolist())
    assert found.rank_i2t[3] == 11 and found.rank_t2i[5] == 11
    assert (found.rank_i2t.tolist(), found.rank_t2i.tolist()) == (of_images, of_captions)
    nothing = torch.full((12, 2, 6), math.nan)
    found = contrast(nothing, case["text_feat"], case["caption_image"], k=4)
    assert set(recalls_of_ranks(found.rank_i2t, found.rank_t2i).values()) == {0.0}


def test_reranking_by_no_number_finds_nothing() -> None:
    listed = Shortlist(torch.tensor([[0, 1], [1, 2]]), torch.zeros(2, 2))
    own = torch.tensor([[True, False], [False, False]])
    match = torch.tensor([[math.nan, 1.0], [1.0, 2.0]])
    ranks = reranked_ranks(listed, match, own, torch.ones(2, dtype=torch.int64), 3)
    assert ranks.tolist() == [2, 2]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_duplicates_tie(count: int) -> None:
    """Copies of one image: none is found before all others, wherever they lie in their block."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, 256, generator=generator).repeat(count, 1, 1)
    others = torch.randn(50, 3, 256, generator=generator)
    feats = torch.nn.functional.normalize(torch.cat([others[:20], image, others[20:]]), dim=-1)
    texts = feats[:, 0].clone()
    found = contrast(feats, texts, torch.arange(len(feats)), k=3)
    assert found.rank_t2i[20 : 20 + count].tolist() == [count - 1] * count
    assert found.rank_i2t[20 : 20 + count].tolist() == [count - 1] * count


def ranked() -> dict[str, Any]:
    case = problem(1, 23, 61, 3, 2)
    found = with_blocks(6, 10, lambda: contrast(**case, k=5, world=current_world()))
    return {
        "ranks": [found.rank_i2t, found.rank_t2i],
        "lists": [found.captions.index, found.captions.score, found.images.index],
    }


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_do_not_depend_on_the_number_of_processes(size: int) -> None:
    alone = ranked()
    for rank in run_ranks(ranked, size):
        for name, tensors in alone.items():
            for ours, theirs in zip(rank[name], tensors, strict=True):
                assert ours.equal(theirs), name


FLOATS = [-math.inf, -3.5, -1e-30, -0.0, 0.0, 1e-30, 0.25, math.inf]


def test_keys_sort_as_scores_do() -> None:
    score = torch.tensor([[*FLOATS, 0.25, math.nan, -math.nan]])
    listed = from_keys(to_keys(score, torch.arange(11)))
    assert listed.index.tolist() == [[9, 10, 7, 6, 8, 5, 3, 4, 2, 1, 0]]
    assert listed.score[0, 2:].tolist() == score[0, listed.index[0, 2:]].tolist()
    assert listed.score[0, :2].isnan().all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 5))
def test_portions_cover_each_pair_once(counts: list[int], images: int) -> None:
    total = max(counts)
    lists = Shortlist(torch.arange(total).repeat(len(counts), 1), torch.empty(0))
    pairs = Pairs(lists, Shortlist(torch.zeros(total, 0, dtype=torch.int64), torch.empty(0)))
    keep = torch.cat([torch.arange(n * total, n * total + count) for n, count in enumerate(counts)])
    pairs.codes, pairs.image, pairs.caption = keep, keep // total, keep % total
    before, matching.PAIRS_OF_A_PORTION = matching.PAIRS_OF_A_PORTION, 13
    try:
        portions = pairs.portions(images)
    finally:
        matching.PAIRS_OF_A_PORTION = before
    rows = [range(part.start, part.stop) for part in portions]
    assert [row for part in rows for row in part] == list(range(len(keep)))
    for part in portions:
        assert 0 < part.stop - part.start <= 13
        assert len(pairs.image[part].unique()) <= images
    assert pairs.find(pairs.image, pairs.caption).tolist() == list(range(len(keep)))
