"""The objectives of stage 1 as functions of tensors.

Proven: the contrastive loss is torch's label smoothing for distinct ids and a naive loop for
shared ones; the similarity in chunks is the whole one and a naive loop, forward and backward;
positives are never drawn as negatives; draws follow their weights, never hit a weight of 0,
survive the extremes of the uniform number and do not depend on how rows are cut; sums over rows
and tokens; floors are what a numeric minimisation finds.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blip2_train import losses
from blip2_train.losses import (
    draw_negatives,
    itc_loss,
    itm_loss_sum,
    itm_prior,
    lm_loss_sum,
    max_similarity,
    negative_weights,
    same_id,
    smoothing_floor,
)

B, N, Q, E, V = 4, 7, 3, 5, 11  # own rows, columns, queries, contrastive width, vocabulary


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- contrast --------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("first", [0, 3])
def test_distinct_ids_are_plain_label_smoothing(smoothing: float, first: int) -> None:
    i2t, t2i = 8 * normal(B, N), 8 * normal(B, N, seed=1)
    target = torch.arange(first, first + B)  # own samples lie anywhere among the columns
    loss = itc_loss(i2t, t2i, same_id(target, torch.arange(N)), smoothing)
    parts = [F.cross_entropy(s, target, label_smoothing=smoothing) for s in (i2t, t2i)]
    assert loss.item() == pytest.approx(sum(parts).item() / 2, abs=1e-12)


def test_shared_ids_equal_a_naive_loop() -> None:
    i2t, t2i = 8 * normal(B, N).requires_grad_(), 8 * normal(B, N, seed=1)
    ids_all = torch.tensor([4, 9, 4, 4, 7, 9, 1])
    ids = ids_all[:B]
    total = torch.zeros((), dtype=torch.float64)
    for sims in (i2t, t2i):
        for row in range(B):
            logs = sims[row].log_softmax(dim=0)
            positives = [c for c in range(N) if ids_all[c] == ids[row]]
            for column in range(N):
                share = 0.9 / len(positives) if column in positives else 0.0
                total = total - (share + 0.1 / N) * logs[column] / (2 * B)
    loss = itc_loss(i2t, t2i, same_id(ids, ids_all), 0.1)
    assert loss.item() == pytest.approx(total.item(), abs=1e-12)
    ours, theirs = (torch.autograd.grad(x, i2t)[0] for x in (loss, total))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_contrast_ignores_autocast() -> None:
    i2t, t2i = (normal(B, N, seed=s, dtype=torch.float32) for s in (0, 1))
    positive = same_id(torch.arange(B), torch.arange(N))
    plain = itc_loss(i2t, t2i, positive, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert itc_loss(i2t, t2i, positive, 0.1).equal(plain)
        feats = normal(B, Q, E, dtype=torch.float32), normal(N, E, dtype=torch.float32)
        assert max_similarity(*feats).dtype == torch.float32


@pytest.mark.parametrize("chunk", [1, Q * N, 2 * Q * N, 3 * Q * N + 1, 10**6])
def test_similarity_in_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    images = F.normalize(normal(B, Q, E), dim=-1).requires_grad_()
    texts = F.normalize(normal(N, E, seed=1), dim=-1).requires_grad_()
    naive = torch.stack(
        [
            torch.stack([max(torch.dot(query, text) for query in image) for text in texts])
            for image in images
        ]
    )
    monkeypatch.setattr(losses, "SIMILARITY_CHUNK", chunk)
    ours = max_similarity(images, texts)
    torch.testing.assert_close(ours, naive, atol=1e-14, rtol=0)
    weights = normal(B, N, seed=2)
    gradients = [torch.autograd.grad((x * weights).sum(), (images, texts)) for x in (ours, naive)]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-13, rtol=0)


# -- negatives -------------------------------------------------------------------------------------


def test_weights_are_a_softmax_without_positives() -> None:
    sims = (20 * normal(B, N)).requires_grad_()
    ids_all = torch.tensor([4, 9, 4, 4, 7, 9, 1])
    positive = same_id(ids_all[:B], ids_all)
    weights = negative_weights(sims, positive)
    assert not weights.requires_grad
    assert (weights[positive] == 0).all() and (weights[~positive] > 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(B, dtype=torch.float64))
    for row in range(B):
        rest = ~positive[row]
        torch.testing.assert_close(weights[row, rest], sims[row, rest].softmax(dim=0).detach())


def test_a_row_of_positives_has_no_weight() -> None:
    weights = negative_weights(normal(2, 3), torch.tensor([[True] * 3, [True, False, True]]))
    assert weights.tolist() == [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    index, valid = draw_negatives(weights, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert valid.tolist() == [False, True] and index.tolist() == [0, 1]


EXTREMES = (0.0, 2.0**-1074, 2.0**-53, 0.5, 1 - 2.0**-52, 1 - 2.0**-53)


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(
        st.one_of(
            st.just(0.0), st.floats(2**-100, 2**20), st.sampled_from([1e-30, 2.0**-24, 1.0, 1 / 3])
        ),
        min_size=1,
        max_size=9,
    ),
    uniform=st.one_of(st.sampled_from(EXTREMES), st.floats(0, 1, exclude_max=True)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_weight_of_zero_is_never_drawn(
    weights: list[float], uniform: float, dtype: torch.dtype
) -> None:
    row = torch.tensor([weights], dtype=dtype)
    index, valid = draw_negatives(row, torch.tensor([uniform], dtype=torch.float64))
    assert valid.item() is bool((row > 0).any())
    assert 0 <= index.item() < len(weights)
    if valid:
        assert row[0, index] > 0


def test_extremes_draw_the_first_and_the_last_candidate() -> None:
    row = torch.tensor([[0.0, 0.25, 0.0, 0.25, 0.5, 0.0]])
    for uniform, wanted in ((0.0, 1), (0.2499, 1), (0.2501, 3), (0.4999, 3), (1 - 2.0**-53, 4)):
        index, _ = draw_negatives(row, torch.tensor([uniform], dtype=torch.float64))
        assert index.item() == wanted, uniform


def test_draws_follow_the_weights() -> None:
    weights = torch.tensor([0.1, 0.0, 1.5, 0.4, 0.0, 2.0])  # need not sum to 1
    draws = 20_000
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    index, valid = draw_negatives(weights.expand(draws, -1), uniform)
    assert valid.all()
    counts = torch.bincount(index, minlength=6).double()
    expected = draws * weights.double() / weights.sum()
    assert counts[[1, 4]].tolist() == [0, 0]
    drawn = weights > 0
    chi_square = ((counts - expected)[drawn] ** 2 / expected[drawn]).sum()
    assert chi_square < 16.3  # three degrees of freedom: exceeded once in a thousand


def test_a_row_s_draw_does_not_depend_on_its_neighbours() -> None:
    weights = normal(12, N).exp()
    uniform = torch.rand(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole, _ = draw_negatives(weights, uniform)
    for size in (1, 3, 4):
        parts = zip(weights.split(size), uniform.split(size), strict=True)
        assert torch.cat([draw_negatives(w, u)[0] for w, u in parts]).equal(whole)


# -- sums ------------------------------------------------------------------------------------------


def test_matching_sums_the_rows_that_count() -> None:
    logits = normal(3 * B, 2).requires_grad_()
    labels = torch.tensor([1] * B + [0] * 2 * B)
    weight = torch.ones(3 * B, dtype=torch.float64)
    weight[[B + 1, 2 * B + 1]] = 0
    loss = itm_loss_sum(logits, labels, weight)
    wanted = sum(
        -logits[row].log_softmax(dim=0)[labels[row]] for row in range(3 * B) if weight[row]
    )
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient.abs().sum(dim=1) == 0).equal(weight == 0)


def test_captioning_sums_over_tokens() -> None:
    logits, targets = normal(B, V), torch.tensor([0, 10, 3, 3])
    loss = lm_loss_sum(logits, targets, 0.1)
    log = logits.log_softmax(dim=1)
    wanted = sum(-0.9 * log[i, t] - 0.1 * log[i].mean() for i, t in enumerate(targets))
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-12)
    assert lm_loss_sum(logits[:0], targets[:0], 0.1).item() == 0


def test_half_precision_logits_are_widened() -> None:
    logits = normal(B, V, dtype=torch.float32)
    targets = torch.tensor([0, 10, 3, 3])
    half = logits.bfloat16()
    assert lm_loss_sum(half, targets, 0.1).equal(lm_loss_sum(half.float(), targets, 0.1))
    labels, weight = torch.tensor([0, 1, 1, 0]), torch.ones(4)
    two = half[:, :2]
    assert itm_loss_sum(two, labels, weight).equal(itm_loss_sum(two.float(), labels, weight))


# -- floors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "smoothing"), [(2, 0.1), (6, 0.3), (40, 0.1), (1600, 0.05)])
def test_the_floor_is_the_minimum(classes: int, smoothing: float) -> None:
    logits = torch.zeros(1, classes, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1])
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = lm_loss_sum(logits, target, smoothing)
        value.backward()
        return value

    optimizer.step(loss)
    floor = smoothing_floor(classes, smoothing)
    assert floor == pytest.approx(loss().item(), abs=1e-6)
    assert floor <= loss().item() + 1e-12


def test_published_levels() -> None:
    assert itm_prior() == pytest.approx(0.6365, abs=1e-4)
    head = torch.tensor([[math.log(2 / 3), math.log(1 / 3)]]).expand(3, 2)  # ignores its input
    wanted = itm_loss_sum(head, torch.tensor([1, 0, 0]), torch.ones(3)).item() / 3
    assert itm_prior() == pytest.approx(wanted, abs=1e-6)
    assert smoothing_floor(1600, 0.1) == pytest.approx(1.06, abs=0.01)
    assert smoothing_floor(1024, 0.1) == pytest.approx(1.02, abs=0.01)
    assert smoothing_floor(30523, 0.1) == pytest.approx(1.36, abs=0.01)
    assert smoothing_floor(1600, 0.0) == smoothing_floor(1, 0.1) == 0.0
