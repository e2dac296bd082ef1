"""Train a lower-case BERT WordPiece on captions, saved as a Hugging Face tokenizer folder."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from blip2_train.data.text import clean_caption
from blip2_train.errors import UserError

if TYPE_CHECKING:
    from tokenizers import BertWordPieceTokenizer

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # ids 0 to 4
MAX_LETTERS = 1000  # rarer ones are unknown; web text has thousands of symbols


def train_tokenizer(folder: Path, captions: Iterable[str], vocab_size: int) -> int:
    """Train a tokenizer on captions, cleaned as training cleans them, and save it.

    The same captions always give the same files. `folder` is replaced; it holds what
    `transformers.AutoTokenizer.from_pretrained` needs. The files are written here rather than by
    transformers, which would import torch.

    Args:
        folder: where to save.
        captions: the text to train on.
        vocab_size: entries wanted, special tokens included.

    Returns:
        The entries there are: fewer than `vocab_size` where the captions do not have as many.

    Raises:
        UserError: `vocab_size` has no room for the letters of the captions.
    """
    from tokenizers import BertWordPieceTokenizer

    texts = [clean_caption(caption) for caption in captions]
    trainee = BertWordPieceTokenizer(lowercase=True)
    letters, inner_letters = _letters(trainee, texts)
    trainee.train_from_iterator(
        texts,
        vocab_size=vocab_size,
        min_frequency=2,
        # The trainer numbers letters inside words in the order of a randomly seeded hash table,
        # and these numbers break ties later. Listed here, they are numbered in this order.
        special_tokens=SPECIAL_TOKENS + [f"##{letter}" for letter in inner_letters],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    # A new one: to the trainee those letters are special tokens for ever.
    tokenizer = BertWordPieceTokenizer(vocab=trainee.get_vocab(), lowercase=True)
    size = tokenizer.get_vocab_size()
    if size > vocab_size:
        raise UserError(f"--tokenizer {vocab_size} is too small: letters alone need {size} entries")
    temp = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    tokenizer.save(str(temp / "tokenizer.json"))
    tokenizer.save_model(str(temp))  # vocab.txt
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "model_max_length": 512,
        **{f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS},
    }
    (temp / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    temp.rename(folder)
    return size


def _letters(
    tokenizer: BertWordPieceTokenizer, texts: Iterable[str]
) -> tuple[list[str], list[str]]:
    """The most frequent letters of the texts, and those of them that stand inside a word."""
    words = Counter(
        word for text in texts for word in tokenizer.normalizer.normalize_str(text).split()
    )
    counts: Counter[str] = Counter()
    inner: set[str] = set()
    for word, count in words.items():
        for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(word):
            inner.update(piece[1:])
            for letter in piece:
                counts[letter] += count
    letters = sorted(sorted(counts, key=lambda letter: (-counts[letter], letter))[:MAX_LETTERS])
    return letters, [letter for letter in letters if letter in inner]
