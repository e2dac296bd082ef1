"""Cross-entropy over a vocabulary whose logits are never all in memory.

Shapes: M positions that have a target, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blip2_train.losses import lm_loss_sum
from blip2_train.models.linear import product

CHUNK = 2048  # positions whose logits are held at a time
FROZEN_CHUNK = 512  # the same where several copies of them are held at once


def linear_cross_entropy_sum(
    states: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, smoothing: float
) -> Tensor:
    """Smoothed cross-entropy of `F.linear(states, weight, bias)`, summed over positions.

    Logits are computed `CHUNK` positions at a time, used and forgotten, and once more in the
    backward pass, which keeps of them the normaliser of each position alone. Products are made in
    the precision around (autocast), the rest in float32 at least.

    Args:
        states: [M, D].
        weight: [V, D].
        bias: [V].
        targets: int64 [M].
        smoothing: in [0, 1), over all V classes.

    Returns:
        Scalar, nats.
    """
    if torch.is_autocast_enabled(states.device.type):
        states = states.to(torch.get_autocast_dtype(states.device.type))
    with torch.autocast(states.device.type, enabled=False):
        total: Tensor = _LinearCrossEntropy.apply(states, weight, bias, targets, smoothing)
        return total


class _LinearCrossEntropy(torch.autograd.Function):
    """Of a position with logits x and target t, smoothing e: log Z - (1 - e) x_t - e mean(x)."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, smoothing: float
    ) -> Tensor:
        table = weight.to(states.dtype)
        normalisers, total = [], torch.zeros((), dtype=_wide(states), device=states.device)
        for part, wanted in zip(states.split(CHUNK), targets.split(CHUNK), strict=True):
            logits = _widen(product(part, table, bias.to(table.dtype)))
            normalisers.append(logits.logsumexp(dim=1))
            right = logits.gather(1, wanted[:, None]).sum()
            total = total + normalisers[-1].sum() - (1 - smoothing) * right
            if smoothing:
                total = total - smoothing * logits.mean(dim=1).sum()
        ctx.save_for_backward(states, weight, bias, targets, torch.cat(normalisers))
        ctx.smoothing = smoothing
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, normalisers = ctx.saved_tensors
        table = weight.to(states.dtype)
        of_states, of_weight, of_bias = [], torch.zeros_like(weight), torch.zeros_like(bias)
        parts = (x.split(CHUNK) for x in (states, targets, normalisers))
        for part, wanted, normaliser in zip(*parts, strict=True):
            logits = _widen(product(part, table, bias.to(table.dtype)))
            of_logits = logits.sub_(normaliser[:, None]).exp_()  # the softmax
            of_logits.sub_(ctx.smoothing / len(weight))
            right = torch.full_like(normaliser, ctx.smoothing - 1)
            of_logits.scatter_add_(1, wanted[:, None], right[:, None])
            of_logits = of_logits.mul_(grad).to(states.dtype)
            of_states.append(product(of_logits, table.T))
            of_weight += product(of_logits.T, part.T)
            of_bias += of_logits.sum(dim=0)
        return torch.cat(of_states), of_weight, of_bias, None, None


def frozen_cross_entropy_sum(
    head: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor
) -> Tensor:
    """Cross-entropy of `head(states)`, summed over positions, where the head does not learn.

    Nothing but the states has a gradient then, so it is taken right away, `FROZEN_CHUNK` positions
    at a time: it is all that is kept for the backward pass, and no product is made twice. That
    goes for any head, however its weights are stored.

    Args:
        head: [n, D] -> logits [n, V], row by row; no gradient of its parameters is wanted.
        states: [M, D].
        targets: int64 [M].

    Returns:
        Scalar, nats; float32 at least.
    """
    wanted = torch.is_grad_enabled() and states.requires_grad
    total: Tensor = _FrozenCrossEntropy.apply(states, targets, head, wanted)
    return total


class _FrozenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], wanted: bool
    ) -> Tensor:
        total = torch.zeros((), dtype=_wide(states), device=states.device)
        gradients = []
        # what a part keeps ends with it: nobody outside shall count it, or move it elsewhere
        own = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        with own, torch.set_grad_enabled(wanted):
            parts = states.split(FROZEN_CHUNK), targets.split(FROZEN_CHUNK)
            for part, token in zip(*parts, strict=True):
                part = part.detach().requires_grad_(wanted)
                loss = lm_loss_sum(head(part), token, smoothing=0.0)
                if wanted:
                    loss.backward()  # not `autograd.grad`, which a counter of arithmetic refuses
                    gradients.append(part.grad)
                total = total + loss.detach()
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (of_states,) = ctx.saved_tensors
        return of_states * grad, None, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _widen(x: Tensor) -> Tensor:
    return x.to(_wide(x))
