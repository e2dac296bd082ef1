"""Parameter groups and the learning rate: pure functions of a model and of a step."""

import math

from torch import nn


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


def learning_rate(
    step: int,
    *,
    lr: float,
    min_lr: float,
    warmup_lr: float,
    warmup_steps: int,
    max_steps: int,
    steps_per_epoch: int | None = None,
) -> float:
    """Linear warm-up, then half a cosine: per optimizer step, or the reference's staircase.

    The staircase (`steps_per_epoch` given) moves once per epoch; its warm-up happens within epoch 0
    alone, where it is cut short by the epoch's end, and it never reaches `min_lr`.

    Args:
        step: optimizer step, from 0.
        lr: peak.
        min_lr: the cosine's end, at `max_steps`.
        warmup_lr: at step 0.
        warmup_steps: optimizer steps of linear rise.
        max_steps: optimizer steps of the run.
        steps_per_epoch: optimizer steps between two moves of the staircase.
    """
    if steps_per_epoch is None:
        if step < warmup_steps:
            return warmup_lr + (lr - warmup_lr) * step / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        return _half_cosine(lr, min_lr, progress)
    epoch, within = divmod(step, steps_per_epoch)
    if epoch == 0:
        return min(lr, warmup_lr + (lr - warmup_lr) * within / max(warmup_steps, 1))
    return _half_cosine(lr, min_lr, epoch / math.ceil(max_steps / steps_per_epoch))


def _half_cosine(high: float, low: float, progress: float) -> float:
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * progress))
