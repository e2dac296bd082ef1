"""Samples into batches: token ids at a fixed length, ids of images, targets of the caption loss.

Runs in the loader's workers. B: images, C: captions, T: `max_text_tokens`, S: image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch
from torch.utils.data import default_collate

from blip2_train.seeding import stable_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Sample:
    """One image with the caption chosen for it."""

    image: torch.Tensor  # uint8 [3, S, S]; or of cached features, see `data.features`; [0]: none
    text: str  # the prompt and the first of `captions`
    image_id: int  # see `sample_id`
    key: str  # "source/shard/key"
    captions: list[str] = field(default_factory=list)  # cleaned, all of the image, no prompt
    uniform: float = 0.0  # in [0, 1), the sample's own random number
    flip: bool = False  # `image` is still to be flipped
    question: str = ""  # cleaned; `captions` is its answer then
    prompt: str | None = (
        None  # in front of `captions` in `text`, where samples have one of their own
    )


@dataclass(frozen=True)
class EvalSample:
    """One image with all its captions."""

    image: torch.Tensor  # uint8 [3, S, S]; or of cached features, see `data.features`; [0]: none
    captions: list[str]  # cleaned, each behind the prompt; at least one, see `EvalStream`
    image_id: int
    key: str
    item: int  # number within its `EvalStream`
    extra: dict[str, Any] = field(default_factory=dict)  # of the json, as `EvalStream` was asked


class Skipped(TypedDict):
    """A sample that could not be used: a line of skipped.jsonl."""

    shard: str  # "source/shard"
    key: str
    reason: str


class Pictures(TypedDict):
    """The images of a training batch; the trainer's device flips them (`flip_images`)."""

    image: torch.Tensor  # uint8 [B, 3, S, S]; or of cached features, see `data.features`
    flip: NotRequired[torch.Tensor]  # bool [B], images that are still to be flipped


class ImageTextBatch(Pictures):
    """What a stage-1 training step is given."""

    input_ids: torch.Tensor  # int64 [B, T], [CLS] ... [SEP] [PAD] ...
    attention_mask: torch.Tensor  # int64 [B, T], 0 on padding
    image_id: torch.Tensor  # int64 [B], equal for the same image
    text_index: torch.Tensor  # int64 [n], see `text_tokens`
    tokens: list[int]  # B, tokens of each text: n in all
    lm_index: torch.Tensor  # int64 [M], see `lm_targets`
    text: list[str]
    keys: list[str]
    skipped: list[Skipped]  # samples that were replaced in this batch


class EvalBatch(TypedDict):
    """Images with all their captions; B is smaller than asked for where images were unusable."""

    image: torch.Tensor  # uint8 [B, 3, S, S]; or of cached features, see `data.features`
    image_id: torch.Tensor  # int64 [B]
    input_ids: torch.Tensor  # int64 [C, T]
    attention_mask: torch.Tensor  # int64 [C, T]
    caption_image: torch.Tensor  # int64 [C], row of the caption's image in this batch
    text: list[str]  # C captions
    keys: list[str]  # B images
    items: list[int]  # B images, numbers within the `EvalStream`
    skipped: list[Skipped]


def sample_id(source: str, shard: str, key: str, image_id: Any) -> int:
    """Return the int64 that says which samples show one image and are positives of each other.

    Args:
        source: name of the data source; ids of different sources never meet.
        shard: file name of the shard.
        key: the sample's key in the shard.
        image_id: the annotation's id, any JSON value; with None each sample is an image of its own.
    """
    if image_id is None:
        return stable_hash("sample", source, shard, key)
    return stable_hash("image", source, image_id)


def stack_images(images: list[torch.Tensor]) -> torch.Tensor:
    """Return uint8 [B, 3, S, S] of images [3, S, S]; [0, 3, 0, 0] where there are none.

    In a loader worker they are put straight into memory that the trainer shares.
    """
    return default_collate(images) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8)


def stack_pictures(samples: Sequence[Sample]) -> Pictures:
    """Put the images of training samples together; cached features are never flipped."""
    images = stack_images([sample.image for sample in samples])
    if images.ndim == 3:
        return {"image": images}
    flip = torch.tensor([sample.flip for sample in samples], dtype=torch.bool)
    return {"image": images, "flip": flip}


def tokenise(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, max_text_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenise as [CLS] ... [SEP], padded on the right to the maximum, truncated keeping [SEP].

    Always to the maximum, so that ranks can gather texts without agreeing on a length first.

    Returns:
        Token ids and attention mask, each int64 [len(texts), max_text_tokens].
    """
    if not texts:
        empty = torch.empty(0, max_text_tokens, dtype=torch.int64)
        return empty, empty.clone()
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=max_text_tokens)
    return torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"])


def text_tokens(attention_mask: torch.Tensor) -> torch.Tensor:
    """Find the tokens, so that nothing need be computed for padding.

    Args:
        attention_mask: int64 [B, T].

    Returns:
        int64 [n], flat positions b * T + t, ascending.
    """
    return attention_mask.flatten().nonzero().squeeze(1)


def lm_targets(attention_mask: torch.Tensor) -> torch.Tensor:
    """Find the positions that predict a token, those whose next token is not padding.

    Computed here because `nonzero` on a device makes the host wait for it. The loss at flat
    position i has the target `input_ids.flatten()[i + 1]`.

    Args:
        attention_mask: int64 [B, T], right-padded.

    Returns:
        int64 [M], flat positions b * T + t, ascending. Where the text is trimmed to T' columns,
        position i lies at (i // T) * T' + i % T.
    """
    predicts = torch.zeros_like(attention_mask, dtype=torch.bool)
    predicts[:, :-1] = attention_mask[:, 1:] != 0
    return predicts.flatten().nonzero().squeeze(1)


def collate(
    samples: Sequence[Sample],
    skipped: Sequence[Skipped],
    *,
    tokenizer: PreTrainedTokenizerFast,
    max_text_tokens: int,
) -> ImageTextBatch:
    """Put a training batch together.

    Args:
        samples: at least one.
        skipped: samples that were replaced.
        tokenizer: see `load_text_tokenizer`.
        max_text_tokens: [CLS] and [SEP] included.
    """
    texts = [sample.text for sample in samples]
    input_ids, attention_mask = tokenise(texts, tokenizer, max_text_tokens)
    return {
        **stack_pictures(samples),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "image_id": torch.tensor([sample.image_id for sample in samples]),
        "text_index": text_tokens(attention_mask),
        "tokens": attention_mask.sum(dim=1).tolist(),
        "lm_index": lm_targets(attention_mask),
        "text": texts,
        "keys": [sample.key for sample in samples],
        "skipped": list(skipped),
    }


def collate_eval(
    items: Sequence[EvalSample | Skipped],
    *,
    tokenizer: PreTrainedTokenizerFast,
    max_text_tokens: int,
) -> EvalBatch:
    """Put an evaluation batch together; unusable samples are left out and reported.

    Args:
        items: of an `EvalStream`; where none is usable, B and C are 0.
        tokenizer: see `load_text_tokenizer`.
        max_text_tokens: [CLS] and [SEP] included.
    """
    samples = [item for item in items if isinstance(item, EvalSample)]
    texts = [caption for sample in samples for caption in sample.captions]
    input_ids, attention_mask = tokenise(texts, tokenizer, max_text_tokens)
    counts = torch.tensor([len(sample.captions) for sample in samples], dtype=torch.int64)
    return {
        "image": stack_images([sample.image for sample in samples]),
        "image_id": torch.tensor([sample.image_id for sample in samples], dtype=torch.int64),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "caption_image": torch.repeat_interleave(torch.arange(len(samples)), counts),
        "text": texts,
        "keys": [sample.key for sample in samples],
        "items": [sample.item for sample in samples],
        "skipped": [item for item in items if not isinstance(item, EvalSample)],
    }


def longest_text(batch: ImageTextBatch) -> int:
    """Return the number of tokens of the longest caption; for a batch that is still on the CPU."""
    return int(batch["attention_mask"].sum(dim=1).max())


def text_bucket(longest: int, bucket: int, maximum: int) -> int:
    """Return the length that texts are trimmed to: few different lengths, so few compilations.

    Args:
        longest: tokens of the longest caption of the global batch.
        bucket: lengths are multiples of this.
        maximum: never more than this, `max_text_tokens`.
    """
    return min(-(-longest // bucket) * bucket, maximum)
