"""One step of stage 0.

Proven: 1, 2 and 3 processes with the same global batch give the same loss and averaged gradients,
in float64 to 1e-9, with distinct and with shared image ids, in both gradient modes; the loss is
CLIP's own where it has no smoothing and no shared ids, and the naive one otherwise; in "reference"
mode the gathered side is constant; neither padding nor autocast around the similarities matters;
nothing in a step waits for the device; a few steps learn a handful of pairs.
"""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from tiny import TEXT, VOCAB, rows_of, tiny_batch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from blip2_train.distributed import current_world
from blip2_train.models.clip import Clip, ImageEncoder, TextEncoder
from blip2_train.training.contrast import TEMP_RANGE, clip_step
from blip2_train.training.objectives import ItcConfig

N, SIZE = 12, 32  # global batch: divisible by 1, 2 and 3; side of the images in pixels
IDS = {"distinct": None, "shared": [0, 1, 2, 0, 4, 4, 6, 7, 0, 9, 10, 1]}
CASES = [(ids, gradient) for ids in IDS for gradient in ("reference", "full")]


def tiny_clip() -> Clip:
    """Drawn from seed 0, float64."""
    image = ImageEncoder("test_vit", image_size=SIZE)
    torch.manual_seed(0)
    text = TextEncoder(
        vocab_size=VOCAB,
        end_token_id=3,
        hidden_size=16,
        num_heads=2,
        intermediate_size=24,
        max_positions=TEXT,
    )
    return Clip(image, text, embed_dim=6).double()


def pairs(size: int, ids: list[int] | None = None) -> dict[str, Any]:
    """Captions of 3 to TEXT tokens and images of noise."""
    batch = tiny_batch(size, ids=ids)
    del batch["image_embeds"]
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (size, 3, SIZE, SIZE), generator=generator)
    return batch | {"image": pixels.to(torch.uint8)}


class Step(nn.Module):
    """What DDP wraps."""

    def __init__(self, model: Clip, config: ItcConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, **arguments: Any) -> dict[str, Tensor]:
        return clip_step(self.model, loss=self.config, **arguments)


def all_cases() -> list[dict[str, Any]]:
    """This rank's part of every case, under DDP where there are other ranks."""
    world = current_world()
    size = N // world.size
    results = []
    for ids, gradient in CASES:
        batch = rows_of(pairs(N, IDS[ids]), slice(world.rank * size, (world.rank + 1) * size))
        model = tiny_clip()
        step: nn.Module = Step(model, ItcConfig(0.1, gradient))
        if world.size > 1:
            step = nn.parallel.DistributedDataParallel(step)
        out = step(batch=batch, world=world)
        out["loss"].backward()
        results.append(
            {
                "loss": out["loss"].item(),
                "sim": torch.stack([out["sim_i2t"], out["sim_t2i"]]).detach(),
                "gradients": {k: p.grad.clone() for k, p in model.named_parameters()},
            }
        )
    return results


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    return all_cases()


def three_then_two_and_one(folder: str) -> dict[int, list[dict[str, Any]]]:
    """Results by number of processes; three starts suffice, as to import takes longest."""
    rank, results = current_world().rank, {3: all_cases()}
    dist.destroy_process_group()
    size = 1 if rank == 2 else 2
    store, patience = f"file://{folder}/{size}", timedelta(seconds=120)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank % 2, world_size=size, timeout=patience
    )
    return results | {size: all_cases()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, list[dict[str, Any]]]]:
    return run_ranks(three_then_two_and_one, 3, str(tmp_path_factory.mktemp("stores")))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_number_of_processes_changes_nothing(
    size: int, alone: list[dict[str, Any]], ranks: list[dict[int, list[dict[str, Any]]]]
) -> None:
    of_size = [results[size] for results in ranks if size in results]
    assert len(of_size) == size
    for number, (ids, gradient) in enumerate(CASES):
        case, parts = f"{ids} ids, {gradient} gradient", [rank[number] for rank in of_size]
        mean = sum(part["loss"] for part in parts) / size
        assert mean == pytest.approx(alone[number]["loss"], abs=1e-9), case
        sim = torch.cat([part["sim"] for part in parts], dim=1)
        torch.testing.assert_close(sim, alone[number]["sim"], atol=1e-9, rtol=0)
        for name, wanted in alone[number]["gradients"].items():
            scale = max(1.0, wanted.abs().max().item())
            gap = (parts[0]["gradients"][name] - wanted).abs().max().item()
            assert gap <= 1e-9 * scale, f"gradient of {name}: {case}: {gap:.1e}"


def test_each_case_differs(alone: list[dict[str, Any]]) -> None:
    """Otherwise the comparison above would prove less than it says."""
    by_case = dict(zip(CASES, alone, strict=True))
    for ids in IDS:
        reference, full = by_case[ids, "reference"], by_case[ids, "full"]
        assert reference["loss"] == full["loss"]
        name = "image_proj.weight"
        assert not reference["gradients"][name].allclose(full["gradients"][name], rtol=0.1)
    assert by_case["distinct", "full"]["loss"] != by_case["shared", "full"]["loss"]
    for case in alone:
        assert all(gradient.abs().max() > 0 for gradient in case["gradients"].values())


def gradients(model: Clip, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("gradient", ["reference", "full"])
def test_without_smoothing_it_is_clips_own_loss(gradient: str) -> None:
    model, batch = tiny_clip(), pairs(5)
    out = clip_step(model, batch, ItcConfig(0.0, gradient))
    image = model.encode_image(batch["image"])
    text = model.encode_text(batch["input_ids"], batch["attention_mask"])
    fixed_image, fixed_text = (
        (image, text) if gradient == "full" else (image.detach(), text.detach())
    )
    labels = torch.arange(5)
    wanted = F.cross_entropy(image @ fixed_text.T / model.temp, labels) / 2
    wanted = wanted + F.cross_entropy(text @ fixed_image.T / model.temp, labels) / 2
    assert out["loss"].item() == pytest.approx(wanted.item(), abs=1e-12)
    assert out["loss_itc"] is out["loss"]
    assert out["sim_i2t"].shape == out["sim_t2i"].shape == out["positive"].shape == (5, 5)
    theirs = gradients(model, wanted)
    for name, value in gradients(model, out["loss"]).items():
        torch.testing.assert_close(value, theirs[name], atol=1e-12, rtol=1e-9, msg=name)


def test_samples_of_one_image_are_positives_of_each_other() -> None:
    ids, smoothing = [4, 7, 4, 4, 9], 0.1
    out = clip_step(tiny_clip(), pairs(5, ids), ItcConfig(smoothing, "full"))
    total = 0.0
    for sim in (out["sim_i2t"], out["sim_t2i"]):
        for row in range(5):
            logs = sim[row].log_softmax(dim=0)
            same = [column for column in range(5) if ids[column] == ids[row]]
            total -= (1 - smoothing) * sum(logs[c].item() for c in same) / len(same) / 10
            total -= smoothing * logs.mean().item() / 10
    assert out["loss"].item() == pytest.approx(total, abs=1e-12)
    assert out["positive"].sum().item() == 3 * 3 + 1 + 1


def test_trimming_and_padding_change_nothing() -> None:
    batch = pairs(5)
    batch = {k: v[2:4] for k, v in batch.items() if isinstance(v, Tensor) and "_index" not in k}
    shortest = int(batch["attention_mask"].sum(dim=1).max())
    assert shortest < TEXT
    model, lengths = tiny_clip(), []
    model.text_encoder.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    trimmed, padded = (
        clip_step(model, batch | {"text_length": length}, ItcConfig())["loss"].item()
        for length in (shortest, TEXT)
    )
    assert trimmed == pytest.approx(padded, abs=1e-12)
    assert lengths == [shortest, TEXT]


def test_similarities_and_loss_are_not_cast() -> None:
    model, batch = tiny_clip().float(), pairs(5)
    with torch.autocast("cpu", torch.bfloat16):
        out = clip_step(model, batch, ItcConfig())
    for name in ("image_feat", "text_feat", "sim_i2t", "sim_t2i", "loss"):
        assert out[name].dtype == torch.float32, name
    assert out["sim_i2t"].equal(out["image_feat"] @ out["text_feat"].T / model.temp)


class NoHostReads(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(function.__name__.startswith(part) for part in self.FORBIDDEN):
            raise AssertionError(f"{function.__name__} waits for the device")
        return function(*args, **(kwargs or {}))


def test_a_step_waits_for_nothing() -> None:
    model, batch = tiny_clip(), pairs(5)
    with NoHostReads():
        clip_step(model, batch, ItcConfig())["loss"].backward()
    with pytest.raises(AssertionError, match="waits"), NoHostReads():
        batch["image"].sum().item()


def test_a_few_steps_learn_a_handful_of_pairs() -> None:
    model, batch = tiny_clip().float(), pairs(6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        out = clip_step(model, batch, ItcConfig(0.0, "full"))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        with torch.no_grad():
            model.temp.clamp_(*TEMP_RANGE)
        losses.append(out["loss"].item())
    assert losses[2] < losses[0] and losses[-1] < 0.5 * losses[0], losses
    assert out["sim_i2t"].argmax(dim=1).equal(torch.arange(6))
