"""Batches of captions as the language model reads them, for stage 2 and for its own pre-training.

The collate functions run in the loader's workers, as those of `batch.py`. B: images, P: tokens of
the encoder's longest text, T: of the longest text, both rounded up to a bucket, M: targets in all.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import torch

from blip2_train.data.batch import (
    EvalSample,
    Pictures,
    Sample,
    Skipped,
    stack_pictures,
    text_bucket,
)
from blip2_train.data.language import LanguageTokenizer, encode, pad_rows

Prefix = Literal["none", "random_split"]


class CausalText(TypedDict):
    """Texts of a decoder-only model, padded on the right."""

    input_ids: torch.Tensor  # int64 [B, T]
    attention_mask: torch.Tensor  # int64 [B, T], 0 on padding
    lm_index: torch.Tensor  # int64 [M], flat positions b * T + t of target tokens, ascending
    lm_targets: torch.Tensor  # int64 [M], the tokens there


class Seq2SeqText(TypedDict):
    """Texts of an encoder-decoder model, padded on the right."""

    input_ids: torch.Tensor  # int64 [B, P], of the encoder, ends with the eos token
    attention_mask: torch.Tensor  # int64 [B, P], 0 on padding
    target_ids: torch.Tensor  # int64 [B, T], of the decoder, without a start token
    target_mask: torch.Tensor  # int64 [B, T], 0 on padding
    lm_index: torch.Tensor  # int64 [M], flat positions b * T + t of target tokens, ascending
    lm_targets: torch.Tensor  # int64 [M], the tokens there


class Origin(TypedDict):
    """Where the rows of a batch come from."""

    image_id: torch.Tensor  # int64 [B], equal for the same image
    text: list[str]  # chosen captions, behind the prompt
    keys: list[str]
    skipped: list[Skipped]  # samples that could not be used


class EvalOrigin(Origin):
    """Images of an evaluation; B is smaller than asked for where images were unusable."""

    captions: list[list[str]]  # all of each image, without the prompt
    items: list[int]  # numbers within the `EvalStream`


class CausalBatch(CausalText, Pictures, Origin):
    """What a stage-2 step of a decoder-only model is given."""


class CausalEvalBatch(CausalText, Pictures, EvalOrigin):
    """Images with the loss's texts, those of their first captions, and all captions."""


class Seq2SeqBatch(Seq2SeqText, Pictures, Origin):
    """What a stage-2 step of an encoder-decoder model is given."""


class Seq2SeqEvalBatch(Seq2SeqText, Pictures, EvalOrigin):
    """Images with the loss's texts, those of their first captions, and all captions."""


class DocumentBatch(CausalText, Origin):
    """Captions alone; `text` is the one that a document begins with."""


class DocumentEvalBatch(CausalText, EvalOrigin):
    """Captions alone; `text` is the one that a document begins with."""


# For training.


def collate_causal(
    samples: Sequence[Sample],
    skipped: Sequence[Skipped],
    *,
    text: LanguageTokenizer,
    max_text_tokens: int,
    prompt: str,
    bucket: int,
) -> CausalBatch:
    """Put a training batch of a decoder-only model together.

    Without a prompt every token is a target, the start token too: it is predicted from the last
    query, as in the reference. With one, the start token and the prompt's tokens are not.

    Args:
        samples: of a `TrainStream` with this prompt.
        skipped: samples that were replaced.
        text: see `load_language_tokenizer`.
        max_text_tokens: start, prompt and end included.
        prompt: what every text begins with, but those of samples that have a prompt of their own;
            may be empty.
        bucket: T is a multiple of it, but at most `max_text_tokens`.
    """
    if any(sample.prompt is not None for sample in samples):
        rows, first = _answers(samples, text, max_text_tokens)
    else:
        rows = encode([sample.text for sample in samples], text, max_text_tokens)
        asked = [*text.start, *text.words([prompt.rstrip()])[0]] if prompt.strip() else []
        first = [_shared(row[:-1], asked) for row in rows]  # the end is a target whatever was cut
    return {
        **_with_targets(rows, first, text.pad_id, max_text_tokens, bucket),
        **_origin(samples, skipped),
        **stack_pictures(samples),
    }


def collate_seq2seq(
    samples: Sequence[Sample],
    skipped: Sequence[Skipped],
    *,
    text: LanguageTokenizer,
    max_text_tokens: int,
    prompt: str,
    prefix: Prefix,
    bucket: int,
) -> Seq2SeqBatch:
    """Put a training batch of an encoder-decoder model together.

    Args:
        samples: of a `TrainStream`.
        skipped: samples that were replaced.
        text: see `load_language_tokenizer`.
        max_text_tokens: of either side, end included.
        prompt: in front of the encoder's text, where samples have none of their own; may be empty.
        prefix: `none`: the decoder is to say the whole caption; `random_split`: the encoder reads
            its first 0 .. w-1 of w words, as many as the sample's own random number says, and the
            decoder is to say the rest (section 3.2 of the paper).
        bucket: P and T are multiples of it, but at most `max_text_tokens`.
    """
    read, said = [], []
    for sample in samples:
        words = sample.captions[0].split(" ")
        count = int(sample.uniform * len(words)) if prefix == "random_split" else 0
        asked = prompt if sample.prompt is None else sample.prompt
        read.append(" ".join([asked.strip(), *words[:count]]).strip())
        said.append(" ".join(words[count:]))
    end, room = text.encoder_end_id, max_text_tokens - 1
    # a caption loses its end, a question its beginning, for what asks for the answer comes last
    sources = [
        [*(words[:room] if sample.prompt is None else words[-room:]), end]
        for sample, words in zip(samples, text.words(read), strict=True)
    ]
    targets = [[*words[: max_text_tokens - 1], text.end_id] for words in text.words(said)]
    length = text_bucket(max(map(len, sources), default=0), bucket, max_text_tokens)
    input_ids, attention_mask = pad_rows(sources, text.pad_id, length)
    decoder = _with_targets(targets, [0] * len(targets), text.pad_id, max_text_tokens, bucket)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "target_ids": decoder["input_ids"],
        "target_mask": decoder["attention_mask"],
        "lm_index": decoder["lm_index"],
        "lm_targets": decoder["lm_targets"],
        **_origin(samples, skipped),
        **stack_pictures(samples),
    }


def collate_documents(
    samples: Sequence[Sample],
    skipped: Sequence[Skipped],
    *,
    text: LanguageTokenizer,
    max_text_tokens: int,
    bucket: int,
) -> DocumentBatch:
    """Put a batch for pre-training a decoder-only model on captions together.

    A document is [start] caption [end] [start] caption [end] ... of one image, as many whole
    captions as fit: each begins as behind the queries of stage 2. The first is the chosen one, so
    over the epochs none is left out for good. Every token is a target but a document's first, which
    nothing precedes.

    Args:
        samples: of a `TrainStream`; captions are taken without its prompt.
        skipped: samples that were replaced.
        text: see `load_language_tokenizer`.
        max_text_tokens: of a document; a first caption that is longer loses words.
        bucket: T is a multiple of it, but at most `max_text_tokens`.
    """
    rows = [_document(sample.captions, text, max_text_tokens) for sample in samples]
    return {
        **_with_targets(rows, [1] * len(rows), text.pad_id, max_text_tokens, bucket),
        **_origin(samples, skipped),
    }


def _with_targets(
    rows: Sequence[Sequence[int]], first: Sequence[int], pad_id: int, longest: int, bucket: int
) -> CausalText:
    """Pad rows on the right and find the targets: of row b all tokens from number `first[b]` on."""
    length = text_bucket(max(map(len, rows), default=0), bucket, longest)
    ids, mask = pad_rows(rows, pad_id, length)
    is_target = (mask != 0) & (torch.arange(length) >= torch.tensor(first).reshape(-1, 1))
    index = is_target.flatten().nonzero().squeeze(1)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "lm_index": index,
        "lm_targets": ids.flatten()[index],
    }


def _answers(
    samples: Sequence[Sample], text: LanguageTokenizer, max_text_tokens: int
) -> tuple[list[list[int]], list[int]]:
    """Rows of prompts and answers, and the place where each answer begins.

    Of a prompt that is too long the beginning is cut: the answer stays, and what asks for it.
    """
    room = max_text_tokens - len(text.start) - 1
    rows, first = [], []
    prompts = text.words([(sample.prompt or "").rstrip() for sample in samples])
    for words, asked in zip(text.words([sample.text for sample in samples]), prompts, strict=True):
        cut = max(0, len(words) - room)
        rows.append([*text.start, *words[cut:], text.end_id])
        first.append(len(text.start) + max(0, _shared(words, asked) - cut))
    return rows, first


def _shared(row: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two rows have in common at their beginning."""
    same = (a == b for a, b in zip(row, other, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, same))


def _document(captions: Sequence[str], text: LanguageTokenizer, max_text_tokens: int) -> list[int]:
    (document,) = encode(captions[:1], text, max_text_tokens)
    for words in text.words(captions[1:]):
        caption = [*text.start, *words, text.end_id]
        if len(document) + len(caption) > max_text_tokens:
            break
        document += caption
    return document


def _origin(samples: Sequence[Sample], skipped: Sequence[Skipped]) -> Origin:
    return {
        "image_id": torch.tensor([sample.image_id for sample in samples], dtype=torch.int64),
        "text": [sample.text for sample in samples],
        "keys": [sample.key for sample in samples],
        "skipped": list(skipped),
    }


# For evaluation: each image once, with its first caption (documents: with all).


def collate_eval_causal(
    items: Sequence[EvalSample | Skipped], *, prompt: str, **settings: Any
) -> CausalEvalBatch:
    """Put an evaluation batch together; unusable samples are left out and reported.

    Args:
        items: of an `EvalStream` with this prompt; where none is usable, B and T are 0.
        prompt: see `collate_causal`.
        **settings: `text`, `max_text_tokens` and `bucket` of `collate_causal`.
    """
    samples, skipped, numbers = _first_captions(items, prompt)
    batch = collate_causal(samples, skipped, prompt=prompt, **settings)
    return {**batch, "captions": [sample.captions for sample in samples], "items": numbers}


def collate_eval_seq2seq(
    items: Sequence[EvalSample | Skipped], *, prompt: str, **settings: Any
) -> Seq2SeqEvalBatch:
    """Put an evaluation batch together, with nothing of a caption in the encoder.

    Args:
        items: of an `EvalStream` with this prompt; where none is usable, B, P and T are 0.
        prompt: see `collate_seq2seq`.
        **settings: `text`, `max_text_tokens` and `bucket` of `collate_seq2seq`.
    """
    samples, skipped, numbers = _first_captions(items, prompt)
    batch = collate_seq2seq(samples, skipped, prompt=prompt, prefix="none", **settings)
    return {**batch, "captions": [sample.captions for sample in samples], "items": numbers}


def collate_eval_documents(
    items: Sequence[EvalSample | Skipped], *, prompt: str = "", **settings: Any
) -> DocumentEvalBatch:
    """Put an evaluation batch of captions alone together.

    Args:
        items: of an `EvalStream` with this prompt; where none is usable, B and T are 0.
        prompt: taken off the captions.
        **settings: `text`, `max_text_tokens` and `bucket` of `collate_documents`.
    """
    samples, skipped, numbers = _first_captions(items, prompt)
    batch = collate_documents(samples, skipped, **settings)
    return {**batch, "captions": [sample.captions for sample in samples], "items": numbers}


def _first_captions(
    items: Sequence[EvalSample | Skipped], prompt: str
) -> tuple[list[Sample], list[Skipped], list[int]]:
    """Return the usable images as samples whose first caption was chosen, the rest, and numbers."""
    usable = [item for item in items if isinstance(item, EvalSample)]
    samples = [
        Sample(
            image=item.image,
            text=item.captions[0],
            image_id=item.image_id,
            key=item.key,
            captions=[caption.removeprefix(prompt) for caption in item.captions],
        )
        for item in usable
    ]
    skipped = [item for item in items if not isinstance(item, EvalSample)]
    return samples, skipped, [item.item for item in usable]
