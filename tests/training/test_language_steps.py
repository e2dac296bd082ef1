"""One step of stage 2 and of `lm`.

Proven: 1, 2 and 3 processes with the same global batch, of texts of uneven length, give the same
loss and averaged gradients in float64, to 1e-9 for OPT and to 1e-6 for T5, whose norms compute in
float32 whatever the model's dtype;
"rank" is the mean of the ranks' means; the loss is the library's own; no step waits for the device,
and every way to tell a model what is padding, or to cut a batch into parts, gives the same.
"""

from typing import Any

import pytest
import torch
from language_steps import OPT, T5, VOCAB, N, T, stage2, texts
from ranks import run_ranks
from tiny import PATCHES, WIDTH
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from blip2_train.data import language_parts
from blip2_train.distributed import World, current_world
from blip2_train.models.clip import ImageEncoder
from blip2_train.models.language import LanguageModel
from blip2_train.models.lm_masks import FORMS
from blip2_train.models.lm_weights import random_model
from blip2_train.models.stage2 import Blip2Stage2
from blip2_train.training.lm import LmModule
from blip2_train.training.stage2 import stage2_step


class Step(nn.Module):
    """What DDP wraps."""

    def __init__(self, model: Blip2Stage2, normalise: str) -> None:
        super().__init__()
        self.model, self.normalise = model, normalise
        self._ddp_params_and_buffers_to_ignore = [
            f"model.language_model.{name}"
            for name, _ in [
                *model.language_model.named_parameters(),
                *model.language_model.named_buffers(),
            ]
        ]

    def forward(self, embeds: Tensor, batch: dict[str, Any], world: World) -> dict[str, Tensor]:
        return stage2_step(self.model, embeds, batch, self.normalise, world)


def stage2_results(normalise: str = "global") -> list[dict[str, Any]]:
    world = current_world()
    size = N // world.size
    rows = slice(world.rank * size, (world.rank + 1) * size)
    generator = torch.Generator().manual_seed(2)
    embeds = torch.randn(N, PATCHES, WIDTH, generator=generator, dtype=torch.float64)[rows]
    results = []
    for config in (OPT, T5):
        step = Step(stage2(config), normalise)
        wrapped = nn.parallel.DistributedDataParallel(step) if world.size > 1 else step
        batch = texts(rows, encoder=config is T5)
        loss = wrapped(embeds, batch, world)["loss"]
        loss.backward()
        gradients = {k: p.grad.clone() for k, p in step.named_parameters() if p.requires_grad}
        results.append({"loss": loss.item(), "gradients": gradients})
    return results


def without_starts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A document's first token is predicted from nothing."""
    later = batch["lm_index"] % T > 0
    return batch | {key: batch[key][later] for key in ("lm_index", "lm_targets")}


def lm_results() -> list[dict[str, Any]]:
    world = current_world()
    size = N // world.size
    model = random_model(OPT | {"dropout": 0.0}, 0).double()
    batch = texts(slice(world.rank * size, (world.rank + 1) * size), encoder=False)
    batch = without_starts(batch)
    module = LmModule(model, normalise="global", batch=None, seed=0, optimizer={}, schedule={})  # type: ignore[arg-type]

    class LmStep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return module.step(batch, 0, 0, world)["loss"]

    step = LmStep()
    wrapped = nn.parallel.DistributedDataParallel(step) if world.size > 1 else step
    loss = wrapped()
    loss.backward()
    gradients = {k: p.grad.clone() for k, p in step.named_parameters()}
    return [{"loss": loss.item(), "gradients": gradients}]


def all_results() -> list[dict[str, Any]]:
    return [*stage2_results(), *lm_results()]


@pytest.mark.parametrize("size", [2, 3])
def test_the_number_of_processes_changes_nothing(size: int) -> None:
    alone = all_results()
    ranks = run_ranks(all_results, size)
    for number, (whole, tolerance) in enumerate(zip(alone, (1e-9, 1e-6, 1e-9), strict=True)):
        parts = [rank[number] for rank in ranks]
        mean = sum(part["loss"] for part in parts) / size
        assert mean == pytest.approx(whole["loss"], abs=tolerance)
        for name, gradient in whole["gradients"].items():
            torch.testing.assert_close(
                parts[0]["gradients"][name], gradient, atol=tolerance, rtol=1e-9, msg=name
            )


def test_per_rank_means_differ_where_texts_do() -> None:
    whole = stage2_results("rank")
    parts = run_ranks(stage2_results, 2, "rank")
    mean = sum(part[0]["loss"] for part in parts) / 2
    assert mean == pytest.approx(whole[0]["loss"], abs=0.1)
    assert mean != pytest.approx(whole[0]["loss"], abs=1e-6)


def test_the_loss_is_the_librarys() -> None:
    model = random_model(OPT | {"dropout": 0.0}, 0)
    batch = texts(slice(0, N), encoder=False)
    batch = without_starts(batch)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    mask = batch["attention_mask"]
    wanted = model(input_ids=batch["input_ids"], attention_mask=mask, labels=labels).loss
    module = LmModule(model, normalise="rank", batch=None, seed=0, optimizer={}, schedule={})  # type: ignore[arg-type]
    assert module.step(batch, 0, 0, World())["loss"].item() == pytest.approx(
        wanted.item(), abs=1e-6
    )


LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCAB,
}  # fmt: skip
QWEN = LLAMA | {"model_type": "qwen2"}


class Waits(TorchDispatchMode):
    """Names what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(part in name for part in ("_local_scalar_dense", "nonzero", "masked_select")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [OPT, T5, LLAMA, QWEN], ids=lambda c: c["model_type"])
def test_a_step_waits_for_nothing(config: dict[str, Any]) -> None:
    batch = texts(slice(0, N), encoder=config is T5)
    embeds = torch.randn(N, PATCHES, WIDTH, dtype=torch.float64)
    model = stage2(config).train()
    with Waits() as waits:
        stage2_step(model, embeds, batch, "global", World())["loss"].backward()
    assert waits.found == []
    if config is T5:
        return
    module = LmModule(
        random_model(config, 0), normalise="rank", batch=None, seed=0, optimizer={}, schedule={}
    )  # type: ignore[arg-type]
    with Waits() as waits:
        module.step(without_starts(batch), 0, 0, World())["loss"].backward()
    assert waits.found == []


@pytest.mark.parametrize("config", [OPT, T5, LLAMA], ids=lambda c: c["model_type"])
def test_parts_of_similar_length_change_nothing(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_parts, "LEAST", 1)
    model, batch = stage2(config).train(), texts(slice(0, N), encoder=config is T5)
    generator = torch.Generator().manual_seed(2)
    embeds = torch.randn(N, PATCHES, WIDTH, generator=generator, dtype=torch.float64)
    results = []
    for count in (1, 3, 5):
        parts = language_parts.text_parts(batch, count, bucket=1)
        assert len(parts) == count
        model.zero_grad()
        loss = stage2_step(model, embeds, {**batch, "parts": parts}, "global", World())["loss"]
        loss.backward()
        gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        results.append((loss.item(), gradients))
    whole, tolerance = results[0], 1e-6 if config is T5 else 1e-9
    assert whole[0] == pytest.approx(
        stage2_step(model, embeds, batch, "global", World())["loss"].item(), abs=tolerance
    )
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(whole[0], abs=tolerance)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole[1][name], atol=tolerance, rtol=1e-7)


@pytest.mark.parametrize("config", [OPT, T5, LLAMA], ids=lambda c: c["model_type"])
def test_every_form_of_a_mask_says_the_same(config: dict[str, Any]) -> None:
    model = stage2(config)
    batch = texts(slice(0, N), encoder=config is T5)
    queries = torch.randn(N, 4, 16, dtype=torch.float64)
    results = []
    for form in ("rows", "square") if config is T5 else FORMS:
        model.language_model._mask_form = form
        results.append(model.text_logits(queries, batch))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("part", ["language_model", "image_encoder"])
def test_recomputation_can_be_switched_off(part: str) -> None:
    """Training counts the arithmetic of a step without it."""
    counts = []
    for built, used in ((False, False), (True, True), (True, False)):
        if part == "language_model":
            model = LanguageModel(config=OPT, weights="random", gradient_checkpointing=built)
            embeds = torch.randn(2, 5, 16, dtype=torch.bfloat16, requires_grad=True)
            inputs = (embeds, torch.ones(2, 5, dtype=torch.long), torch.arange(10))
            forward = model.logits
        else:
            model = ImageEncoder("test_vit", image_size=32, gradient_checkpointing=built)
            inputs, forward = (torch.randn(2, 3, 32, 32),), model
        model.gradient_checkpointing = used
        with FlopCounterMode(display=False) as counter:
            forward(*inputs).sum().backward()
        counts.append(counter.get_total_flops())
    without, recomputed, switched_off = counts
    assert without == switched_off < recomputed
