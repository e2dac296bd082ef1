"""`--dry-run`: what a training would be, without its data, its weights or its devices."""

from collections.abc import Mapping
from typing import Any

import yaml

from blip2_train.config import Launch, batch_plan, trains_tower
from blip2_train.models.freezing import count_parameters, parameter_table
from blip2_train.training.memory import GB, Sketch


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
    sketch = Sketch(cfg)
    print(f"{'module':<32} {'parameters':>15}  {'state':<7}  dtype")
    for row in parameter_table(sketch.model):
        print(f"{row['module']:<32} {row['parameters']:>15,}  {row['state']:<7}  {row['dtype']}")
    print(f"trained {count_parameters(sketch.model.parameters(), trainable=True):,}\n")
    memory = sketch.memory(plan)
    step = memory.activations + memory.logits
    trained = trains_tower(cfg)
    apart = "" if trained else f" (while the frozen tower runs {memory.tower / GB:.2f} GB)"
    print(
        "memory on one device (an estimate, with captions of "
        f"{cfg['text']['max_tokens']} tokens):\n"
        f"  weights {memory.weights / GB:.2f} GB, gradients and optimizer "
        f"{(memory.gradients + memory.optimizer) / GB:.2f} GB, activations of {plan.at_a_time} "
        f"samples {step / GB:.2f} GB{apart}; "
        f"with the reserve {memory.total / GB:.1f} GB\n"
        "  largest batch that fits a device: blip2-benchmark fit experiment=..."
    )
    tower, rest = sketch.flops()
    if trained:
        print(f"arithmetic per sample, forward and backward: {rest / GB:.1f} GFLOP")
        return
    print(
        f"arithmetic per sample: frozen tower {tower / GB:.1f} GFLOP, the rest, forward and "
        f"backward, {rest / GB:.1f} GFLOP"
    )
