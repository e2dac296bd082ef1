"""One stage-1 step.

Proven: 1, 2 and 3 processes with the same global batch draw the same negatives and give the same
losses and averaged gradients, in float64 to 1e-9 and in float32 to 1e-5, with distinct and with
shared image ids, in both gradient modes; checkpointing changes nothing, dropout included; batch 1,
one shared id, and losses turned off work; the chunked captioning loss equals the whole one; nothing
in a step waits for the device.
"""

import functools
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import loss_config, rows_of, tiny_batch, tiny_model
from torch import Tensor, nn

from blip2_train.distributed import World, current_world
from blip2_train.models import cross_entropy
from blip2_train.models.counting import HostReads, saved_bytes
from blip2_train.training import objectives
from blip2_train.training.objectives import LossConfig, draw_uniform, stage1_step

N = 12  # global batch: divisible by 1, 2 and 3
IDS = {"distinct": None, "shared": [0, 1, 2, 0, 4, 4, 6, 7, 0, 9, 10, 1]}
CASES = [
    (ids, gradient, dtype, parts)
    for parts in (1, 2)
    for ids in IDS
    for gradient in ("reference", "full")
    for dtype in (torch.float64, torch.float32)
]


class Step(nn.Module):
    """What DDP wraps."""

    def __init__(self, model: nn.Module, config: LossConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, **arguments: Any) -> dict[str, Tensor]:
        return stage1_step(self.model, config=self.config, **arguments)


def all_cases() -> list[dict[str, Any]]:
    """This rank's part of every case, under DDP where there are other ranks."""
    world = current_world()
    size = N // world.size
    results = []
    for ids, gradient, dtype, parts in CASES:
        batch = rows_of(tiny_batch(N, ids=IDS[ids]), slice(world.rank * size, None))
        batch = rows_of(batch, slice(0, size))
        model = tiny_model().to(dtype)
        step: nn.Module = Step(model, loss_config(gradient))
        if world.size > 1:
            step = nn.parallel.DistributedDataParallel(step)
        out = step(
            image_embeds=batch.pop("image_embeds").to(dtype),
            batch=batch,
            uniform=draw_uniform(3, 5, 0, size, world),
            world=world,
            parts=parts,
        )
        out["loss"].backward()
        results.append(
            {
                "losses": {k: v.item() for k, v in out.items() if k.startswith("loss")},
                "negatives": torch.stack([out["neg_image_idx"], out["neg_text_idx"]]),
                "gradients": {k: p.grad.clone() for k, p in model.named_parameters()},
            }
        )
    return results


@pytest.mark.parametrize("size", [1, 2, 3])
def test_neither_processes_nor_parts_change_anything(size: int) -> None:
    whole = all_cases()
    ranks = run_ranks(all_cases, size) if size > 1 else [whole]
    for number, (ids, gradient, dtype, parts) in enumerate(CASES):
        case = f"{ids} ids, {gradient} gradient, {dtype}, {parts} parts"
        alone = whole[CASES.index((ids, gradient, dtype, 1))]
        tolerance = 1e-9 if dtype == torch.float64 else 1e-5
        results = [rank[number] for rank in ranks]
        drawn = torch.cat([result["negatives"] for result in results], dim=1)
        assert drawn.equal(alone["negatives"]), case
        for name, value in alone["losses"].items():
            mean = sum(result["losses"][name] for result in results) / size
            assert mean == pytest.approx(value, abs=tolerance), f"{name}: {case}"
        for name, gradient_alone in alone["gradients"].items():
            scale = max(1.0, gradient_alone.abs().max().item())
            gap = (results[0]["gradients"][name] - gradient_alone).abs().max().item()
            assert gap <= tolerance * scale, f"gradient of {name}: {case}: {gap:.1e}"


def run_one(
    batch: dict[str, Any], config: LossConfig, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = options.pop("model", None) or tiny_model().double()
    uniform = torch.rand(2, len(batch["image_id"]), generator=torch.Generator().manual_seed(1))
    out = stage1_step(
        model, batch["image_embeds"], batch, config, uniform=uniform.double(), **options
    )
    out["loss"].backward()
    return out, {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_changes_nothing() -> None:
    results = []
    for checkpointing in (False, True):
        model = tiny_model(dropout=0.3, gradient_checkpointing=checkpointing).double().train()
        torch.manual_seed(7)
        results.append(run_one(tiny_batch(6), loss_config(), model=model))
    (plain, gradients), (recomputed, again) = results
    for name in ("loss", "loss_itc", "loss_itm", "loss_lm"):
        assert plain[name].item() == pytest.approx(recomputed[name].item(), abs=1e-12)
    assert gradients.keys() == again.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, again[name], atol=1e-12, rtol=1e-10, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [{}, {"itc": 0.0}, {"itm": 0.0}, {"itc": 0.0, "lm": 0.0}])
def test_four_parts_of_16_are_one_of_64(weights: dict[str, float], dtype: torch.dtype) -> None:
    """GradCache: what a part holds is all that is in memory, and the numbers stay the same."""
    batch = tiny_batch(64, seed=1)
    batch["image_embeds"] = batch["image_embeds"].to(dtype)
    config, held = loss_config("full", **weights), []
    results = []
    for parts in (1, 4):
        model = tiny_model().to(dtype)
        results.append(run_one(batch, config, model=model, parts=parts))
        uniform = torch.rand(2, 64, dtype=torch.float64)
        step = functools.partial(
            stage1_step, model, batch["image_embeds"], batch, config, uniform=uniform
        )
        held.append(saved_bytes(functools.partial(step, parts=parts), model.parameters()))
    (whole, gradients), (cached, again) = results
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    if "neg_image_idx" in whole:
        assert whole["neg_image_idx"].equal(cached["neg_image_idx"])
    for name in (n for n in whole if n.startswith("loss")):
        assert whole[name].item() == pytest.approx(cached[name].item(), abs=tolerance), name
    assert gradients.keys() == again.keys()
    for name, gradient in gradients.items():
        scale = max(1.0, gradient.abs().max().item())
        assert (gradient - again[name]).abs().max() <= tolerance * scale, name
    assert held[1] < 0.5 * held[0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_parts_are_computed_again_with_the_same_dropout(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = {
        k: v.to(device) if isinstance(v, Tensor) else v for k, v in tiny_batch(6, seed=1).items()
    }
    results = []
    for again in (True, False):
        if not again:  # nothing is computed twice
            monkeypatch.setattr(objectives, "checkpoint", lambda f, *args, **_: f(*args))
        model = tiny_model(dropout=0.3).double().to(device).train()
        torch.manual_seed(7)
        results.append(run_one(batch, loss_config(), model=model, parts=3)[1])
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], atol=1e-12, rtol=1e-10, msg=name)


def test_dropout_matters_in_that_comparison() -> None:
    losses = []
    for seed in (7, 8):
        model = tiny_model(dropout=0.3).double().train()
        torch.manual_seed(seed)
        losses.append(run_one(tiny_batch(6), loss_config(), model=model)[0]["loss"].item())
    assert losses[0] != losses[1]


@pytest.mark.parametrize(("size", "ids"), [(1, [5]), (4, [5, 5, 5, 5])])
def test_without_any_negative_matching_trains_on_the_pairs_alone(size: int, ids: list[int]) -> None:
    out, gradients = run_one(tiny_batch(size, ids=ids), loss_config())
    assert not out["has_negative"].any()
    own = nn.functional.cross_entropy(out["itm_logits"][:size], torch.ones(size).long())
    assert out["loss_itm"].item() == pytest.approx(own.item(), abs=1e-12)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    # every target is uniform over equal ids: with one id there is nothing to contrast
    if size == 1:
        assert out["loss_itc"].item() == pytest.approx(0.0, abs=1e-12)


def test_negatives_never_share_the_id() -> None:
    ids = [0, 0, 0, 0, 0, 0, 0, 8]
    out, _ = run_one(tiny_batch(8, ids=ids), loss_config())
    image_id = torch.tensor(ids)
    assert (image_id[out["neg_image_idx"]] != image_id).all()
    assert (image_id[out["neg_text_idx"]] != image_id).all()


@pytest.mark.parametrize("off", [("itc",), ("itm",), ("lm",), ("itc", "lm"), ("itm", "itc")])
def test_a_loss_of_weight_zero_is_not_computed(off: tuple[str, ...]) -> None:
    batch = tiny_batch(5)
    everything, _ = run_one(batch, loss_config())
    some, _ = run_one(batch, loss_config(**dict.fromkeys(off, 0.0)))
    assert not any(f"loss_{name}" in some for name in off)
    rest = [name for name in ("itc", "itm", "lm") if name not in off]
    assert some["loss"].item() == pytest.approx(sum(some[f"loss_{n}"].item() for n in rest))
    for name in rest:
        if not (name == "itm" and "itc" in off):  # without ITC negatives are drawn uniformly
            assert some[f"loss_{name}"].item() == pytest.approx(everything[f"loss_{name}"].item())


def test_without_itc_negatives_are_uniform() -> None:
    out, _ = run_one(tiny_batch(5), loss_config(itc=0.0))
    assert out["neg_weights_t2i"].equal((~torch.eye(5, dtype=torch.bool)).float())


def test_weights_scale_the_losses() -> None:
    out, _ = run_one(tiny_batch(5), loss_config(itc=0.5, itm=2.0, lm=3.0))
    wanted = 0.5 * out["loss_itc"] + 2 * out["loss_itm"] + 3 * out["loss_lm"]
    assert out["loss"].item() == pytest.approx(wanted.item())


def test_chunked_captioning_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, gradients = run_one(tiny_batch(6), loss_config())
    monkeypatch.setattr(cross_entropy, "CHUNK", 7)
    chunked, again = run_one(tiny_batch(6), loss_config())
    assert len(whole["lm_targets"]) > 14
    assert whole["loss_lm"].item() == pytest.approx(chunked["loss_lm"].item(), abs=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, again[name], atol=1e-12, rtol=1e-10, msg=name)


def test_trimming_and_padding_change_nothing() -> None:
    batch = tiny_batch(6, seed=2)
    whole = {**batch, "text_length": batch["input_ids"].shape[1]}
    shortest = int(batch["attention_mask"].sum(dim=1).max())
    trimmed, gradients = run_one({**batch, "text_length": shortest}, loss_config())
    padded, again = run_one(whole, loss_config())
    assert trimmed["loss"].item() == pytest.approx(padded["loss"].item(), abs=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, again[name], atol=1e-12, rtol=1e-10, msg=name)


def test_a_step_waits_for_nothing() -> None:
    model, batch = tiny_model().double(), tiny_batch(6)
    uniform = draw_uniform(0, 0, 0, 6, World())
    with HostReads() as reads:
        out = stage1_step(model, batch["image_embeds"], batch, loss_config(), uniform=uniform)
        out["loss"].backward()
    assert reads.names == []
    with HostReads() as reads:
        batch["image_embeds"].sum().item()
        (batch["image_embeds"] > 0).nonzero()
    assert reads.names == ["_local_scalar_dense.default", "nonzero.default"]


def test_negatives_depend_on_seed_step_and_part_alone() -> None:
    whole = draw_uniform(1, 2, 3, 12, World(0, 1))
    parts = [draw_uniform(1, 2, 3, 4, World(rank, 3)) for rank in range(3)]
    assert torch.cat(parts, dim=1).equal(whole)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not draw_uniform(*other, 12, World()).equal(whole)
