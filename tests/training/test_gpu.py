"""On a GPU: a step waits for nothing, and its losses are those of the CPU."""

import pytest
import torch
from tiny import loss_config, tiny_batch, tiny_model

from blip2_train.distributed import World
from blip2_train.training.objectives import draw_uniform, stage1_step


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
