"""The language model's tokenizer: captions and prompts into token ids, and generated ids into text.

`text.py` holds the Q-Former's; `language_batch.py` makes batches of these ids.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blip2_train.data.text import first_line, tokenizer_folder, use_one_tokenizer_thread
from blip2_train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True)
class LanguageTokenizer:
    """A language model's tokenizer, and the tokens that stand around a text."""

    tokenizer: PreTrainedTokenizerFast
    start_id: int | None  # OPT: </s>, Llama: <s>, BERT: [CLS]; None: texts have no start token
    end_id: int  # ends every caption
    pad_id: int  # fills rows up; what is padding is said by the masks, never by this id

    @property
    def start(self) -> list[int]:
        """What a text begins with: one token or none."""
        return [] if self.start_id is None else [self.start_id]

    @property
    def encoder_end_id(self) -> int:
        """What ends the text of an encoder: the eos token, whatever ends captions."""
        own = self.tokenizer.eos_token_id
        return self.end_id if own is None else own

    def words(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts, with nothing added.

        A line break becomes a space: where it ends captions, it would end this one too early.
        """
        if not texts:
            return []
        lines = [text.replace("\n", " ") for text in texts]
        return self.tokenizer(lines, add_special_tokens=False)["input_ids"]


def load_language_tokenizer(
    name_or_path: str | Path, end: str | None = None, group: str = "language_model"
) -> LanguageTokenizer:
    r"""Load the tokenizer of a language model.

    The start token is the bos or cls token that the tokenizer itself puts in front of a text, if it
    does. The padding token is its own, else its eos token.

    Args:
        name_or_path: Hugging Face id (`facebook/opt-2.7b`) or a folder with the tokenizer's files.
        end: text that ends a caption and is one token, `"\n"` for OPT as in the reference; None:
            the eos token, else the sep token.
        group: of the configuration that names both, for messages.

    Raises:
        UserError: it cannot be found or read, `end` is not one token, or there is no end token.
    """
    use_one_tokenizer_thread()
    from transformers import AutoTokenizer

    folder = tokenizer_folder(
        name_or_path,
        f"{group}.tokenizer",
        _VOCABULARY_FILES,
        "a folder with the files of a tokenizer (`blip2-prepare ... --tokenizer N` writes one "
        "beside the shards, and stage `lm` one with its model), or a hub id such as "
        "facebook/opt-2.7b",
    )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # of every kind: a file may hold anything
        raise UserError(
            f"{group}.tokenizer={name_or_path} could not be read: {first_line(error)}"
        ) from error
    first = tokenizer("")["input_ids"][:1]
    starts = bool(first) and first[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id)
    end_id = _end_id(tokenizer, name_or_path, end, group)
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, end_id)
    return LanguageTokenizer(
        tokenizer,
        start_id=first[0] if starts else None,
        end_id=end_id,
        pad_id=next(token for token in pads if token is not None),
    )


def _end_id(tokenizer: Any, name_or_path: str | Path, end: str | None, group: str) -> int:
    """Return the id of `end`, or of the tokenizer's own end token.

    Raises:
        UserError: `end` is not one token, or there is none.
    """
    if end is None:
        for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
            if token is not None:
                return token
        raise UserError(
            f"{group}.end=null, but {group}.tokenizer={name_or_path} has neither an "
            "eos nor a sep token; give a text that ends captions and is one token, such as "
            '"\\n".'
        )
    ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    unknown = ids == [tokenizer.unk_token_id] and end != tokenizer.unk_token
    if len(ids) != 1 or unknown:
        found = "unknown to" if unknown else f"{len(ids)} tokens of"
        raise UserError(
            f"{group}.end={end!r} is {found} {group}.tokenizer={name_or_path}; give "
            "a text that is exactly one token, or null for the tokenizer's own end token."
        )
    return ids[0]


def encode(texts: Sequence[str], text: LanguageTokenizer, max_text_tokens: int) -> list[list[int]]:
    """Tokenise as [start] words [end]; of a text that is too long words are cut, never the end.

    By hand, because tokenizers do not agree on who adds what, and cut the end token with the rest.

    Args:
        texts: any number.
        text: see `load_language_tokenizer`.
        max_text_tokens: start and end included, at least 2.
    """
    room = max_text_tokens - len(text.start) - 1
    assert room >= 0, "no room for start and end token"
    return [[*text.start, *words[:room], text.end_id] for words in text.words(texts)]


def encode_prompts(
    prompts: Sequence[str], text: LanguageTokenizer, encoder: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenise what stands between the image and the caption to be generated.

    Spaces at a prompt's end are dropped: they belong to the token that follows.

    Args:
        prompts: B of them, not cut.
        text: see `load_language_tokenizer`.
        encoder: for an encoder: words and eos token, padded on the right. Else start token and
            words, padded on the *left*, so that every row goes on at the same column.

    Returns:
        Token ids and attention mask, each int64 [B, P]; without start token and words P is 0.
    """
    words = text.words([prompt.strip() if encoder else prompt.rstrip() for prompt in prompts])
    if encoder:
        rows = [[*row, text.encoder_end_id] for row in words]
    else:
        rows = [[*text.start, *row] for row in words]
    return pad_rows(rows, text.pad_id, max(map(len, rows), default=0), left=not encoder)


def decode(ids: torch.Tensor, text: LanguageTokenizer) -> list[str]:
    """Return the captions that were generated.

    Args:
        ids: int64 [B, T], from the first token after the prompt on; a row counts up to its first
            end, eos or padding token.
        text: see `load_language_tokenizer`.

    Returns:
        B texts without special tokens and outer spaces.
    """
    stops = {text.end_id, text.pad_id, text.tokenizer.eos_token_id}
    rows = [list(itertools.takewhile(lambda id: id not in stops, row)) for row in ids.tolist()]
    decoded = (text.tokenizer.decode(row, skip_special_tokens=True) for row in rows)
    return [str(caption).strip() for caption in decoded]


def pad_rows(
    rows: Sequence[Sequence[int]], pad_id: int, length: int, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put rows of token ids together, padded on the right, or on the left.

    Returns:
        Token ids and mask, each int64 [len(rows), length].
    """
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(len(row))
        ids[b, place] = torch.tensor(row, dtype=torch.int64)
        mask[b, place] = 1
    return ids, mask


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast | LanguageTokenizer) -> str:
    """Return a sha256 by which a resumed run knows its tokenizer again.

    Of a BERT tokenizer it is that of the vocabulary; language models' differ in more than that, so
    theirs covers all that the library saves, and the tokens around a text.
    """
    if isinstance(tokenizer, LanguageTokenizer):
        inner: Any = tokenizer.tokenizer
        content = repr((tokenizer.start_id, tokenizer.end_id, inner.backend_tokenizer.to_str()))
    else:
        content = repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()
