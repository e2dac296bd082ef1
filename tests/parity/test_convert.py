"""Conversion of the oracle's weights.

Proven, for every file of weights in the oracle's folder, whatever it holds: LAVIS -> ours -> HF ->
ours -> LAVIS by blip2-convert comes back bit for bit, with the image tower and the language model;
Hugging Face's own classes, opened from the export, give ITM logits, contrastive features, LM logits
and greedy ids equal to ours with their one layer-norm eps; the difference that the true eps makes
is printed, and small; greedy ids are the reference's too.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.foreign import cases, is_stage2, lavis_state, overrides, save_lavis
from parity.reference import load_case
from parity.test_stage2 import caption_settings, padded
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from blip2_train.checkpoint.hf import EXTRA
from blip2_train.convert import main
from blip2_train.interchange.compare import one_eps
from blip2_train.interchange.hf_folder import load_hf
from blip2_train.interchange.read import read_ours
from blip2_train.interchange.whole import Whole

IMAGES, WORDS = 4, 6


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = Path(metafunc.config.getoption("--oracle"))
    found = cases(folder) if folder.is_dir() else []
    ids = [f"{name}-{part}" for name, part in found]
    metafunc.parametrize(("name", "part"), found, ids=ids)


def convert(source: str, target: str, src: Path, dst: Path, *more: str) -> Path:
    words = ["--from", source, "--to", target, str(src), str(dst), "--tolerance", "1e-5", *more]
    assert main(words) == 0
    return dst


def test_there_and_back(
    oracle: Path, tmp_path: Path, name: str, part: str, capsys: pytest.CaptureFixture
) -> None:
    state = lavis_state(oracle, name, part)
    lavis = save_lavis(state, tmp_path / "lavis.pth")
    info, tensors = load_case(oracle, name)
    known = overrides(oracle, name, tmp_path)
    ours = convert("lavis", "blip2-train", lavis, tmp_path / "ours", *known)
    hf = convert("blip2-train", "hf", ours, tmp_path / "hf")
    again = convert("hf", "blip2-train", hf, tmp_path / "again")
    back = convert("blip2-train", "lavis", again, tmp_path / "back.pth")

    content = torch.load(back, weights_only=True)["model"]
    assert content.keys() == state.keys()
    for key, value in state.items():
        assert content[key].dtype == value.dtype and content[key].equal(value), key
    said = capsys.readouterr().out
    assert said.count("largest difference") == 5 and ", 0 unknown" in said

    assert ".tmp" not in (ours / "config.yaml").read_text()  # nor is any path of the work in hf
    assert b".tmp" not in (hf / EXTRA).read_bytes() + (hf / "README.md").read_bytes()

    whole = read_ours(ours)
    model = load_hf(hf, whole.cfg["stage"])
    eps = model.config.vision_config.layer_norm_eps
    features = torch.randn(
        IMAGES, info["dims"]["feat_tokens"], info["dims"]["feat_dim"],
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    compare = compare_stage2 if is_stage2(info) else compare_stage1
    with one_eps(whole, eps):
        gaps = compare(whole, model, features)
        assert max(gaps.values()) <= 1e-5, gaps
    true = compare(whole, model, features)
    with capsys.disabled():
        print(f"\n  {name}: true eps of ln_vision: {max(true.values()):.1e}", end="")
    assert max(true.values()) <= 1e-3, true
    if is_stage2(info):
        greedy_captions(whole, model, features, eps)
        if "outputs/greedy_ids" in tensors:
            the_references_captions(model, info, tensors)


@contextlib.contextmanager
def sees(model: Any, features: Tensor) -> Iterator[dict[str, Tensor]]:
    """Their model with these image features in place of its tower's; gives an input of the size."""
    encoder = model.vision_model.encoder
    encoder.forward = lambda *args, **kwargs: BaseModelOutput(last_hidden_state=features)
    size = model.config.vision_config.image_size
    try:
        yield {"pixel_values": torch.zeros(len(features), 3, size, size)}
    finally:
        del encoder.forward


def behind_queries(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    places = torch.full((len(ids), model.config.num_query_tokens), model.config.image_token_index)
    return {
        "input_ids": torch.cat([places, ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(places), mask], dim=1),
    }


def gap(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


@torch.no_grad()
def compare_stage1(whole: Whole, model: Any, features: Tensor) -> dict[str, float]:
    mine: Any = whole.model
    ids = torch.randint(
        5, mine.dec_token_id, (IMAGES, WORDS), generator=torch.Generator().manual_seed(2)
    )
    mask = (torch.arange(WORDS) < torch.tensor([WORDS, 3, WORDS - 1, 2])[:, None]).long()
    kv = mine.qformer.project_image(features)
    with sees(model, features) as image:
        text = behind_queries(model, ids, mask)
        cosine = model(**image, **text)
        match = model(**image, **text, use_image_text_matching_head=True)
    feats = mine.encode_image(kv).image_feats
    text_feat = mine.encode_text(ids, mask)[1]
    return {
        "image features": gap(feats, cosine.image_embeds),
        "text features": gap(text_feat, cosine.text_embeds),
        "cosines": gap(
            torch.einsum("bqe,te->btq", feats, text_feat).amax(-1), cosine.logits_per_image
        ),
        "ITM logits": gap(mine.match([(kv, 1)], ids, mask), match.logits_per_image),
    }


@torch.no_grad()
def compare_stage2(whole: Whole, model: Any, features: Tensor) -> dict[str, float]:
    mine: Any = whole.model
    vocabulary = mine.language_model.vocab_size
    ids = torch.randint(0, vocabulary, (IMAGES, WORDS), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(WORDS) < torch.tensor([WORDS, 3, WORDS - 1, 2])[:, None]).long()
    text = {"input_ids": ids, "attention_mask": mask, "target_ids": ids, "target_mask": mask}
    text["lm_index"] = mask.flatten().nonzero().flatten()
    logits = mine.text_logits(mine.encode_image(mine.qformer.project_image(features)), text)
    with sees(model, features) as image:
        inputs = {**image, **behind_queries(model, ids, mask)}
        if mine.language_model.is_encoder_decoder:
            first = torch.full((IMAGES, 1), mine.language_model.decoder_start_token_id)
            out = model(**inputs, decoder_input_ids=torch.cat([first, ids[:, :-1]], dim=1)).logits
        else:
            out = model(**inputs).logits[:, model.config.num_query_tokens - 1 : -1]
    theirs = out[..., :vocabulary].flatten(0, 1)[text["lm_index"]]
    return {"LM logits": gap(logits, theirs)}


def greedy_captions(whole: Whole, model: Any, features: Tensor, eps: float) -> None:
    """With a prompt, and with none."""
    mine: Any = whole.model
    text: Any = whole.stage.text  # type: ignore[attr-defined]
    lm = mine.language_model
    assert model.language_model.generation_config.eos_token_id == text.end_id
    encoder, end = lm.is_encoder_decoder, {"end_token_id": text.end_id, "pad_token_id": text.pad_id}
    prompts = {"none": [text.encoder_end_id] if encoder else text.start, "two words": [5, 9]}
    if not prompts["none"]:  # `generate` of their class begins with something all the same
        prompts["none"] = [model.config.text_config.bos_token_id]
    for name, ids in prompts.items():
        prompt = torch.tensor([ids]).expand(len(features), -1)
        with one_eps(whole, eps):
            ours = mine.generate(
                mine.qformer.project_image(features), prompt, torch.ones_like(prompt),
                max_new_tokens=8, min_new_tokens=0, **end,
            )  # fmt: skip
        with sees(model, features) as image:
            given = {} if name == "none" else behind_queries(model, prompt, torch.ones_like(prompt))
            theirs = model.generate(**image, **given, max_new_tokens=8)
        before = 1 if encoder else model.config.num_query_tokens + prompt.shape[1]
        assert ours.equal(theirs[:, before:]), name


def the_references_captions(model: Any, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    settings = caption_settings(info)
    features = tensors["inputs/image_features"]
    prompt = tensors["inputs/prompt_ids"].expand(len(features), -1)
    with sees(model, features) as image:
        ids = model.generate(
            **image,
            **behind_queries(model, prompt, torch.ones_like(prompt)),
            max_new_tokens=settings["max_new_tokens"],
            min_new_tokens=settings["min_new_tokens"],
        )
    decoder_alone = not model.config.text_config.is_encoder_decoder
    new = ids[:, model.config.num_query_tokens + prompt.shape[1] if decoder_alone else 1 :]
    want = tensors["outputs/greedy_ids"][:, 1:]
    assert padded(new, want, settings["pad_token_id"]).equal(want)
