"""`trainer.compile`: the blocks that a model repeats, compiled by torch, each kind once."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch._functorch.config
from torch import nn

log = logging.getLogger(__name__)

# A block meets several passes, with and without gradient, and shapes until they count as variable.
VARIANTS = 64


def wants_compilation(trainer: Mapping[str, Any], *, cuda: bool) -> bool:
    """What `trainer.compile` says: null is yes on GPUs alone."""
    return cuda if trainer["compile"] is None else trainer["compile"]


def compile_blocks(model: nn.Module) -> None:
    """Compiles them in place, when they are first called; weights keep their names.

    Blocks and not the whole: a model of 39 equal blocks is compiled in the time of one, and what
    stands between them (collectives, sampling) stays plain.
    """
    torch._dynamo.config.recompile_limit = VARIANTS
    # it may make again what a product or an attention reads in the backward pass (see
    # `models.linear` and `models.attention`)
    torch._functorch.config.ban_recompute_materialized_backward = False
    blocks = list(repeated_blocks(model))
    for block in blocks:
        block.compile()
    kinds = sorted({type(block).__name__ for block in blocks})
    log.info("%d blocks (%s) are compiled as they are met", len(blocks), ", ".join(kinds))


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost lists of two and more modules of one kind that have weights."""
    for child in module.children():
        members = list(child.children())
        if (
            isinstance(child, nn.ModuleList | nn.Sequential)
            and len(members) > 1
            and len({type(member) for member in members}) == 1
            and any(True for _ in members[0].parameters())
        ):
            yield from members
        else:
            yield from repeated_blocks(child)
