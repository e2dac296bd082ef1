"""The frozen language model.

Proven for OPT, Llama, Qwen, Gemma, T5 and BART of a few thousand weights: logits at targets are
those of the whole model, also where its head refuses single rows; token embeddings are what the
model makes of tokens; it stays frozen and without dropout; checkpointing changes nothing; autocast
does not reach it; generation takes nothing but its arguments. T5 has the exact gelu, a head of its
own where it should, and no float16. Weights come from a seed, a folder or the hub's cache, also
quantized, with an identity that tells them apart; what cannot be had is named in a UserError.
"""

import copy
import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from blip2_train.errors import UserError
from blip2_train.models import language, lm_identity, lm_weights
from blip2_train.models.language import LanguageModel, download, random_model
from blip2_train.models.lm_head import target_logits
from blip2_train.models.lm_linear import let_gradients_through
from blip2_train.models.lm_masks import find_form

B, T, S, V, WIDTH = 2, 5, 4, 41, 32  # rows, positions, those of a decoder, vocabulary, width
DECODER = {
    "vocab_size": V,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
T5 = {"model_type": "t5", "vocab_size": V, "d_model": WIDTH, "d_kv": 8, "d_ff": 64}
T5 |= {"num_layers": 2, "num_heads": 4, "dropout_rate": 0.5}
CONFIGS: dict[str, dict[str, Any]] = {
    "opt": {
        "model_type": "opt",
        "vocab_size": V,
        "hidden_size": WIDTH,
        "word_embed_proj_dim": WIDTH,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "dropout": 0.5,
    },
    "llama": {"model_type": "llama", "attention_dropout": 0.5, **DECODER},
    "qwen2": {"model_type": "qwen2", **{k: v for k, v in DECODER.items() if k != "head_dim"}},
    "qwen3": {"model_type": "qwen3", **DECODER},
    "gemma2": {"model_type": "gemma2", **DECODER, "final_logit_softcapping": 0.2},
    "gemma3": {"model_type": "gemma3_text", **DECODER},  # scales embeddings by sqrt(width)
    "flan_t5": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "t5": T5,
    "bart": {
        "model_type": "bart",
        "vocab_size": V,
        "d_model": WIDTH,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "scale_embedding": True,
    },
}
KINDS = list(CONFIGS)


def tiny(kind: str, **options: Any) -> LanguageModel:
    settings = {"weights": "random", "dtype": "float32", **options}
    return LanguageModel(config=CONFIGS[kind], **settings)


def inputs(model: LanguageModel, seed: int = 0) -> dict[str, Tensor]:
    """Of `logits`: the second row is shorter; the gradient of its embeddings is wanted."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(B, T, model.width, generator=generator).to(model.dtype)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    out = {"inputs_embeds": embeds.requires_grad_(), "attention_mask": mask}
    out["index"] = torch.tensor([6, 0, 3, 3])
    if model.is_encoder_decoder:
        out["decoder_input_ids"] = torch.randint(0, V, (B, S), generator=generator)
        out["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    return out


def all_logits(model: LanguageModel, given: dict[str, Tensor]) -> Tensor:
    """Straight from the library."""
    return model.lm(**{key: value for key, value in given.items() if key != "index"}).logits


def gradients(model: LanguageModel, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    loss = model.logits(**given).square().sum()
    (grad,) = torch.autograd.grad(loss, given["inputs_embeds"])
    return loss.detach(), grad


# -- what it computes ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_logits_at_targets_are_those_of_the_library(kind: str) -> None:
    model = tiny(kind).double()
    given = inputs(model)
    assert (
        model._head_form == ("rows" if kind == "gemma2" else "states")
        and model.dtype == torch.float64
    )
    ours = model.logits(**given)
    assert ours.shape == (4, V) == (4, model.vocab_size)
    whole = all_logits(model, given)
    torch.testing.assert_close(ours, whole.flatten(0, 1)[given["index"]])
    assert not ours[0].allclose(ours[1], atol=1e-3)  # of other positions, so not by chance
    (wanted,) = torch.autograd.grad(
        whole.flatten(0, 1)[given["index"]].square().sum(), given["inputs_embeds"]
    )
    torch.testing.assert_close(gradients(model, given)[1], wanted)


def test_the_head_sees_the_targets_alone() -> None:
    model = tiny("llama")
    seen: list[tuple[int, ...]] = []
    model.lm.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    given = inputs(model)
    model.logits(**given)
    assert seen == [(4, WIDTH)]
    all_logits(model, given)  # nothing of ours is left on the model
    assert seen[1] == (B, T, WIDTH)


class Refuses(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 3:
            raise RuntimeError("rows of a batch, please")
        return super().forward(x)


class Mixes(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(dim=0))


@pytest.mark.parametrize(
    ("head", "said"), [(Refuses, "rows of a batch, please"), (Mixes, "the logits differ")]
)
def test_heads_that_do_not_take_single_rows(
    head: type, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def with_such_a_head(*args: Any) -> nn.Module:
        lm = random_model(*args)
        lm.lm_head.__class__ = head
        return lm

    monkeypatch.setattr(language, "random_model", with_such_a_head)
    with caplog.at_level(logging.INFO):
        model = tiny("llama")
    assert (
        model._head_form == "whole"
        and said in caplog.text
        and "all logits are computed" in caplog.text
    )
    given = inputs(model)
    wanted = all_logits(model, given).flatten(0, 1)[given["index"]]
    assert model.logits(**given).equal(wanted)


@pytest.mark.parametrize("kind", ["opt", "gemma3", "bart", "flan_t5"])
@torch.no_grad()
def test_embeddings_are_what_the_model_makes_of_tokens(kind: str) -> None:
    model = tiny(kind).double()
    ids = torch.tensor([[7, 8, 9, 10]])
    other = {"decoder_input_ids": ids} if model.is_encoder_decoder else {}
    from_tokens = model.lm(input_ids=ids, **other).logits
    torch.testing.assert_close(
        model.lm(inputs_embeds=model.embed(ids), **other).logits, from_tokens
    )
    scale = model.embed(ids) / model.lm.get_input_embeddings().weight[ids]
    wanted = WIDTH**0.5 if kind in ("gemma3", "bart") else 1.0
    torch.testing.assert_close(scale, torch.full_like(scale, wanted), rtol=1e-3, atol=0)


def test_models_that_take_embeddings_for_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_other_embeddings(*args: Any) -> nn.Module:
        lm = random_model(*args)
        monkeypatch.setattr(lm, "get_input_embeddings", lambda: nn.Embedding(V, WIDTH))
        return lm

    monkeypatch.setattr(language, "random_model", with_other_embeddings)
    with pytest.raises(UserError, match="name=llama cannot be used: its output for token embed"):
        tiny("llama")


@pytest.mark.parametrize("kind", ["opt", "llama", "flan_t5"])
def test_it_stays_frozen_and_without_dropout(kind: str) -> None:
    parent = nn.ModuleList([tiny(kind)]).train()
    model = parent[0]
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    given = inputs(model)
    (first, grad), (second, _) = gradients(model, given), gradients(model, given)
    assert first.equal(second) and grad.abs().max() > 0
    model.logits(**given).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert not grad[1, 3:].any()  # padding


@pytest.mark.parametrize("kind", ["opt", "llama", "qwen2", "qwen3", "flan_t5", "bart"])
def test_checkpointing_changes_nothing(kind: str) -> None:
    plain, lean = tiny(kind), tiny(kind, gradient_checkpointing=True)
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    block = next(m for m in lean.lm.modules() if isinstance(m, language.GradientCheckpointingLayer))
    next(m for m in block.modules() if isinstance(m, nn.Linear)).register_forward_hook(count)
    given = inputs(plain)
    for ours, wanted in zip(gradients(lean, given), gradients(plain, given), strict=True):
        assert ours.equal(wanted)
    assert passes == 2  # once more in the backward pass
    with torch.no_grad():
        assert lean.logits(**given).equal(plain.logits(**given))
    assert passes == 3


def flops(model: LanguageModel) -> int:
    """Of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        model.logits(**inputs(model)).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["opt", "llama", "flan_t5"])
def test_checkpointing_can_be_switched(kind: str) -> None:
    plain, lean = tiny(kind), tiny(kind, gradient_checkpointing=True)
    usual, more = flops(plain), flops(lean)
    assert lean.gradient_checkpointing and not plain.gradient_checkpointing and more > usual
    copies = [copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))]
    lean.gradient_checkpointing, plain.gradient_checkpointing = False, True
    assert (flops(lean), flops(plain)) == (usual, more)
    for own in copies:  # a copy has a switch of its own
        assert flops(own) == more
        own.gradient_checkpointing = False
        assert flops(own) == usual


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", "qwen2"])
@pytest.mark.parametrize("window", [3, 8])
@torch.no_grad()
def test_sliding_windows_are_kept(model_type: str, window: int) -> None:
    """Of an input longer than the window, one mask for all layers would show too much."""
    sizes = {key: value for key, value in DECODER.items() if key != "head_dim"}
    config = {"model_type": model_type, **sizes, "sliding_window": window}
    if model_type == "qwen2":
        config |= {"use_sliding_window": True, "max_window_layers": 0}
    model = LanguageModel(config=config, weights="random", dtype="float32").double()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.4)
    assert model._mask_form == "square" or window == 3
    assert find_form(model.lm) != "square"  # any length may come
    for length in (6, 8, 12):
        embeds = torch.randn(B, length, WIDTH, dtype=torch.float64)
        mask = (torch.arange(length) < torch.tensor([[length], [length - 2]])).long()
        index = mask.flatten().nonzero().flatten()
        wanted = model.lm(inputs_embeds=embeds, attention_mask=mask).logits.flatten(0, 1)[index]
        torch.testing.assert_close(model.logits(embeds, mask, index), wanted)


def test_models_that_take_plain_masks_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def strict(*args: Any) -> nn.Module:
        lm = random_model(*args)
        forward = lm.forward

        def plain(*args: Any, attention_mask: Tensor | None, **kwargs: Any) -> Any:
            if attention_mask is None or attention_mask.ndim != 2:
                raise ValueError("two dimensions, please")
            return forward(*args, attention_mask=attention_mask, **kwargs)

        monkeypatch.setattr(lm, "forward", plain)
        return lm

    monkeypatch.setattr(language, "random_model", strict)
    with caplog.at_level(logging.INFO):
        model = tiny("llama")
    assert model._mask_form == "rows" and "waits for the device in each pass" in caplog.text
    given = inputs(model)
    wanted = all_logits(model, given).flatten(0, 1)[given["index"]]
    torch.testing.assert_close(model.logits(**given), wanted)


def test_autocast_does_not_reach_it() -> None:
    model = tiny("opt")
    given = inputs(model)
    wanted = model.logits(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.logits(**given).equal(wanted)


@pytest.mark.parametrize("kind", ["opt", "llama", "flan_t5"])
def test_bfloat16_is_close(kind: str) -> None:
    model, wide = tiny(kind, dtype="bfloat16"), tiny(kind)
    assert model.dtype == torch.bfloat16
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    given = inputs(wide)  # float32: cast on the way in, the gradient on the way out
    ours, wanted = gradients(model, given), gradients(wide, given)
    assert ours[1].dtype == torch.float32
    for a, b in zip(ours, wanted, strict=True):
        assert (a - b).abs().max() < 0.1 * b.abs().max()
    if kind == "llama":  # rotary frequencies are no weights
        assert model.lm.model.rotary_emb.inv_freq.dtype == torch.float32


def test_training_logits_of_a_trainable_model() -> None:
    lm = random_model(CONFIGS["opt"], 0)
    assert all(parameter.requires_grad for parameter in lm.parameters())
    ids = torch.arange(6).view(2, 3) + 5
    logits = target_logits(lm, torch.tensor([4, 1]), input_ids=ids)
    lm.eval()
    wanted = lm(input_ids=ids).logits.flatten(0, 1)[[4, 1]]
    torch.testing.assert_close(target_logits(lm, torch.tensor([4, 1]), input_ids=ids), wanted)
    logits.sum().backward()
    assert lm.lm_head.weight.grad.any()


# -- generation ------------------------------------------------------------------------------------

ENDS = {"end_token_id": 1, "pad_token_id": 0}


def prompt(model: LanguageModel) -> dict[str, Tensor]:
    given = inputs(model)
    return {"inputs_embeds": given["inputs_embeds"], "attention_mask": torch.ones(B, T).long()}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "flan_t5"])
def test_greedy_tokens_are_the_argmax(kind: str) -> None:
    model = tiny(kind).double()
    given = prompt(model)
    ids = model.generate(**given, **ENDS, max_new_tokens=3, min_new_tokens=3)
    assert ids.shape == (B, 3) and not ids.requires_grad
    embeds, mask = given["inputs_embeds"], given["attention_mask"]
    for t in range(3):
        if model.is_encoder_decoder:
            before = F.pad(ids[:, :t], (1, 0), value=0)  # T5 starts with <pad>
            index = torch.arange(B) * (t + 1) + t
            logits = model.logits(embeds, mask, index, decoder_input_ids=before)
        else:
            whole = torch.cat([embeds, model.embed(ids[:, :t])], dim=1)
            index = torch.arange(B) * (T + t) + T + t - 1
            logits = model.logits(whole, torch.ones(whole.shape[:2]).long(), index)
        logits[:, ENDS["end_token_id"]] = -torch.inf
        assert logits.argmax(dim=-1).equal(ids[:, t])


@pytest.mark.parametrize("kind", ["opt", "flan_t5"])
def test_ends_are_padded(kind: str) -> None:
    model = tiny(kind)
    given = prompt(model)
    free = model.generate(**given, end_token_id=V - 1, pad_token_id=0, max_new_tokens=6)
    end = int(free[0, 0])
    ids = model.generate(**given, end_token_id=end, pad_token_id=3, max_new_tokens=6)
    assert ids[0, 0] != end  # one token at least
    ids = model.generate(
        **given, end_token_id=end, pad_token_id=3, max_new_tokens=6, min_new_tokens=0
    )
    assert ids[0, 0] == end and (ids[0, 1:] == 3).all()


def test_beams_and_samples() -> None:
    model = tiny("llama")
    given = prompt(model)
    beams = model.generate(**given, **ENDS, num_beams=4, num_captions=3, max_new_tokens=5)
    assert beams.shape[0] == 3 * B and len({tuple(row) for row in beams[:3].tolist()}) == 3
    draw = {"max_new_tokens": 40, "min_new_tokens": 40, "num_captions": 5}
    torch.manual_seed(0)
    first = model.generate(**given, **ENDS, top_p=1.0, temperature=5.0, **draw)
    second = model.generate(**given, **ENDS, top_p=1.0, temperature=5.0, **draw)
    torch.manual_seed(0)
    assert model.generate(**given, **ENDS, top_p=1.0, temperature=5.0, **draw).equal(first)
    assert first.shape == (5 * B, 40) and not first.equal(second)
    assert len(first.unique()) == V - 1  # all but the end
    narrow = model.generate(**given, **ENDS, top_p=1e-6, **draw)
    greedy = model.generate(**given, **ENDS, max_new_tokens=40, min_new_tokens=40)
    assert narrow.equal(greedy.repeat_interleave(5, dim=0))
    with pytest.raises(UserError, match="num_captions=3 is more than num_beams=2 can give"):
        model.generate(**given, **ENDS, num_beams=2, num_captions=3)
    drawn = model.generate(**given, **ENDS, top_p=0.9, num_beams=3, num_captions=3)
    assert drawn.shape[0] == 3 * B


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_beams": 3, "top_p": 0.9, "num_captions": 5}, "num_captions=5 is more than num_beam"),
        ({"top_p": 0.9, "temperature": 0.0}, "these settings: `temperature`"),
        ({"top_p": -1.0}, "these settings: `top_p`"),
        ({"repetition_penalty": 0.0}, "these settings: `penalty`"),
        ({"max_new_tokens": 0}, "these settings: `max_new_tokens`"),
    ],
)
def test_searches_that_there_are_not(settings: dict[str, Any], said: str) -> None:
    model = tiny("llama")
    with pytest.raises(UserError, match=said) as error:
        model.generate(**prompt(model), **(ENDS | settings))
    assert "\n" not in str(error.value)


def test_a_models_own_habits_are_no_default(tmp_path: Path) -> None:
    random_model(CONFIGS["llama"], 0).save_pretrained(tmp_path)
    habits = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0, "max_length": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(habits | {"eos_token_id": 3}))
    model, plain = LanguageModel(str(tmp_path), dtype="float32"), tiny("llama")
    settings = {**ENDS, "max_new_tokens": 9, "min_new_tokens": 9}
    assert model.generate(**prompt(model), **settings).equal(
        plain.generate(**prompt(plain), **settings)
    )


# -- T5 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flan_t5", "t5"])
@torch.no_grad()
def test_t5_heads_and_gelu(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    given = inputs(model)
    lm = model.lm
    own = kind == "flan_t5"
    assert (lm.lm_head.weight is not lm.shared.weight) == own
    encoded = lm.encoder(
        inputs_embeds=given["inputs_embeds"], attention_mask=given["attention_mask"]
    )
    decoded = lm.decoder(
        input_ids=given["decoder_input_ids"],
        attention_mask=given["decoder_attention_mask"],
        encoder_hidden_states=encoded[0],
        encoder_attention_mask=given["attention_mask"],
    )[0]
    wanted = (
        F.linear(decoded, lm.lm_head.weight)
        if own
        else (F.linear(decoded * WIDTH**-0.5, lm.shared.weight))
    )
    whole = all_logits(model, given)
    torch.testing.assert_close(whole, wanted)
    if own:
        x = torch.linspace(-3, 3, 50)
        assert lm.encoder.block[0].layer[1].DenseReluDense.act(x).equal(F.gelu(x))
        assert 0.5 < whole.std() < 2  # a head fit to learn from

    lm.save_pretrained(tmp_path)
    again = LanguageModel(str(tmp_path), config=CONFIGS[kind], dtype="float32")
    assert (again.lm.lm_head.weight is not again.lm.shared.weight) == own
    torch.testing.assert_close(all_logits(again, given), whole, rtol=0, atol=0)
    # as flan-t5 was published: by a library that wrote what it was told
    settings = json.loads((tmp_path / "config.json").read_text())
    settings.pop("scale_decoder_outputs")
    settings |= {"tie_word_embeddings": not own, "dense_act_fn": "gelu_new" if own else "relu"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    published = LanguageModel(str(tmp_path), dtype="float32")
    torch.testing.assert_close(all_logits(published, given), whole, rtol=0, atol=0)


def test_t5_in_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model(CONFIGS["flan_t5"], 0).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="plain fp16 T5 overflows; use bfloat16"):
        tiny("flan_t5", dtype="float16")
    with pytest.raises(UserError, match="plain fp16 T5 overflows; use bfloat16"):
        LanguageModel(str(tmp_path), dtype="float16")
    monkeypatch.setattr(lm_weights, "has_bfloat16", lambda device: False)
    for model in (tiny("flan_t5", dtype="float16"), LanguageModel(str(tmp_path), dtype="float16")):
        wide = {n for n, p in model.lm.named_parameters() if p.dtype == torch.float32}
        assert wide == {n for n, _ in model.lm.named_parameters() if ".wo." in n} != set()
        assert model.logits(**inputs(model)).isfinite().all() and model.dtype == torch.float16
    assert tiny("opt", dtype="float16").dtype == torch.float16


def test_which_devices_have_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lm_weights.has_bfloat16(torch.device("cpu"))
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: native)  # noqa: B023
        assert lm_weights.has_bfloat16(torch.device("cuda")) is native
        assert lm_weights.has_bfloat16(None) is native
        assert lm_weights.has_bfloat16(torch.device("cpu"))


# -- where weights come from -----------------------------------------------------------------------


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = tiny("flan_t5")
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(2)
    second, other = tiny("flan_t5"), tiny("flan_t5", seed=1)
    for key, value in first.lm.state_dict().items():
        assert value.equal(second.lm.state_dict()[key])
    assert first.identity() == second.identity() != other.identity()
    assert first.identity() == tiny("flan_t5", dtype="bfloat16").identity()
    other_eps = LanguageModel(
        config={**CONFIGS["flan_t5"], "layer_norm_epsilon": 1e-3}, weights="random", dtype="float32"
    )
    assert first.identity()["digest"] != other_eps.identity()["digest"]  # of the same weights
    assert first.identity() | {"digest": ""} == {
        "name": "t5",
        "revision": "",
        "weights": "random",
        "digest": "",
    }
    assert len(first.identity()["digest"]) == 64


@pytest.mark.parametrize("kind", ["opt", "llama", "flan_t5"])
def test_on_the_meta_device_nothing_is_read(kind: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = LanguageModel("nowhere/at-all", config=CONFIGS[kind], gradient_checkpointing=True)
    wanted = tiny(kind, dtype="bfloat16")
    shapes = [(n, p.shape, p.dtype) for n, p in model.named_parameters()]
    assert shapes == [(n, p.shape, p.dtype) for n, p in wanted.named_parameters()]
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert (model.width, model.vocab_size) == (WIDTH, V) and model.identity()["digest"] == ""
    wanted.lm.save_pretrained(tmp_path)
    with torch.device("meta"):
        from_folder = LanguageModel(str(tmp_path))
    assert [(n, p.shape, p.dtype) for n, p in from_folder.named_parameters()] == shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm")
    random_model(CONFIGS["opt"], 0).save_pretrained(path)
    return path


@pytest.mark.parametrize("accelerate", [True, False])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_from_a_folder(
    folder: Path, device: str | None, accelerate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not accelerate:
        monkeypatch.setattr(lm_weights, "_installed", lambda package: False)
    elif not lm_weights._installed("accelerate"):
        pytest.skip("accelerate is not installed")
    model = LanguageModel(str(folder), config=CONFIGS["opt"], device=device, dtype="float32")
    for key, value in tiny("opt").lm.state_dict().items():
        assert model.lm.state_dict()[key].equal(value)
    half = LanguageModel(str(folder), device=device)
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}
    assert model.identity() == half.identity()
    assert model.identity()["weights"] == "pretrained" and model.identity()["revision"] == ""
    assert download(str(folder)) == folder


def test_the_digest_sees_what_is_done_with_the_weights(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    config = tmp_path / "copy" / "config.json"
    digests = [LanguageModel(str(folder)).identity()["digest"]]
    for change in ({"transformers_version": "9"}, {"activation_function": "gelu"}):
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
        digests.append(LanguageModel(str(tmp_path / "copy")).identity()["digest"])
    assert digests[0] == digests[1] != digests[2]


def test_the_digest_sees_one_weight(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    digests = set()
    for change in (0.0, 1e-3):
        state["model.decoder.final_layer_norm.bias"][0] += change
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        digests.add(LanguageModel(str(tmp_path)).identity()["digest"])
    assert len(digests) == 2 and tiny("opt").identity()["digest"] not in digests


@pytest.fixture
def cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache as it looks on a machine that has downloaded own/model."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    store = tmp_path / "models--own--model"
    snapshot = store / "snapshots" / ("5" * 40)
    for part in (store / "blobs", store / "refs", snapshot):
        part.mkdir(parents=True)
    (store / "refs" / "main").write_text(snapshot.name)
    for name, blob in {"config.json": "c" * 40, "model.safetensors": "a" * 64}.items():
        (store / "blobs" / blob).write_bytes((folder / name).read_bytes())
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    return snapshot


def test_from_the_hubs_cache(cache: Path) -> None:
    model = LanguageModel("own/model", dtype="float32")
    assert model.lm.lm_head.weight.equal(tiny("opt").lm.lm_head.weight)
    assert model.identity()["revision"] == cache.name
    assert download("own/model") == cache
    pinned = LanguageModel(f"own/model@{cache.name}", dtype="float32")
    assert pinned.identity()["digest"] == model.identity()["digest"]

    blob = (cache / "model.safetensors").resolve()
    blob.write_bytes(b"")  # its name is the content's SHA-256: it is not read again
    assert lm_identity.files_digest(cache) == model.identity()["digest"]
    (cache / "model.safetensors").unlink()  # only the tokenizer was fetched: asks the network
    with pytest.raises(UserError, match=r"name=own/model is no local folder, and the .* hub"):
        LanguageModel("own/model")


def test_torch_files_are_read_where_there_is_nothing_better(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the published OPT has them; of a repository with both, only safetensors are fetched."""
    state = load_file(cache / "model.safetensors")
    (cache / "model.safetensors").unlink()
    torch.save(state, cache / "pytorch_model.bin")
    model = LanguageModel("own/model", dtype="float32")
    assert model.lm.lm_head.weight.equal(tiny("opt").lm.lm_head.weight)
    assert model.identity()["digest"] == lm_identity.files_digest(cache)

    asked = []
    (cache / "pytorch_model.bin").unlink()
    both = ["config.json", "pytorch_model.bin", "model-00001-of-00001.safetensors"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: both)
    fetch = huggingface_hub.snapshot_download

    def snapshot_download(*args: Any, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        return fetch(*args, **options | {"local_files_only": True})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert download("own/model") == cache
    assert "*.safetensors" in asked[-1] and "pytorch_model*.bin" not in asked[-1]


def test_no_pickle_is_run(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save({"lm_head.weight": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="could not be loaded"):
        LanguageModel(str(tmp_path))
    assert not (tmp_path / "sprung").exists()


def test_random_weights_of_a_published_size(folder: Path) -> None:
    model = LanguageModel(str(folder), weights="random", dtype="float32", seed=3)
    wanted = random_model(CONFIGS["opt"], 3).state_dict()
    assert all(value.equal(wanted[key]) for key, value in model.lm.state_dict().items())
    assert model.identity()["name"] == str(folder)


# -- quantization ----------------------------------------------------------------------------------


def quantized_is_close(config: dict[str, Any], quantization: str, gap: float) -> LanguageModel:
    settings = {"config": config, "weights": "random", "dtype": "float32"}
    plain, model = LanguageModel(**settings), LanguageModel(**settings, quantization=quantization)
    assert model.identity() == plain.identity()
    given = inputs(plain)
    (ours, our_grad), (wanted, grad) = gradients(model, given), gradients(plain, given)
    assert 0 < (our_grad - grad).abs().max() < gap * grad.abs().max()
    assert (ours - wanted).abs() < gap * wanted
    model.train().to("cpu")
    again, _ = gradients(model, given)
    assert again.equal(ours) and not any(p.requires_grad for p in model.parameters())
    assert model.generate(**prompt(model), **ENDS, max_new_tokens=3).shape[0] == B
    return model


@pytest.mark.parametrize("kind", ["opt", "llama", "flan_t5"])
def test_torchao_int8(kind: str) -> None:
    pytest.importorskip("torchao")
    model = quantized_is_close(CONFIGS[kind], "torchao_int8", 0.1)
    weights = {n: type(p.data).__name__ for n, p in model.lm.named_parameters()}
    assert "Int8Tensor" in weights.values()
    assert {weights[n] for n in weights if "head" in n or "embed" in n} <= {"Tensor"}
    lean = tiny(kind, quantization="torchao_int8", gradient_checkpointing=True)
    given = inputs(lean)
    assert gradients(lean, given)[1].equal(gradients(model, given)[1])


def test_torchao_int8_from_a_folder(folder: Path) -> None:
    pytest.importorskip("torchao")
    model = LanguageModel(str(folder), quantization="torchao_int8", dtype="float32", device="cpu")
    twin = tiny("opt", quantization="torchao_int8")
    given = inputs(model)
    assert model.logits(**given).equal(twin.logits(**given))
    assert model.identity() == LanguageModel(str(folder)).identity()


def test_packed_weights_get_a_backward() -> None:
    pytest.importorskip("torchao")
    native, own = (tiny("opt", quantization="torchao_int8") for _ in range(2))
    let_gradients_through(own.lm)  # as 4-bit layers, whose kernels have none
    given = inputs(native)
    for ours, wanted in zip(gradients(own, given), gradients(native, given), strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("quantization", ["bitsandbytes_int8", "bitsandbytes_nf4"])
def test_bitsandbytes(quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    # it packs blocks of 64 weights
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    quantized_is_close(CONFIGS["llama"] | sizes, quantization, 0.3)


# -- what cannot be had ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "language_model.name is missing: give a folder or a hub id"),
        ({"config": CONFIGS["opt"]}, "language_model.name is missing"),
        ({"name": "/no/such"}, "name=/no/such: there is no such folder"),
        ({"name": "no/such"}, "name=no/such is no local folder.*without a network give a folder"),
        ({"name": "x", "weights": "half"}, "weights=half is not one of pretrained, random"),
        ({"name": "x", "dtype": "int8"}, "dtype=int8 is not one of float32, bfloat16, float16"),
        ({"name": "x", "quantization": "gptq"}, "quantization=gptq is not one of null, torchao"),
        (
            {"config": {"model_type": "optt"}, "weights": "random"},
            r"config.model_type=optt is unknown to transformers .*close names: \['opt'",
        ),
        ({"config": {}, "weights": "random"}, "config.model_type=None is unknown"),
        (
            {"config": {"model_type": "opt", "hiden_size": 8}, "weights": "random"},
            "config.hiden_size: opt has no such key",
        ),
        (
            {"config": {**CONFIGS["opt"], "num_attention_heads": 5}, "weights": "random"},
            "config of type opt gives no language model: embed_dim must be divisible",
        ),
        (
            {"config": {"model_type": "vit"}, "weights": "random"},
            "config of type vit gives no language model",
        ),
    ],
)
def test_what_cannot_be_had_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        LanguageModel(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/no/such", "./such", "~/such", "a/b/c", "runs/such"])
def test_a_missing_folder_is_called_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for call in (download, lambda name: LanguageModel(name, weights="random")):
        with pytest.raises(UserError, match=r"there is no such folder.*lm_flickr8k_tiny") as error:
            call(name)
        assert f"name={name}:" in str(error.value) and "hub" not in str(error.value)


def test_folders_that_do_not_do(folder: Path, tmp_path: Path) -> None:
    def refused(said: str, **options: Any) -> None:
        with pytest.raises(UserError, match=said) as error:
            LanguageModel(str(tmp_path), **options)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)

    refused("has no usable config.json")
    (tmp_path / "config.json").write_text('{"model_type": "gpt99"}')
    refused("has no usable config.json .*gpt99")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    refused("has no weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not this")
    refused("could not be loaded")
    (tmp_path / "model.safetensors").write_bytes(b"not this")
    refused("could not be loaded")
    state = load_file(folder / "model.safetensors")
    name = "model.decoder.layers.1.fc1.bias"
    save_file({k: v for k, v in state.items() if k != name}, tmp_path / "model.safetensors")
    refused(f"lacks 1 weights, the first is {name}")
    save_file(state | {name: torch.zeros(3)}, tmp_path / "model.safetensors")
    refused("could not be loaded")
    save_file(state, tmp_path / "model.safetensors")
    refused("config.ffn_dim=9, but .* has 64", config={"model_type": "opt", "ffn_dim": 9})
    refused("config.model_type=llama, but .* has opt", config=CONFIGS["llama"])
    tied = {"model_type": "opt", "tie_word_embeddings": False}
    refused("config.tie_word_embeddings=False, but .* has True", config=tied)
    LanguageModel(str(tmp_path), config={**CONFIGS["opt"], "tie_word_embeddings": True})


@pytest.mark.parametrize(
    ("quantization", "extra"),
    [("torchao_int8", "torchao"), ("bitsandbytes_nf4", "bitsandbytes")],
)
def test_missing_packages_are_named(
    quantization: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_weights, "_installed", lambda package: package == "accelerate")
    said = rf"quantization={quantization} needs {extra}; pip install 'blip2-train\[{extra}\]'"
    with pytest.raises(UserError, match=said):
        tiny("opt", quantization=quantization)


def test_int4_needs_a_gpu() -> None:
    pytest.importorskip("torchao")
    with pytest.raises(UserError, match="torchao_int4 computes on CUDA devices alone"):
        tiny("opt", quantization="torchao_int4")


def test_settings_may_stand_elsewhere() -> None:
    with pytest.raises(UserError, match=r"^causal_lm\.config\.model_type=x is unknown"):
        random_model({"model_type": "x"}, 0, "causal_lm")
