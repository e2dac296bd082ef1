"""On a GPU: a step waits for nothing, and its losses are those of the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from language_steps import OPT, T5, N, stage2, texts
from tiny import (
    PATCHES,
    WIDTH,
    loss_config,
    tiny_batch,
    tiny_model,
    tiny_run,
    train_in_process,
)
from whole_runs import assert_same_end

from blip2_train.distributed import World
from blip2_train.training.objectives import draw_uniform, stage1_step
from blip2_train.training.stage2 import stage2_step


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_for_nothing_and_equals_the_cpus() -> None:
    model, batch = tiny_model().double(), tiny_batch(6)
    uniform = draw_uniform(0, 0, 0, 6, World())
    config = loss_config()
    wanted = stage1_step(model, batch["image_embeds"], batch, config, uniform=uniform)
    model.cuda()
    batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    uniform = uniform.pin_memory()
    stage1_step(model, batch["image_embeds"], batch, config, uniform=uniform)  # first-use set-up
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = stage1_step(model, batch["image_embeds"], batch, config, uniform=uniform)
        out["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("loss", "loss_itc", "loss_itm", "loss_lm"):
        assert out[name].item() == pytest.approx(wanted[name].item(), abs=1e-9), name


@pytest.mark.gpu
@pytest.mark.parametrize("config", [OPT, T5], ids=["opt", "t5"])
def test_a_step_of_stage_2_on_a_gpu_equals_the_cpus(config: dict[str, Any]) -> None:
    model = stage2(config)
    batch = texts(slice(0, N), encoder=config is T5)
    embeds = torch.randn(N, PATCHES, WIDTH, dtype=torch.float64)
    wanted = stage2_step(model, embeds, batch, "global", World())
    wanted["loss"].backward()
    gradient = model.lm_proj.weight.grad
    assert gradient is not None
    model.zero_grad()
    model.cuda()
    batch = {key: value.cuda() for key, value in batch.items()}
    out = stage2_step(model, embeds.cuda(), batch, "global", World())
    out["loss"].backward()
    assert out["loss"].item() == pytest.approx(wanted["loss"].item(), abs=1e-6)
    assert model.lm_proj.weight.grad is not None
    torch.testing.assert_close(model.lm_proj.weight.grad.cpu(), gradient, atol=1e-6, rtol=1e-6)


@pytest.mark.gpu
def test_a_run_with_overlap_is_the_same_on_a_gpu(shards: Path, tmp_path: Path) -> None:
    for overlap in ("false", "true"):
        changes = {"trainer.overlap": overlap, "trainer.deterministic": "true"}
        changes |= {"trainer.accelerator": "gpu", "trainer.compile": "false"}
        assert train_in_process(tiny_run(shards, tmp_path, f"run-{overlap}", **changes)) == 0
    assert_same_end(tmp_path / "run-true", tmp_path / "run-false")
