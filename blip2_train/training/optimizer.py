"""Parameter groups and the learning rate: pure functions of a model and of a step."""

import math

from torch import nn

from blip2_train.models.tower_training import layers_of
from blip2_train.models.vision import VisionTower


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Trainable parameters, with and without weight decay, as the reference splits them.

    No decay for parameters of exactly one dimension and for biases; so the word table, the query
    tokens (3-D) and the temperature (0-D) are decayed.

    With `layer_decay` below 1 a trained image tower is split by its layers too: of L blocks, block
    i (from 1) learns at layer_decay^(L + 1 - i) of the learning rate, embeddings as a block 0 and
    a norm behind the blocks as the last block; all else at the whole rate.

    Args:
        model: frozen parameters in it are left out.
        weight_decay: of the groups that have any.
        layer_decay: in (0, 1]; 1: none.

    Returns:
        AdamW's groups; `lr_scale` is what the learning rate is multiplied with.

    Raises:
        UserError: timm does not know the layers of the tower.
    """
    scales = _tower_scales(model, layer_decay) if layer_decay != 1 else {}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim != 1 and not name.endswith(".bias")
            groups.setdefault((scales.get(name, 1.0), decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decayed else 0.0,
            "lr_scale": scale,
        }
        for (scale, decayed), parameters in groups.items()
    ]


def _tower_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """{name of a parameter of a trained tower: share of the learning rate}."""
    scales: dict[str, float] = {}
    for path, vision in model.named_modules():
        if isinstance(vision, VisionTower) and vision.trainable:
            layers = layers_of(vision.name, vision.tower)
            last = max(layers.values())
            scales |= {
                f"{path}.tower.{name}": layer_decay ** (last + 1 - layer)
                for name, layer in layers.items()
            }
    return scales


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
