"""Cross-entropy without logits: values and gradients of the plain one; nothing large is kept."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model
from torch import Tensor, nn

from blip2_train.models import cross_entropy
from blip2_train.models.cross_entropy import linear_cross_entropy_sum

M, D, V = 11, 6, 29


def inputs(dtype: torch.dtype, rows: int = M) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, D), (V, D), (V,))
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    targets = torch.randint(V, (rows,), generator=generator)
    return [tensor.requires_grad_() for tensor in made], targets


def plain(
    states: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, smoothing: float
) -> Tensor:
    logits = F.linear(states, weight, bias)
    return F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("chunk", [1, 4, M, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_it_is_the_plain_one(
    dtype: torch.dtype, tolerance: float, chunk: int, smoothing: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
    results = []
    for function in (linear_cross_entropy_sum, plain):
        tensors, targets = inputs(dtype)
        loss = function(*tensors, targets, smoothing)
        (2.5 * loss).backward()
        results.append([loss, *(tensor.grad for tensor in tensors)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_nothing_to_predict_costs_nothing() -> None:
    tensors, targets = inputs(torch.float32, rows=0)
    loss = linear_cross_entropy_sum(*tensors, targets, 0.1)
    loss.backward()
    assert loss.item() == 0
    assert all(t.grad is not None and t.grad.count_nonzero() == 0 for t in tensors)


def test_under_autocast_only_products_are_in_half_precision() -> None:
    tensors, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy_sum(*tensors, targets, 0.1)
    assert loss.dtype == torch.float32
    half = [tensor.bfloat16() for tensor in tensors]
    logits = F.linear(*half).float()
    want = F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="sum")
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    loss.backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in tensors)


def test_the_head_keeps_no_logits() -> None:
    model = tiny_model()
    head: nn.Module = model.qformer.lm_head
    hidden, targets = torch.randn(M, 16, requires_grad=True), torch.randint(23, (M,))
    results = []
    for recompute in (True, False):
        head.gradient_checkpointing = recompute
        kept: list[int] = []

        def pack(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.lm_loss_sum(hidden, targets, 0.1)
        assert (M * 23 in kept) is not recompute
        results.append(loss)
    assert results[0].item() == pytest.approx(results[1].item(), rel=1e-6)
