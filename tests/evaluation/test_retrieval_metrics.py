"""Recall at K.

Proven: equal to a naive loop on any scores, with ties and several captions per image; ties and
scores that are not numbers count against us; re-ranking keeps exactly k of each row; the pairs to
match are those that either direction needs.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blip2_train.evaluation.retrieval import (
    NOT_RANKED,
    chunks,
    mean_r1,
    pairs_to_match,
    recalls,
    rerank,
    shortlist,
)


def naive_recalls(i2t: Tensor, t2i: Tensor, caption_image: list[int]) -> dict[str, float]:
    images, captions = i2t.shape
    rows_i2t, rows_t2i = i2t.tolist(), t2i.tolist()
    ranks: dict[str, list[int]] = {"i2t": [], "t2i": []}
    for image in range(images):
        own = [c for c in range(captions) if caption_image[c] == image]
        ranks["i2t"].append(
            min(
                sum(
                    rows_i2t[image][other] >= rows_i2t[image][c]
                    for other in range(captions)
                    if other not in own
                )
                for c in own
            )
        )
    for caption in range(captions):
        mine = caption_image[caption]
        ranks["t2i"].append(
            sum(rows_t2i[caption][o] >= rows_t2i[caption][mine] for o in range(images) if o != mine)
        )
    found = {
        f"{way}_r{k}": 100 * sum(r < k for r in ranks[way]) / len(ranks[way])
        for way in ("i2t", "t2i")
        for k in (1, 5, 10)
    }
    return found | {"r_mean": sum(found.values()) / 6}


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[int]]:
    images = draw(st.integers(1, 13))
    extra = draw(st.lists(st.integers(0, images - 1), max_size=12))
    caption_image = draw(st.permutations([*range(images), *extra]))
    levels = draw(st.sampled_from([2, 5, 1000]))  # few levels make ties
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = images, len(caption_image)
    i2t = torch.randint(0, levels, shape, generator=generator).float() / 7
    t2i = torch.randint(0, levels, shape, generator=generator).float().T / 7
    return i2t, t2i, list(caption_image)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_recalls_equal_a_naive_loop(problem: tuple[Tensor, Tensor, list[int]]) -> None:
    i2t, t2i, caption_image = problem
    ours = recalls(i2t, t2i, torch.tensor(caption_image))
    assert ours == pytest.approx(naive_recalls(i2t, t2i, caption_image))


def test_the_best_of_an_images_captions_counts() -> None:
    caption_image = torch.tensor([1, 0, 1, 2])
    i2t = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.1, 0.8, 0.9, 0.2], [0.5, 0.6, 0.7, 0.9]])
    t2i = torch.tensor([[0.1, 0.9, 0.2], [0.3, 0.2, 0.1], [0.9, 0.8, 0.7], [0.0, 0.0, 0.1]])
    metrics = recalls(i2t, t2i, caption_image)
    assert metrics["i2t_r1"] == pytest.approx(200 / 3)
    assert metrics["t2i_r1"] == pytest.approx(75)
    assert metrics["i2t_r5"] == metrics["t2i_r10"] == 100
    assert mean_r1(metrics) == pytest.approx((200 / 3 + 75) / 2)


@pytest.mark.parametrize("value", [0.25, math.nan, -math.inf])
def test_a_model_without_an_opinion_finds_nothing(value: float) -> None:
    caption_image = torch.arange(12)
    scores = torch.full((12, 12), value)
    assert set(recalls(scores, scores.T, caption_image).values()) == {0.0}


def test_one_score_that_is_no_number_does_not_help() -> None:
    scores = torch.eye(3)
    scores[0, 0] = math.nan
    metrics = recalls(scores, scores.T, torch.arange(3))
    assert metrics["i2t_r1"] == metrics["t2i_r1"] == pytest.approx(200 / 3)


@pytest.mark.parametrize("k", [1, 3, 6, 100])
def test_reranking(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sims, match = torch.rand(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    best = shortlist(sims, k)
    assert (best.sum(dim=1) == min(k, 6)).all()
    scores = rerank(sims, match, k)
    for row in range(4):
        order = sims[row].argsort(descending=True).tolist()
        assert best[row].nonzero().flatten().tolist() == sorted(order[:k])
        for column in range(6):
            wanted = (sims + match)[row, column] if column in order[:k] else NOT_RANKED
            assert scores[row, column] == wanted
    # what is not needed is not looked at
    assert rerank(sims, match.masked_fill(~best, math.nan), k).equal(scores)


def test_pairs_to_match_serve_both_directions() -> None:
    sims = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.2, 0.3]])
    wanted = [[True, True, False], [True, False, True]]
    assert pairs_to_match(sims, 1).tolist() == wanted


@pytest.mark.parametrize(("count", "size"), [(0, 3), (7, 3), (6, 3), (2, 5)])
def test_chunks_cover_everything_once(count: int, size: int) -> None:
    parts = [list(range(count))[part] for part in chunks(count, size)]
    assert [x for part in parts for x in part] == list(range(count))
    assert all(0 < len(part) <= size for part in parts)
