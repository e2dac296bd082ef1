"""`--dry-run`: what a training would be, without its data, its weights or its devices."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
import yaml
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from blip2_train.config import Launch, batch_plan
from blip2_train.models.counting import saved_bytes
from blip2_train.models.freezing import count_parameters, freeze_unreached, parameter_table
from blip2_train.training.fit import STAGES
from blip2_train.training.stage import Stage

SAMPLES = 4  # of the batch that is traced
GB = 1e9


def describe(cfg: Mapping[str, Any], launch: Launch) -> None:
    """Prints the resolved configuration, the batch arithmetic, parameters and memory.

    Tensors are fake, shapes without values: no weight is drawn, downloaded or stored.

    Args:
        cfg: resolved and validated configuration.
        launch: how this process was started.

    Raises:
        UserError: the vocabulary is not known without the tokenizer, and there is no tokenizer.
    """
    print(yaml.safe_dump(dict(cfg), sort_keys=False))
    plan = batch_plan(cfg, launch.world_size)
    print(f"{plan}\n")
    stage = STAGES[cfg["stage"]](cfg)
    with torch.device("meta"):
        model = stage.build_model(shapes_only=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake_on_cpu(model)
        freeze_unreached(model, lambda: stage.traced_loss(model, SAMPLES, whole=False))
        memory = estimate(stage, model, plan.at_a_time)
    print(f"{'module':<32} {'parameters':>15}  {'state':<7}  dtype")
    for row in parameter_table(model):
        print(f"{row['module']:<32} {row['parameters']:>15,}  {row['state']:<7}  {row['dtype']}")
    print(f"trained {count_parameters(model.parameters(), trainable=True):,}\n")
    for line in memory:
        print(line)


def fake_on_cpu(module: nn.Module) -> None:
    """Makes a meta model's tensors fake CPU ones, inside a `FakeTensorMode`.

    The meta device knows no autocast, so what a mixed-precision step keeps cannot be seen there.
    """
    fakes: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay tied
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is None:
                continue
            if parameter not in fakes:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                fakes[parameter] = nn.Parameter(fake, parameter.requires_grad)
            child._parameters[name] = fakes[parameter]
        for name, buffer in list(child._buffers.items()):
            if buffer is not None:
                child._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def estimate(stage: Stage, model: nn.Module, per_device: int) -> list[str]:
    """Lines about memory on one device and arithmetic per sample; an estimate, not a measurement.

    Args:
        stage: that is trained.
        model: of fake tensors.
        per_device: samples of one forward.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = count_parameters(model.parameters(), trainable=True)
    state = 3 * 4 * trained  # gradient and two moments, float32
    with torch.autocast("cpu", enabled=stage.cfg["trainer"]["precision"] == "bf16-mixed"):
        # without dropout, which a CPU's attention keeps weights for and a GPU's fused one does not
        model.eval()
        loss = functools.partial(stage.traced_loss, model, SAMPLES, whole=True)
        saved = saved_bytes(loss, model.parameters()) / SAMPLES
    activations = per_device * (saved + stage.tower_bytes(model))
    total = weights + state + activations
    with FlopCounterMode(display=False) as counter:
        stage.traced_tower(model, SAMPLES)
    tower_flops = counter.get_total_flops() / SAMPLES
    with FlopCounterMode(display=False) as counter:
        stage.traced_loss(model, SAMPLES, whole=True).backward()
    other_flops = counter.get_total_flops() / SAMPLES
    return [
        "memory on one device (estimate; checkpointing and quantization not counted):",
        f"  weights {weights / GB:.2f} GB, gradients and optimizer {state / GB:.2f} GB, "
        f"activations of {per_device} samples {activations / GB:.2f} GB: {total / GB:.1f} GB",
        f"arithmetic per sample: frozen tower {tower_flops / GB:.1f} GFLOP, the rest, forward and "
        f"backward, {other_flops / GB:.1f} GFLOP",
    ]
