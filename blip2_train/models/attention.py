"""Scaled dot-product attention that keeps no copies for the backward pass.

Shapes: [R, H, L, Dh], rows, heads, positions, width of a head.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Makes queries, keys and values of other tensors.
Heads = Callable[..., tuple[Tensor, Tensor, Tensor]]


def attend(
    heads: Heads, sources: tuple[Tensor, ...], mask: Tensor | None, dropout: nn.Dropout
) -> Tensor:
    """softmax(Q K^T / sqrt(Dh)) V.

    Args:
        heads: makes queries [R, H, L, Dh], keys and values [R, H, K, Dh] of `sources`, by copying
            alone: padding, gathering, joining. The copies are not kept for the backward pass but
            made again there; compiled, as `training.compiling` says.
        sources: what `heads` takes.
        mask: bool, True = visible, broadcastable to [R, H, L, K]; None: everything is visible.
        dropout: acts on the weights while training.

    Returns:
        [R, H, L, Dh].
    """
    made = heads(*sources)
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    with contextlib.nullcontext() if plain else _made_again(made, heads, sources):
        return F.scaled_dot_product_attention(
            *made, attn_mask=mask, dropout_p=dropout.p if dropout.training else 0.0
        )


@contextlib.contextmanager
def _made_again(
    made: tuple[Tensor, ...], make: Heads, sources: tuple[Tensor, ...]
) -> Iterator[None]:
    """Inside, where autograd wants to keep one of `made`, `sources` are kept in their place.

    They and everything else are kept as the hooks around say, such as those of a checkpoint.
    """
    around = torch._C._autograd._top_saved_tensors_default_hooks(False)
    keep, get = around if around is not None else (lambda tensor: tensor, lambda kept: kept)
    places = [_place(tensor) for tensor in made]
    kept_sources = [keep(source.detach()) for source in sources]
    left_out: set[int] = set()
    ready: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Any:
        place = _place(tensor)
        if place not in places:
            return (keep(tensor),)
        left_out.add(places.index(place))
        return places.index(place)

    def unpack(kept: Any) -> Tensor:
        if not isinstance(kept, int):
            return get(kept[0])
        if kept not in ready:
            again = make(*(get(source) for source in kept_sources))
            ready.update((number, again[number]) for number in left_out)
        return ready.pop(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
    if not left_out:
        kept_sources.clear()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride()


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[R, L, D] -> [R, H, L, Dh]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[R, H, L, Dh] -> [R, L, D]."""
    return x.transpose(1, 2).flatten(2)
