"""Stage 2 equals the reference implementation.

Proven for decoder-only language models, with and without a prompt, and for encoder-decoders: what
the language model reads and where it looks, loss, activations, logits at the targets, and every
gradient of one step, that of the image features included; greedy captions token by token. Beam
search is the library's own on what the reference feeds it: its rules changed since the reference.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity.reference import NoTower, assert_close, assert_gradients, load_case, section
from torch import Tensor

from blip2_train.checkpoint.lavis import from_lavis, to_lavis_name
from blip2_train.models.language import LanguageModel
from blip2_train.models.qformer import QFormer
from blip2_train.models.stage2 import Blip2Stage2

STEPS = ["stage2_opt", "stage2_opt_prompt", "stage2_t5"]
CAPTIONS = ["generate_opt", "generate_t5"]
IGNORED = -100  # label of what is no target


def family(info: dict[str, Any]) -> str:
    return "t5" if info["lm"]["kind"].startswith("encoder") else "opt"


def language_config(lm: dict[str, Any]) -> dict[str, Any]:
    if lm["kind"].startswith("encoder"):
        return {
            "model_type": "t5",
            "vocab_size": lm["vocab"],
            "d_model": lm["d_model"],
            "d_kv": lm["d_kv"],
            "d_ff": lm["d_ff"],
            "num_layers": lm["encoder_layers"],
            "num_decoder_layers": lm["decoder_layers"],
            "num_heads": lm["heads"],
            "relative_attention_num_buckets": lm["relative_attention_num_buckets"],
            "relative_attention_max_distance": lm["relative_attention_max_distance"],
            "layer_norm_epsilon": lm["layer_norm_epsilon"],
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": lm["tied_head"],
            "pad_token_id": lm["pad"],
            "eos_token_id": lm["eos"],
            "decoder_start_token_id": lm["decoder_start"],
        }
    return {
        "model_type": "opt",
        "vocab_size": lm["vocab"],
        "hidden_size": lm["hidden"],
        "word_embed_proj_dim": lm["word_embed_proj_dim"],
        "ffn_dim": lm["ffn"],
        "num_hidden_layers": lm["layers"],
        "num_attention_heads": lm["heads"],
        "max_position_embeddings": lm["max_positions"],
        "activation_function": lm["activation"],
        "do_layer_norm_before": lm["pre_layer_norm"],
        "tie_word_embeddings": lm["tied_head"],
        "pad_token_id": lm["pad"],
        "bos_token_id": lm["bos"],
        "eos_token_id": lm["eos"],
    }


def build_stage2(info: dict[str, Any], weights: dict[str, Tensor]) -> Blip2Stage2:
    dims = info["dims"]
    qformer = QFormer(
        vision_width=dims["feat_dim"],
        hidden_size=dims["hidden"],
        num_layers=dims["layers"],
        num_heads=dims["heads"],
        intermediate_size=dims["inter"],
        num_query_tokens=dims["queries"],
        cross_attention_freq=dims["caf"],
        dropout=info["dropout"],
        text=False,
    )
    lm = LanguageModel(config=language_config(info["lm"]), weights="random", dtype="float32")
    model = Blip2Stage2(NoTower(), qformer, lm)  # type: ignore[arg-type]
    account = from_lavis(weights)
    assert not account.unknown
    model.load_state_dict(account.state, strict=True)
    return model


def text_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the loader would make of a case's captions."""
    inputs, labels = section(tensors, "inputs/"), tensors["outputs/labels"]
    if "decoder_target_ids" in inputs:
        return {
            "input_ids": inputs["encoder_input_ids"],
            "attention_mask": inputs["encoder_text_mask"],
            "target_ids": inputs["decoder_target_ids"],
            "target_mask": inputs["decoder_target_mask"],
            "lm_index": (labels.flatten() != IGNORED).nonzero().flatten(),
        }
    ids = inputs["text_input_ids"]
    text_labels = labels[:, labels.shape[1] - ids.shape[1] :]  # queries have labels too
    return {
        "input_ids": ids,
        "attention_mask": inputs["text_attention_mask"],
        "lm_index": (text_labels.flatten() != IGNORED).nonzero().flatten(),
    }


def run_step(oracle: Path, case: str) -> dict[str, Any]:
    info, tensors = load_case(oracle, case)
    model = build_stage2(info, section(tensors, "weights/"))
    given: dict[str, Any] = {}
    model.language_model.lm.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    features = tensors["inputs/image_features"].clone().requires_grad_()
    text = text_of(tensors)
    query_output = model.encode_image(model.qformer.project_image(features))
    logits = model.text_logits(query_output, text)
    labels = tensors["outputs/labels"].flatten()
    loss = F.cross_entropy(logits, labels[labels != IGNORED])
    loss.backward()
    return {
        "info": info,
        "want": section(tensors, "outputs/"),
        "grads": section(tensors, "grads/"),
        "input_grad": tensors["input_grads/image_features"],
        "model": model,
        "given": given,
        "features": features,
        "text": text,
        "query_output": query_output,
        "logits": logits,
        "loss": loss,
    }


@pytest.mark.parametrize("case", STEPS)
def test_a_step(oracle: Path, case: str) -> None:
    step = run_step(oracle, case)
    want, given = step["want"], step["given"]
    assert_close(step["query_output"], want["query_hidden"], 2e-5, "query_hidden")
    assert_close(given["inputs_embeds"], want["inputs_embeds"], 2e-5, "inputs_embeds")
    # the last position's row of the mask: what a text sees that is not padding
    assert given["attention_mask"][:, 0, -1].long().equal(want["full_attention_mask"])

    labels, logits = want["labels"], want["lm_logits"]
    if "decoder_input_ids" in want:
        assert given["decoder_input_ids"].equal(want["decoder_input_ids"])
        assert "decoder_attention_mask" not in given  # its padding is behind all targets
    else:  # position t predicts t + 1
        labels, logits = labels[:, 1:], logits[:, :-1]
    assert_close(step["logits"], logits[labels != IGNORED], 5e-5, "lm_logits at the targets")
    assert len(step["logits"]) == len(step["text"]["lm_index"]) > len(labels)
    assert_close(step["loss"], want["loss"], 1e-5, "loss")

    model = step["model"]
    assert not any(p.grad is not None for p in model.language_model.parameters())
    trained = torch.nn.Module()
    for name, part in model.named_children():
        if name != "language_model":
            trained.add_module(name, part)
    assert_gradients(trained, as_opt(step["grads"]))
    wanted = step["input_grad"]
    tolerance = 1e-4 * wanted.abs().max().item() + 2e-6
    assert_close(step["features"].grad, wanted, tolerance, "input gradient")


def as_opt(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """The projection's gradients under the name that `assert_gradients` asks for."""
    return {name.replace("t5_proj.", "opt_proj."): value for name, value in grads.items()}


def test_the_reference_trains_what_we_train(oracle: Path) -> None:
    for case in STEPS:
        info, tensors = load_case(oracle, case)
        model = build_stage2(info, section(tensors, "weights/"))
        ours = {
            to_lavis_name(name, family(info))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        assert ours == set(info["trainable"])


def caption_settings(info: dict[str, Any]) -> dict[str, int]:
    """The reference's limits, which count a first token that is nominal or the decoder's start."""
    settings = info["settings"]
    new = settings.get("max_new_tokens", settings.get("max_length", 0) - 1)
    return {
        "end_token_id": settings["eos"],
        "pad_token_id": settings.get("pad_after_eos", settings.get("pad")),
        "max_new_tokens": new,
        "min_new_tokens": max(settings["min_length"] - 1, 0),
    }


def captions_case(oracle: Path, case: str) -> tuple[dict[str, Any], dict[str, Tensor], Blip2Stage2]:
    info, tensors = load_case(oracle, case)
    return info, tensors, build_stage2(info, section(tensors, "weights/"))


def padded(ids: Tensor, like: Tensor, pad: int) -> Tensor:
    """New tokens in the reference's width: we stop where all rows have ended."""
    assert ids.shape[1] <= like.shape[1]
    return F.pad(ids, (0, like.shape[1] - ids.shape[1]), value=pad)


@pytest.mark.parametrize("case", CAPTIONS)
def test_greedy_captions(oracle: Path, case: str) -> None:
    info, tensors, model = captions_case(oracle, case)
    features, settings = tensors["inputs/image_features"], caption_settings(info)
    prompt = tensors["inputs/prompt_ids"].expand(len(features), -1)
    ids = model.generate(
        model.qformer.project_image(features), prompt, torch.ones_like(prompt), **settings
    )
    want = tensors["outputs/greedy_ids"][:, 1:]
    assert padded(ids, want, settings["pad_token_id"]).equal(want)
    assert (want == settings["end_token_id"]).any(), "some captions should end early"


@pytest.mark.parametrize("case", CAPTIONS)
@torch.no_grad()
def test_beams_are_those_of_the_library(oracle: Path, case: str) -> None:
    info, tensors, model = captions_case(oracle, case)
    weights = section(tensors, "weights/")
    features, settings = tensors["inputs/image_features"], caption_settings(info)
    prompt = tensors["inputs/prompt_ids"].expand(len(features), -1)
    image = model.qformer.project_image(features)
    ours = model.generate(image, prompt, torch.ones_like(prompt), num_beams=3, **settings)

    name = family(info)
    table = "t5_model.shared" if name == "t5" else "opt_model.model.decoder.embed_tokens"
    soft = F.linear(
        model.encode_image(image), weights[f"{name}_proj.weight"], weights[f"{name}_proj.bias"]
    )
    embeds = torch.cat([soft, weights[f"{table}.weight"][prompt]], dim=1)
    theirs = model.language_model.lm.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64),
        num_beams=3,
        max_new_tokens=settings["max_new_tokens"],
        min_new_tokens=settings["min_new_tokens"],
        eos_token_id=settings["end_token_id"],
        pad_token_id=settings["pad_token_id"],
        decoder_start_token_id=info["settings"].get("decoder_start"),
    )
    if name == "t5":
        theirs = theirs[:, 1:]
    assert ours.equal(theirs)
