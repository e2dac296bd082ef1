"""`--dry-run`: what a training would be, without its data, its weights or its devices."""

from collections.abc import Mapping
from typing import Any

import torch
import yaml
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from blip2_train.config import Launch, plan_batch
from blip2_train.models.freezing import count_parameters, freeze_unreached, parameter_table
from blip2_train.models.stage1 import Blip2Stage1
from blip2_train.training.build import build_loss, build_model, build_tokenizer
from blip2_train.training.objectives import LossConfig, stage1_step

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
    plan = plan_batch(cfg["batch"]["size"], cfg["batch"]["accumulate"], launch.world_size)
    print(f"{plan}; each optimizer step compares {plan.contrastive} samples at a time\n")
    loss = build_loss(cfg["loss"])
    vocabulary = cfg["text"]["vocab_size"]
    if vocabulary is None:
        vocabulary = len(build_tokenizer(cfg["text"])) - 1
    model = meta_model(cfg, vocabulary)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake_on_cpu(model)
        freeze_unreached(model, lambda: _traced_loss(model, loss, tokens=3))
        memory = estimate(model, loss, plan.per_device, cfg)
    print(f"{'module':<32} {'parameters':>15}  {'state':<7}  dtype")
    for row in parameter_table(model):
        print(f"{row['module']:<32} {row['parameters']:>15,}  {row['state']:<7}  {row['dtype']}")
    print(f"trained {count_parameters(model.parameters(), trainable=True):,}\n")
    for line in memory:
        print(line)


def meta_model(cfg: Mapping[str, Any], vocabulary: int) -> Blip2Stage1:
    """The model of a configuration on the meta device: shapes, no values.

    Args:
        cfg: resolved configuration.
        vocabulary: word pieces without [DEC].
    """
    shapes = {**cfg, "vision": {**cfg["vision"], "weights": "random"}}
    with torch.device("meta"):
        return build_model(
            shapes, vocab_size=vocabulary + 1, dec_token_id=vocabulary, end_token_id=0
        )


def fake_on_cpu(module: nn.Module) -> None:
    """Makes a meta model's tensors fake CPU ones, inside a `FakeTensorMode`.

    The meta device knows no autocast, so what a mixed-precision step keeps cannot be seen there.
    """
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                child._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in list(child._buffers.items()):
            if buffer is not None:
                child._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def estimate(
    model: Blip2Stage1, loss: LossConfig, per_device: int, cfg: Mapping[str, Any]
) -> list[str]:
    """Lines about memory on one device and arithmetic per sample; an estimate, not a measurement.

    Args:
        model: of fake tensors.
        loss: the objectives.
        per_device: samples of one forward.
        cfg: resolved configuration.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = count_parameters(model.parameters(), trainable=True)
    state = 3 * 4 * trained  # gradient and two moments, float32
    with torch.autocast("cpu", enabled=cfg["trainer"]["precision"] == "bf16-mixed"):
        saved = saved_bytes(model, loss) / SAMPLES
    vision = model.vision
    # the widest the tower holds at a time: a block's input, its 4x hidden layer, a few copies
    tower = 8 * vision.num_tokens * vision.width * (2 if vision.dtype == torch.bfloat16 else 4)
    activations = per_device * (saved + tower)
    total = weights + state + activations
    with FlopCounterMode(display=False) as counter:
        size = vision.image_size
        vision(torch.zeros(SAMPLES, 3, size, size))
    tower_flops = counter.get_total_flops() / SAMPLES
    with FlopCounterMode(display=False) as counter:
        _traced_loss(model, loss, tokens=vision.num_tokens).backward()
    qformer_flops = counter.get_total_flops() / SAMPLES
    return [
        "memory on one device (estimate; checkpointing not counted):",
        f"  weights {weights / GB:.2f} GB, gradients and optimizer {state / GB:.2f} GB, "
        f"activations of {per_device} samples {activations / GB:.2f} GB: {total / GB:.1f} GB",
        f"arithmetic per sample: tower {tower_flops / GB:.1f} GFLOP, Q-Former forward and backward "
        f"{qformer_flops / GB:.1f} GFLOP",
    ]


def saved_bytes(model: Blip2Stage1, loss: LossConfig) -> int:
    """Bytes that the backward of `SAMPLES` samples keeps, parameters left out."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    seen: dict[int, int] = {}
    alive = []  # a freed storage would have its address used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            seen[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    # without dropout, which a CPU's attention would keep weights for and a GPU's fused one does not
    model.eval()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _traced_loss(model, loss, tokens=model.vision.num_tokens)
    return sum(seen.values())


def _traced_loss(model: Blip2Stage1, loss: LossConfig, tokens: int) -> torch.Tensor:
    length = 16
    batch = {
        "input_ids": torch.zeros(SAMPLES, length, dtype=torch.long),
        "attention_mask": torch.ones(SAMPLES, length, dtype=torch.long),
        "image_id": torch.zeros(SAMPLES, dtype=torch.long),
        "lm_index": torch.zeros(SAMPLES * (length - 1), dtype=torch.long),
        "text_length": length,
    }
    embeds = torch.zeros(SAMPLES, tokens, model.vision.width)
    uniform = torch.zeros(2, SAMPLES, dtype=torch.float64)
    return stage1_step(model, embeds, batch, loss, uniform=uniform)["loss"]
