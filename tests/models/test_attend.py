"""Attention keeps no copies: what is made of kept tensors is made again.

Proven: values and gradients are those of attention on the copies, with and without dropout; only
sources, result and normalisers are kept; hooks around it (of a checkpoint, of an offload) see all
that is kept, each once.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip2_train.models.attention import attend, join_heads, split_heads
from blip2_train.models.counting import saved_bytes

R, L, D, H = 5, 7, 16, 2
INDEX = torch.tensor([0, 0, 1, 2, 0])


def heads(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as they are; keys and values of three rows, gathered and padded."""
    key, value = (
        F.pad(split_heads(x, H), (0, 0, 0, 2)).index_select(0, INDEX) for x in (keys, values)
    )
    return split_heads(queries, H), key, value


def sources() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((R, L, D), (3, L, D), (3, L, D))
    return tuple(torch.randn(s, generator=generator).requires_grad_() for s in shapes)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_copies_are_made_again(dropout: float, checkpointing: bool) -> None:
    results = []
    layer = nn.Dropout(dropout)
    for ours in (True, False):
        tensors = sources()
        torch.manual_seed(3)
        if not ours:
            out = F.scaled_dot_product_attention(*heads(*tensors), dropout_p=dropout)
        elif checkpointing:
            out = checkpoint(attend, heads, tensors, None, layer, use_reentrant=False)
        else:
            out = attend(heads, tensors, None, layer)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        (join_heads(out) * join_heads(weights)).sum().backward()
        results.append([out, *(tensor.grad for tensor in tensors)])
    for one, two in zip(*results, strict=True):
        assert one.equal(two)


def test_two_backward_passes() -> None:
    tensors = sources()
    out = attend(heads, tensors, None, nn.Dropout(0.0)).pow(2).sum()
    first = torch.autograd.grad(out, tensors, retain_graph=True)
    second = torch.autograd.grad(out, tensors)
    assert all(one.equal(two) for one, two in zip(first, second, strict=True))


def test_only_sources_are_kept() -> None:
    tensors = sources()
    kept = saved_bytes(lambda: attend(heads, tensors, None, nn.Dropout(0.0)), ())
    plain = saved_bytes(lambda: F.scaled_dot_product_attention(*heads(*tensors)), ())
    own = 4 * (R * L * D + 2 * 3 * L * D)
    result = 4 * (R * L * D + R * L * H)  # and one normaliser per query and head
    copies = 4 * (R * L * D + 2 * R * (L + 2) * D)
    index = 2 * INDEX.nbytes  # of gathering
    assert kept == own + result + INDEX.nbytes
    assert plain == pytest.approx(copies + result + index, abs=INDEX.nbytes)
    with torch.no_grad():
        assert saved_bytes(lambda: attend(heads, tensors, None, nn.Dropout(0.0)), ()) == 0
