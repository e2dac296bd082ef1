"""The same input through two models: whether a conversion is true is seen, not believed."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from blip2_train.data.batch import text_tokens
from blip2_train.interchange.whole import Whole
from blip2_train.models.vision import normalise

PICTURES, WORDS = 3, 7


@torch.no_grad()
def outputs(whole: Whole) -> dict[str, Tensor]:
    """What a model of ours makes of the fixed input.

    Returns:
        Stage 1: "image features" [B, Q, E], "text features" [B, E], "ITM logits" [B, 2], "LM
        logits" [B, T, V], "temperature" []. Stage 2: "queries" [B, Q, D] and "LM logits"
        [B, T, V], of the decoder where there is an encoder too; where the Q-Former reads text also
        "asked queries" [B, Q, D].
    """
    model, image = whole.model, pictures(whole)
    ids, mask = texts(whole)
    kv = model.qformer.project_image(model.vision(image))
    if whole.cfg["stage"] == "stage1":
        out = model.encode_image(kv)
        return {
            "image features": out.image_feats,
            "text features": model.encode_text(ids, mask)[1],
            "ITM logits": model.match([(kv, 1)], ids, mask, text_tokens(mask)),
            "LM logits": model.lm_logits(model.caption(ids, out.query_kv)),
            "temperature": model.temp,
        }
    query_output = model.encode_image(kv)
    text = {"input_ids": ids, "attention_mask": mask, "lm_index": torch.arange(ids.numel())}
    text |= {"target_ids": ids, "target_mask": mask}
    logits = model.text_logits(query_output, text)
    found = {"queries": query_output, "LM logits": logits.unflatten(0, ids.shape)}
    if (words := model.qformer.word_embeddings) is not None:
        longest = model.qformer.position_embeddings.num_embeddings
        question = ids[:, :longest] % words.num_embeddings, mask[:, :longest]
        found["asked queries"] = model.encode_image(kv, question)
    return found


@torch.no_grad()
def hf_outputs(model: Any, whole: Whole) -> dict[str, Tensor]:
    """What their model makes of it, as far as it can; names and shapes as of `outputs`.

    Args:
        model: of the class that holds the stage, in float32.
        whole: ours.
    """
    image = pictures(whole)
    ids, mask = texts(whole)
    queries = model.config.num_query_tokens
    places = torch.full((len(ids), queries), model.config.image_token_index)
    inputs = {
        "pixel_values": image,
        "input_ids": torch.cat([places, ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(places), mask], dim=1),
    }
    if whole.cfg["stage"] == "stage1":
        cosine = model(**inputs)
        match = model(**inputs, use_image_text_matching_head=True)
        return {
            "image features": cosine.image_embeds,
            "text features": cosine.text_embeds,
            "ITM logits": match.logits_per_image,
        }
    if whole.model.language_model.is_encoder_decoder:
        start = whole.model.language_model.decoder_start_token_id
        first = torch.full((len(ids), 1), start)
        inputs["decoder_input_ids"] = torch.cat([first, ids[:, :-1]], dim=1)
        out = model(**inputs)
        logits = out.logits
    else:
        out = model(**inputs)
        logits = out.logits[:, queries - 1 : -1]  # position t predicts t + 1
    vocabulary = whole.model.language_model.vocab_size
    return {
        "queries": out.qformer_outputs.last_hidden_state,
        "LM logits": logits[..., :vocabulary],
    }


def pictures(whole: Whole) -> Tensor:
    """Float32 [B, 3, S, S]: noise, normalised."""
    vision = whole.model.vision
    generator = torch.Generator().manual_seed(0)
    size = (PICTURES, 3, vision.image_size, vision.image_size)
    noise = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    return normalise(noise, vision.mean, vision.std)


def texts(whole: Whole) -> tuple[Tensor, Tensor]:
    """Int64 [B, T] ids and mask; of stage 1 with [CLS] and [SEP], of uneven length."""
    generator = torch.Generator().manual_seed(0)
    if whole.cfg["stage"] == "stage1":
        tokenizer: Any = whole.stage.tokenizer  # type: ignore[attr-defined]
        rows = whole.model.qformer.word_embeddings.num_embeddings
        length = min(WORDS, whole.model.qformer.position_embeddings.num_embeddings)
        ids = torch.randint(0, rows - 1, (PICTURES, length), generator=generator)
        ids[:, 0] = tokenizer.cls_token_id
        lengths = torch.arange(length, length - PICTURES, -1).clamp(min=2)
        mask = (torch.arange(length) < lengths[:, None]).long()
        ids[torch.arange(PICTURES), lengths - 1] = tokenizer.sep_token_id
        return ids * mask, mask  # [PAD] is 0
    rows = whole.model.language_model.vocab_size
    ids = torch.randint(0, rows, (PICTURES, WORDS), generator=generator)
    return ids, torch.ones_like(ids)


@contextlib.contextmanager
def one_eps(whole: Whole, eps: float) -> Iterator[None]:
    """With the norm behind the tower computed as Hugging Face's classes do."""
    norm = whole.model.qformer.ln_vision
    before, norm.eps = norm.eps, eps
    try:
        yield
    finally:
        norm.eps = before


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Of each output that both have: the largest difference, in units of its largest entry or 1."""
    return {
        name: ((value - theirs[name]).abs().max() / value.abs().max().clamp(min=1)).item()
        for name, value in ours.items()
        if name in theirs
    }
