"""The loss behind a frozen language model's head, and what its gradient costs.

Proven for every kind of model of `test_language`: the summed loss and its gradient are those of the
logits, however few are made at a time, for heads that are capped, quantized or take no single rows;
the logits are in no tensor that lives on; a cap is seen where no number reaches it; the backward
pass makes each product of the forward pass once more and no other, for decoder-only models and
encoder-decoders, with recomputation too; nothing that is frozen gets a gradient.
"""

from typing import Any

import pytest
import torch
from language_steps import OPT, T5
from models.test_language import CONFIGS, KINDS, Refuses, V, inputs, tiny
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from blip2_train.losses import lm_loss_sum
from blip2_train.models import cross_entropy, language
from blip2_train.models.language import LanguageModel, random_model
from blip2_train.models.lm_head import find_head

TOKENS = torch.tensor([5, 9, 1, 7])  # to predict, at the four positions of `inputs`


def loss_and_gradient(loss: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    (grad,) = torch.autograd.grad(2.5 * loss, given["inputs_embeds"])
    return loss.detach(), grad


def check_loss(model: LanguageModel, tolerance: float) -> None:
    given = inputs(model)
    ours = loss_and_gradient(model.loss_sum(**given, targets=TOKENS), given)
    wanted = loss_and_gradient(lm_loss_sum(model.logits(**given), TOKENS, 0.0), given)
    for one, two in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)
    with torch.no_grad():
        assert model.loss_sum(**given, targets=TOKENS).equal(ours[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_the_loss_is_that_of_the_logits(
    kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "FROZEN_CHUNK", chunk)
    model = tiny(kind)
    assert model._head_form == ("rows" if kind == "gemma2" else "states")
    check_loss(model.double(), 1e-6 if "t5" in kind else 1e-10)  # T5's norms compute in float32


@pytest.mark.parametrize("kind", ["opt", "flan_t5", "gemma2"])
def test_in_bfloat16_losses_are_summed_in_float32(kind: str) -> None:
    model = tiny(kind, dtype="bfloat16")
    given = inputs(model)
    loss = model.loss_sum(**given, targets=TOKENS)
    assert loss.dtype == torch.float32
    wanted = lm_loss_sum(model.logits(**given), TOKENS, 0.0)
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
    ours, theirs = (loss_and_gradient(x, given)[1].float() for x in (loss, wanted))
    assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()


def test_quantized_heads() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    for kind in ("llama", "flan_t5"):
        model = tiny(kind)
        head = model.lm.get_output_embeddings()
        quantization.quantize_(head, quantization.Int8WeightOnlyConfig())
        assert type(head.weight.data) is not Tensor
        assert find_head(model.lm, kind) == "states"
        check_loss(model, 1e-5)


def test_heads_that_do_not_take_single_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_such_a_head(*args: Any) -> nn.Module:
        lm = random_model(*args)
        lm.lm_head.__class__ = Refuses
        return lm

    monkeypatch.setattr(language, "random_model", with_such_a_head)
    model = tiny("llama")
    assert model._head_form == "whole"
    check_loss(model, 1e-5)


def test_a_cap_is_seen_where_nothing_reaches_it() -> None:
    config = {**CONFIGS["gemma2"], "final_logit_softcapping": 1e3}
    model = LanguageModel(config=config, weights="random", dtype="bfloat16")
    assert model._head_form == "rows"


@pytest.mark.parametrize("kind", ["opt", "flan_t5"])
def test_no_logits_are_kept(kind: str) -> None:
    model, kept = tiny(kind), []
    given = inputs(model)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    for loss, found in (
        (lambda: model.loss_sum(**given, targets=TOKENS), False),
        (lambda: lm_loss_sum(model.logits(**given), TOKENS, 0.0), True),
    ):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss()
        assert kept and (len(TOKENS) * V in kept) is found


def products(model: LanguageModel, given: dict[str, Tensor], *, backward: bool) -> int:
    """Floating-point operations of linear layers, those of attention left out."""
    with torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
        loss = model.loss_sum(**given, targets=TOKENS)
        if backward:
            loss.backward()
    counts = counter.get_flop_counts()["Global"]
    assert any("attention" in str(operation) for operation in counts)
    return sum(n for operation, n in counts.items() if "attention" not in str(operation))


@pytest.mark.parametrize("config", [OPT, T5], ids=lambda c: c["model_type"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_go_to_activations_alone(config: dict[str, Any], recompute: bool) -> None:
    """A weight's gradient would cost its product a third time."""
    model = LanguageModel(
        config=config, weights="random", dtype="float32", gradient_checkpointing=recompute
    )
    given = inputs(model)
    forward = products(model, given, backward=False)
    whole = products(model, given, backward=True)
    # in the first block of a decoder only what is read from the encoder depends on the image: the
    # text's four products of self-attention, and the query of the other, have no backward
    without = 5 * given["decoder_input_ids"].numel() * 2 * 16 * 16 if config is T5 else 0
    if recompute:
        assert 2 * forward - without < whole < 3 * forward - without
    else:
        assert whole == 2 * forward - without
    assert given["inputs_embeds"].grad.abs().max() > 0
    frozen = [*model.named_parameters(), *model.named_buffers()]
    assert frozen and all(tensor.grad is None for _, tensor in frozen)
    assert not any(tensor.requires_grad for _, tensor in frozen)
