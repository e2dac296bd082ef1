"""Proven here: the cleaning rules at their corners, and that only a BERT tokenizer is accepted.

The published examples are in tests/parity/test_processing.py.
"""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip2_train.data.text import clean_caption, clean_question, load_text_tokenizer
from blip2_train.errors import UserError

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dog", "run", "##s", "."]


def write_vocabulary(folder: Path, tokens: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return folder


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A dog.", "a dog"),
        ("a.b", "a b"),
        ("a . b", "a b"),
        ("a\t\tb", "a b"),
        ("a\tb", "a\tb"),  # one whitespace character stays what it is
        ("\n a \n", "a"),
        ("\ta\t", "\ta\t"),  # only spaces and newlines are stripped
        ("!!!", ""),
        ("what? yes, no-one's", "what? yes, no-one's"),
    ],
)
def test_captions_lose_sentence_marks(text, cleaned):
    assert clean_caption(text) == cleaned


def test_words_of_the_prompt_are_not_counted():
    assert clean_caption("one two three", max_words=2, prompt="a photo of ") == "a photo of one two"


def test_questions_lose_marks_without_a_space_and_keep_inner_spaces():
    assert clean_question(" What's  in the box: x.y?  ", max_words=5) == " what's  in the"
    assert clean_question("x.y? ") == "xy?"


@given(st.text(max_size=80), st.integers(1, 6))
def test_a_cleaned_caption_is_short_and_stays_the_same(text, max_words):
    cleaned = clean_caption(text, max_words)
    assert len(cleaned.split(" ")) <= max_words
    assert not set(cleaned) & set('.!"()*#:;~')
    assert clean_caption(cleaned, max_words) == cleaned


def test_the_start_token_is_appended_once(tmp_path):
    tokenizer = load_text_tokenizer(write_vocabulary(tmp_path / "bert", VOCABULARY))
    assert tokenizer.bos_token == "[DEC]"
    assert tokenizer.bos_token_id == len(VOCABULARY)
    assert len(tokenizer) == len(VOCABULARY) + 1

    tokenizer.save_pretrained(tmp_path / "again")
    again = load_text_tokenizer(tmp_path / "again")
    assert again.bos_token_id == len(VOCABULARY)
    assert len(again) == len(VOCABULARY) + 1


def test_a_start_token_of_the_vocabulary_keeps_its_id(tmp_path):
    tokenizer = load_text_tokenizer(write_vocabulary(tmp_path, [*VOCABULARY, "[DEC]", "cat"]))
    assert tokenizer.bos_token_id == len(VOCABULARY)
    assert len(tokenizer) == len(VOCABULARY) + 2


def test_text_is_lower_cased_and_padded_on_the_right(tmp_path):
    tokenizer = load_text_tokenizer(write_vocabulary(tmp_path, VOCABULARY))
    encoded = tokenizer("Red DOGS", padding="max_length", truncation=True, max_length=7)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens == ["[CLS]", "red", "dog", "##s", "[SEP]", "[PAD]", "[PAD]"]
    assert encoded["attention_mask"] == [1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        (VOCABULARY[1:], r"\[PAD\] has id"),
        (["a", *VOCABULARY], r"\[PAD\] has id 1, not 0"),
        (VOCABULARY[:5], "special tokens only"),
    ],
)
def test_a_vocabulary_that_is_not_berts_is_refused(tmp_path, tokens, problem):
    with pytest.raises(UserError, match=problem):
        load_text_tokenizer(write_vocabulary(tmp_path, tokens))


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="not a BERT tokenizer"):
        load_text_tokenizer(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_text_tokenizer(tmp_path / "nothing")


def test_a_folder_without_a_vocabulary_is_named(tmp_path):
    with pytest.raises(UserError, match=r"neither vocab.txt nor tokenizer.json"):
        load_text_tokenizer(tmp_path)


def test_without_the_hub_the_ways_out_are_named(tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise FileNotFoundError("no network\nlong explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no network .*folder of a BERT tokenizer") as caught:
        load_text_tokenizer("bert-base-uncased")
    assert "\n" not in str(caught.value)
