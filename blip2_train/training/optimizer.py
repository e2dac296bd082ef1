"""Parameter groups and learning-rate schedules: pure functions of a model and of a step."""

import math
from collections.abc import Callable

from torch import nn

Schedule = Callable[[int], float]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters, with and without weight decay, as the reference splits them.

    No decay for parameters of exactly one dimension and for biases; so the word table, the query
    tokens (3-D) and the temperature (0-D) are decayed.

    Args:
        model: frozen parameters in it are left out.
        weight_decay: of the first group.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim != 1 and not name.endswith(".bias")].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def warmup_cosine(
    *, lr: float, min_lr: float, warmup_lr: float, warmup_steps: int, max_steps: int
) -> Schedule:
    """Linear warm-up, then half a cosine, per optimizer step.

    Args:
        lr: peak, reached at step `warmup_steps`.
        min_lr: approached at `max_steps`.
        warmup_lr: of step 0.
        warmup_steps: optimizer steps of linear rise.
        max_steps: optimizer steps of the run.

    Returns:
        Learning rate of a step, counted from 0.
    """

    def schedule(step: int) -> float:
        if step < warmup_steps:
            return warmup_lr + (lr - warmup_lr) * step / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    return schedule


def lavis_staircase(
    *,
    lr: float,
    min_lr: float,
    warmup_lr: float,
    warmup_steps: int,
    max_steps: int,
    steps_per_epoch: int,
) -> Schedule:
    """What the reference's released configuration does: cosine per epoch, warm-up in epoch 0 alone.

    A warm-up longer than the first epoch is cut short at its end, and `min_lr` is never reached.

    Args:
        lr: peak.
        min_lr: the cosine's end.
        warmup_lr: of step 0.
        warmup_steps: optimizer steps of linear rise, within epoch 0.
        max_steps: optimizer steps of the run.
        steps_per_epoch: optimizer steps of an epoch.

    Returns:
        Learning rate of a step, counted from 0.
    """
    epochs = math.ceil(max_steps / steps_per_epoch)

    def schedule(step: int) -> float:
        epoch, within = divmod(step, steps_per_epoch)
        if epoch == 0:
            return min(lr, warmup_lr + (lr - warmup_lr) * within / max(warmup_steps, 1))
        return (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * epoch / epochs)) + min_lr

    return schedule
