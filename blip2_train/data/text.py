"""Captions and questions as BLIP-2 reads them, and the Q-Former's BERT tokenizer.

The cleaning rules are the published ones, odd corners included: released weights have seen nothing
else, so a "better" rule would move every caption away from what they know.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blip2_train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")
# Of a caption, per word: a word that never ends keeps a tokenizer busy for minutes. No one else
# notices; to BERT a word of more than 100 characters is [UNK].
_WORD_CHARACTERS = 100

DECODER_START = "[DEC]"
_REQUIRED_TOKENS = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]"}
_VOCABULARY_FILES = ("vocab.txt", "tokenizer.json")
# What a download takes besides the vocabulary; config.json says which model the tokenizer is of.
_SETTINGS_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "config.json",
)


def clean_caption(text: str, max_words: int = 50, prompt: str = "") -> str:
    """Normalise a caption: lower case, no sentence marks, single spaces, at most `max_words` words.

    Args:
        text: the caption as annotated.
        max_words: pieces kept after splitting at single spaces; the prompt is not counted.
        prompt: put in front as it is (end it with a space).

    Returns:
        The prompt and the cleaned caption; the prompt alone where nothing of the caption is left.
    """
    text = _PUNCTUATION.sub(" ", text.lower())
    text = _SPACES.sub(" ", text)
    text = text.rstrip("\n").strip(" ")
    text = " ".join(text.split(" ")[:max_words])
    return prompt + text[: max_words * _WORD_CHARACTERS]


def clean_question(text: str, max_words: int = 50) -> str:
    """Normalise a question: unlike in captions, marks are deleted and inner spaces stay.

    Args:
        text: the question as annotated.
        max_words: pieces kept after splitting at single spaces.

    Returns:
        The cleaned question.
    """
    text = _PUNCTUATION.sub("", text.lower()).rstrip(" ")
    return " ".join(text.split(" ")[:max_words])


def load_text_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerFast:
    """Load the BERT tokenizer of the Q-Former's text side and give it its start token.

    `[DEC]`, the start of a caption to be generated, becomes the bos token. Where the vocabulary
    lacks it, it is appended: its id is the old vocabulary size, as in the released weights.

    Args:
        name_or_path: Hugging Face id (`bert-base-uncased`) or a folder with `vocab.txt` or
            `tokenizer.json`.

    Returns:
        A tokenizer that pads and truncates on the right.

    Raises:
        UserError: it cannot be found, or its special tokens are not BERT's.
    """
    use_one_tokenizer_thread()
    from transformers import BertTokenizer

    folder = tokenizer_folder(
        name_or_path,
        "text.tokenizer",
        _VOCABULARY_FILES,
        "the folder of a BERT tokenizer (`blip2-prepare ... --tokenizer N` writes one beside the "
        "shards), or a hub id such as bert-base-uncased",
    )
    try:
        tokenizer = BertTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(
            f"text tokenizer {str(name_or_path)!r} could not be read: {first_line(error)}"
        ) from error
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "right"
    _check_special_tokens(tokenizer, name_or_path)
    tokenizer.add_special_tokens({"bos_token": DECODER_START})
    return tokenizer


def use_one_tokenizer_thread() -> None:
    """Turn the threads of tokenizers off, before transformers is imported.

    A few dozen short captions gain nothing from them, and they make every fork of a loader worker
    print a warning.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def tokenizer_folder(
    name_or_path: str | Path, key: str, vocabulary_files: Sequence[str], wanted: str
) -> Path:
    """Return the local folder of a tokenizer; a hub id is downloaded, or taken from the cache.

    `from_pretrained` is given a folder that was looked at, never a name: where it finds no
    vocabulary it answers with an empty one, after two minutes of retries.

    Args:
        name_or_path: a folder, else a hub id, with "@revision" where wanted.
        key: of the configuration that names it.
        vocabulary_files: it must hold one of them.
        wanted: what the user should give, for messages.

    Raises:
        UserError: there is no such tokenizer, or it cannot be reached.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        if folder.is_absolute() or len(folder.parts) > 2:
            raise UserError(f"{key}={folder}: there is no such folder; give {wanted}.")
        from huggingface_hub import snapshot_download

        files = [*vocabulary_files, *_SETTINGS_FILES]
        repository, _, revision = folder.as_posix().partition("@")
        try:
            folder = Path(
                snapshot_download(repository, revision=revision or None, allow_patterns=files)
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"{key}={name_or_path} is no folder, and the Hugging Face hub does not give it: "
                f"{first_line(error)} Give {wanted} with network access or a filled cache."
            ) from error
    if not any((folder / name).is_file() for name in vocabulary_files):
        names = ", ".join(vocabulary_files[:-1]) + f" nor {vocabulary_files[-1]}"
        raise UserError(f"{key}={name_or_path}: {folder} holds neither {names}; give {wanted}.")
    return folder


def _check_special_tokens(tokenizer: PreTrainedTokenizerFast, name_or_path: str | Path) -> None:
    """Check that the tokenizer is one the Q-Former can be used with, all problems at once.

    Raises:
        UserError: every rule that is broken.
    """
    vocabulary = tokenizer.get_vocab()
    problems = []
    for role, token in _REQUIRED_TOKENS.items():
        actual = getattr(tokenizer, f"{role}_token")
        if actual != token:
            problems.append(f"its {role} token is {actual!r}, not {token!r}")
        elif token not in vocabulary:
            problems.append(f"{token} is not in its vocabulary")
    if not problems:
        if tokenizer.pad_token_id != 0:
            problems.append(f"[PAD] has id {tokenizer.pad_token_id}, not 0")
        ids = tokenizer("")["input_ids"]
        if ids != [tokenizer.cls_token_id, tokenizer.sep_token_id]:
            problems.append(f"it encodes the empty text as {ids}, not as [CLS] [SEP]")
        if len(vocabulary) <= len(tokenizer.all_special_tokens):
            problems.append("its vocabulary holds special tokens only")
        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            problems.append("its ids are not 0 .. V-1, so the embedding table has no defined size")
    if problems:
        raise UserError(
            f"text tokenizer {str(name_or_path)!r} is not a BERT tokenizer: "
            + "; ".join(problems)
            + "."
        )


def first_line(error: Exception) -> str:
    """Return the first line of an error message: the hub's run over many."""
    return (str(error).splitlines() or [type(error).__name__])[0]
