"""The grounding probe: what another image and a blank one cost each caption.

Proven: every row gets another image with a different id, evenly spread; losses equal a
recomputation image by image; a model whose text cannot see the image has a gap of exactly 0; the
numbers depend neither on batches nor on ranks, and are left out where there is nothing to tell.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import PATCHES, WIDTH, rows_of, tiny_batch, tiny_model
from torch import Tensor

from blip2_train.distributed import World, current_world
from blip2_train.evaluation import grounding
from blip2_train.evaluation.grounding import (
    Grounding,
    caption_nats,
    describe_grounding,
    other_rows,
    stage1_grounding,
    token_nats,
)
from blip2_train.models.blocks import CrossAttention
from blip2_train.models.stage1 import Blip2Stage1
from blip2_train.models.vision import blank_image
from blip2_train.training.objectives import LmConfig, LossConfig, stage1_step

IDS = [7, 7, 3, 7, 5, 3]


@pytest.fixture
def model() -> Blip2Stage1:
    return tiny_model().double().eval()


def blank_embeds() -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(1, PATCHES, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "ids", [[1, 2, 3, 4], [1, 1, 2], IDS, [5, 5, 5, 1], [4, 9], [2, 1, 2, 1], [0, -1, 2**62]]
)
def test_another_image_for_each_row(ids: list[int]) -> None:
    index, valid = other_rows(torch.tensor(ids))
    assert index.dtype == torch.int64 and valid.dtype == torch.bool and valid.all()
    for row, other in enumerate(index.tolist()):
        after = [(row + k) % len(ids) for k in range(1, len(ids))]
        assert other == next(i for i in after if ids[i] != ids[row])
    if len(set(ids)) == len(ids):
        assert set(Counter(index.tolist()).values()) == {1}


@pytest.mark.parametrize("ids", [[4], [4, 4], [4] * 5])
def test_no_other_image(ids: list[int]) -> None:
    index, valid = other_rows(torch.tensor(ids))
    assert not valid.any() and (index < len(ids)).all() and len(index) == len(valid) == len(ids)


@torch.no_grad()
def one_by_one(model: Blip2Stage1, embeds: Tensor, batch: dict[str, Any], row: int) -> float:
    """Nats of a caption with one image, token by token."""
    kv = model.encode_image(model.qformer.project_image(embeds)).query_kv
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
    total = 0.0
    for t in range(1, len(ids)):
        logits = model.lm_logits(model.caption(ids[None, :t], kv)[0, -1])
        total -= logits.softmax(dim=-1)[ids[t]].log().item()
    return total


@torch.no_grad()
def test_losses_equal_a_recomputation(model: Blip2Stage1, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grounding, "TOKENS_AT_ONCE", 7)  # several parts, one of them short
    batch = tiny_batch(len(IDS), ids=IDS)
    embeds = batch["image_embeds"]
    right, shuffled, blank, tokens, valid = stage1_grounding(model, embeds, blank_embeds(), batch)
    for row, other in enumerate([2, 2, 3, 4, 5, 0]):
        lengths = batch["attention_mask"][row].sum() - 1
        assert tokens[row] == lengths and valid[row]
        for got, shown in (
            (right, embeds[row : row + 1]),
            (shuffled, embeds[other : other + 1]),
            (blank, blank_embeds()),
        ):
            wanted = one_by_one(model, shown, batch, row)
            assert got[row].item() == pytest.approx(wanted, abs=1e-10)
    probe = Grounding()
    probe.add(right, shuffled, blank, tokens, valid)
    metrics = probe.read(World())
    assert metrics["lm_right"] == pytest.approx((right.sum() / tokens.sum()).item())
    gap = (shuffled - right).sum() / tokens.sum()
    assert metrics["grounding_gap"] == pytest.approx(gap.item()) and gap.abs() > 1e-3
    blank_gap = (blank - right).sum() / tokens.sum()
    assert metrics["grounding_gap_blank"] == pytest.approx(blank_gap.item())


@torch.no_grad()
def test_the_own_image_gives_the_captioning_loss(model: Blip2Stage1) -> None:
    batch = tiny_batch(4)
    plain = LossConfig({"itc": 0.0, "itm": 0.0, "lm": 1.0}, lm=LmConfig(smoothing=0.0))
    loss = stage1_step(model, batch["image_embeds"], batch, plain)["loss_lm"]
    right, _, _, tokens, _ = stage1_grounding(model, batch["image_embeds"], blank_embeds(), batch)
    torch.testing.assert_close(right.sum() / tokens.sum(), loss, atol=1e-12, rtol=0)


@torch.no_grad()
def test_text_that_cannot_see_the_image(model: Blip2Stage1) -> None:
    for module in model.modules():
        if isinstance(module, CrossAttention):
            module.output.weight.zero_()
    batch = tiny_batch(len(IDS), ids=IDS)
    probe = Grounding()
    probe.add(*stage1_grounding(model, batch["image_embeds"], blank_embeds(), batch))
    metrics = probe.read(World())
    assert metrics["grounding_gap"] == metrics["grounding_gap_blank"] == 0.0
    assert metrics["lm_right"] == metrics["lm_shuffled"] == metrics["lm_blank"] > 0
    assert "HARDLY" in describe_grounding(metrics)


@torch.no_grad()
def test_only_rows_with_another_image_make_the_gap(model: Blip2Stage1) -> None:
    batch = tiny_batch(5, ids=[1, 2, 3, 4, 4])
    parts = [rows_of(batch, rows) for rows in (slice(0, 3), slice(3, 5))]  # the second has none
    values = [stage1_grounding(model, p["image_embeds"], blank_embeds(), p) for p in parts]
    assert values[0][4].all() and not values[1][4].any()
    probe, first = Grounding(), Grounding()
    first.add(*values[0])
    for right, shuffled, *rest in values:
        probe.add(right, shuffled / 0 if not rest[-1].any() else shuffled, *rest)
    metrics, alone = probe.read(World()), first.read(World())
    assert metrics["grounding_gap"] == alone["grounding_gap"]
    assert metrics["lm_shuffled"] == alone["lm_shuffled"]
    tokens = torch.cat([v[3] for v in values]).sum()
    total = torch.cat([v[0] for v in values]).sum()
    assert metrics["lm_right"] == pytest.approx((total / tokens).item(), abs=1e-12)
    assert metrics["lm_right"] != pytest.approx(alone["lm_right"], abs=1e-6)


def test_names_are_missing_where_there_is_nothing() -> None:
    probe = Grounding()
    assert probe.read(World()) == {}
    assert "unknown" in describe_grounding({})
    one = torch.ones(1)
    probe.add(2 * one, 0 * one, 3 * one, one, torch.zeros(1, dtype=torch.bool))
    metrics = probe.read(World())
    assert metrics == {"lm_right": 2.0, "lm_blank": 3.0, "grounding_gap_blank": 1.0}
    assert describe_grounding(metrics).endswith("another image (right 2.00, blank 3.00)")
    assert probe.read(World()) == {}  # starts anew


def numbers(batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    right, shuffled, blank = torch.rand(3, 4, generator=generator, dtype=torch.float64) * 9
    tokens = torch.randint(1, 9, (4,), generator=generator)
    return right, shuffled, blank, tokens, torch.rand(4, generator=generator) < 0.7


def read_over_ranks() -> list[dict[str, float]]:
    world, readings = current_world(), []
    probe = Grounding()
    for batches in (5, 1):  # of one batch the second rank has nothing
        for batch in range(batches)[world.rank :: world.size]:
            probe.add(*numbers(batch))
        readings.append(probe.read(world))
    return readings


def test_two_ranks_read_what_one_reads() -> None:
    alone = read_over_ranks()
    assert all(len(metrics) == 5 for metrics in alone) and alone[0] != alone[1]
    for rank in run_ranks(read_over_ranks, 2):
        for metrics, wanted in zip(rank, alone, strict=True):
            assert metrics == pytest.approx(wanted, rel=1e-12)


def test_token_nats() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator)
    targets = torch.tensor([0, 4, 2, 2, 1, 3])
    rows = torch.tensor([2, 0, 0, 2, 2, 0])
    nats = token_nats(logits, targets, rows, 4)
    wanted = torch.zeros(4).double()
    for m in range(6):
        wanted[rows[m]] -= logits[m].double().softmax(0)[targets[m]].log()
    torch.testing.assert_close(nats, wanted, atol=1e-6, rtol=0)
    assert nats[1] == nats[3] == 0
    half = logits.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        low = token_nats(half, targets, rows, 4)
    assert low.equal(token_nats(half.float(), targets, rows, 4))


@torch.no_grad()
def test_captions_are_trimmed_or_not(model: Blip2Stage1) -> None:
    batch = tiny_batch(3, seed=1)
    kv = model.encode_image(model.qformer.project_image(batch["image_embeds"])).query_kv
    long = batch | {"text_length": batch["input_ids"].shape[1]}
    shortest = batch | {"text_length": int(batch["attention_mask"].sum(dim=1).max())}
    assert shortest["text_length"] < long["text_length"]
    torch.testing.assert_close(caption_nats(model, kv, long), caption_nats(model, kv, shortest))


def test_the_blank_image_is_normalised_to_zero() -> None:
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    image = blank_image(mean, 6)
    assert image.shape == (1, 3, 6, 6) and image.dtype == torch.uint8
    normalised = (image / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    assert normalised.abs().max() <= 0.5 / 255 / min(std) + 1e-6


def test_the_line_of_the_log() -> None:
    metrics = {"lm_right": 0.46, "lm_shuffled": 1.69, "lm_blank": 1.8, "grounding_gap": 1.231}
    line = "grounding gap 1.23 nats/token (right 0.46, shuffled 1.69, blank 1.80)"
    assert describe_grounding(metrics) == line
