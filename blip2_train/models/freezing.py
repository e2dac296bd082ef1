"""What is trained and what is not: one place that freezes, one table that shows it."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Self

import torch
from torch import Tensor, nn


class EvalOnly(nn.Module):
    """Base of modules that always compute as in evaluation: eval mode whatever `.train()` says.

    A tower in training mode would drop paths and activations at random, and move its running
    statistics; Lightning and every ordinary loop call `.train()` on the whole model.
    """

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)


class Frozen(EvalOnly):
    """Base of modules that never learn: no gradient, and eval mode."""

    def freeze(self) -> Self:
        """Turns gradients off and the eval mode on."""
        self.requires_grad_(False)
        return self.eval()


def freeze_unreached(model: nn.Module, loss: Callable[[], Tensor]) -> list[str]:
    """Freezes every trainable parameter that the loss does not reach.

    DDP waits for a gradient of each trainable parameter; with a loss turned off some never get one
    (captioning alone leaves the last block's query feed-forward without). One backward of a tiny
    batch finds them; gradients are cleared afterwards. An image tower that is trained is left out
    of it: it has frozen by itself what its features do not depend on.

    Args:
        model: the model; its `requires_grad` flags are changed.
        loss: computes the total loss of a tiny batch.

    Returns:
        Names of the parameters that were frozen here.
    """
    model.zero_grad(set_to_none=True)
    loss().backward()
    towers = [part for part in model.modules() if isinstance(part, EvalOnly)]
    known = {parameter for tower in towers for parameter in tower.parameters()}
    unreached = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and p.grad is None and p not in known
    ]
    for name, parameter in model.named_parameters():
        if name in unreached:
            parameter.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return unreached


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights in memory."""
    sha = hashlib.sha256()
    for key, value in sorted(state.items()):
        sha.update(key.encode())
        sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def count_parameters(parameters: Iterable[nn.Parameter], *, trainable: bool) -> int:
    """Number of scalars in the parameters that are (not) trained."""
    return sum(p.numel() for p in parameters if p.requires_grad is trainable)


def parameter_table(model: nn.Module, depth: int = 2) -> list[dict[str, str | int]]:
    """One row per sub-module and per (trained, dtype) in it: what is frozen, in which precision.

    Args:
        model: any module.
        depth: number of name parts that make a row ("vision.tower" is 2).

    Returns:
        Rows of {"module", "parameters", "state", "dtype"} in the model's order.
    """
    rows: dict[tuple[str, bool, torch.dtype], int] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        module = ".".join(parts[: min(depth, max(len(parts) - 1, 1))])
        stored = getattr(parameter, "qdata", parameter).dtype  # torchao's say what they stand for
        key = (module, parameter.requires_grad, stored)
        rows[key] = rows.get(key, 0) + parameter.numel()
    return [
        {
            "module": module,
            "parameters": count,
            "state": "trained" if trained else "frozen",
            "dtype": str(dtype).removeprefix("torch."),
        }
        for (module, trained, dtype), count in rows.items()
    ]
