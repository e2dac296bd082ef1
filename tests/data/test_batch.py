"""Proven here: what a batch holds, and that its ids and targets are what they say."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from blip2_train.data.batch import (
    EvalSample,
    Sample,
    collate,
    collate_eval,
    lm_targets,
    longest_text,
    sample_id,
    stable_hash,
    stack_images,
    text_bucket,
    tokenise,
)
from blip2_train.data.text import load_text_tokenizer

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dog", "on", "grass"]
CLS, SEP, A, RED, DOG, ON, GRASS = 2, 3, 5, 6, 7, 8, 9
T = 6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return load_text_tokenizer(folder)


def image(value: int) -> torch.Tensor:
    return torch.full((3, 2, 2), value, dtype=torch.uint8)


def test_texts_are_padded_to_the_maximum_and_cut_before_sep(tokenizer):
    ids, mask = tokenise(["a dog", "a red dog on grass", ""], tokenizer, T)
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.tolist() == [
        [CLS, A, DOG, SEP, 0, 0],
        [CLS, A, RED, DOG, ON, SEP],
        [CLS, SEP, 0, 0, 0, 0],
    ]
    assert torch.equal(mask, (ids != 0).long())


def test_a_batch_holds_its_samples_in_order(tokenizer):
    samples = [
        Sample(image(i), text, 10 - i, f"s/t/{i}", flip=bool(i))
        for i, text in enumerate(["a", "a dog"])
    ]
    skipped = [{"shard": "s/t", "key": "9", "reason": "bad"}]
    batch = collate(samples, skipped, tokenizer=tokenizer, max_text_tokens=T)
    assert batch["image"].shape == (2, 3, 2, 2) and batch["image"].dtype == torch.uint8
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 1]
    assert batch["flip"].tolist() == [False, True] and batch["flip"].dtype == torch.bool
    assert batch["image_id"].tolist() == [10, 9] and batch["image_id"].dtype == torch.int64
    assert batch["text"] == ["a", "a dog"]
    assert batch["keys"] == ["s/t/0", "s/t/1"]
    assert batch["skipped"] == skipped
    assert torch.equal(batch["lm_index"], lm_targets(batch["attention_mask"]))
    assert longest_text(batch) == 4


def shared_at_once(numbers: list[int]) -> tuple[bool, torch.Tensor]:
    images = stack_images([image(n) for n in numbers])
    return images.is_shared(), images


def test_a_worker_puts_images_straight_into_shared_memory():
    (shared, images), *_ = DataLoader(
        range(4), batch_size=4, num_workers=1, collate_fn=shared_at_once
    )
    assert shared and images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


@given(
    st.integers(1, 7).flatmap(
        lambda length: st.lists(st.integers(0, length), min_size=1, max_size=5).map(
            lambda lengths: (length, lengths)
        )
    )
)
def test_lm_targets_are_all_tokens_but_the_first(case):
    length, lengths = case
    mask = torch.tensor([[int(t < n) for t in range(length)] for n in lengths])
    index = lm_targets(mask)
    assert index.dtype == torch.int64
    naive = [b * length + t for b, n in enumerate(lengths) for t in range(length) if t + 1 < n]
    assert index.tolist() == naive


def test_lm_targets_find_the_tokens_and_survive_trimming(tokenizer):
    ids, mask = tokenise(["a dog", "a red dog"], tokenizer, T)
    index = lm_targets(mask)
    expected = [A, DOG, SEP, A, RED, DOG, SEP]
    assert ids.flatten()[index + 1].tolist() == expected
    trimmed = ids[:, :5]
    position = index // T * 5 + index % T
    assert trimmed.flatten()[position + 1].tolist() == expected


def test_the_same_image_id_is_the_same_image_whatever_the_shard():
    assert sample_id("coco", "a.tar", "1", 42) == sample_id("coco", "b.tar", "2", 42)
    assert sample_id("coco", "a.tar", "1", 42) != sample_id("vg", "a.tar", "1", 42)
    assert sample_id("coco", "a.tar", "1", 42) != sample_id("coco", "a.tar", "1", "42")
    assert sample_id("coco", "a.tar", "1", 0) != sample_id("coco", "a.tar", "1", None)
    assert sample_id("coco", "a.tar", "1", "x") == sample_id("coco", "b.tar", "1", "x")
    assert sample_id("coco", "a.tar", "1", {"b": 1, "a": [2]}) == sample_id(
        "coco", "a.tar", "1", {"a": [2], "b": 1}
    )


def test_without_an_image_id_each_sample_is_an_image_of_its_own():
    places = [("s", "a", "1"), ("s", "a", "2"), ("s", "b", "1"), ("t", "a", "1"), ("s", "a1", "")]
    assert len({sample_id(*place, None) for place in places}) == len(places)


@given(st.lists(st.one_of(st.integers(), st.text(), st.none()), max_size=4))
def test_hashes_fit_int64(parts):
    assert torch.tensor(stable_hash(*parts), dtype=torch.int64).item() == stable_hash(*parts)


def test_hashes_are_the_same_in_every_process():
    program = (
        "import json; from blip2_train.data.batch import sample_id, stable_hash;"
        "print(json.dumps([sample_id('s', 't', 'k', 'x'), stable_hash(1, 'a')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [sample_id("s", "t", "k", "x"), stable_hash(1, "a")]
    assert stable_hash(1, "a") == HASH_FOR_EVER


HASH_FOR_EVER = -7007523747473110175  # a resumed run draws the crops of the run it continues


def test_an_eval_batch_holds_all_captions(tokenizer):
    skipped = {"shard": "s/t", "key": "1", "reason": "bad"}
    items = [
        EvalSample(image(0), ["a dog", "a red dog"], 5, "s/t/0", 0),
        skipped,
        EvalSample(image(2), ["a"], 7, "s/t/2", 2),
        EvalSample(image(3), ["grass", "on grass", "a"], 5, "s/t/3", 3),
    ]
    batch = collate_eval(items, tokenizer=tokenizer, max_text_tokens=T)
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 2, 3]
    assert batch["image_id"].tolist() == [5, 7, 5]
    assert batch["items"] == [0, 2, 3]
    assert batch["text"] == ["a dog", "a red dog", "a", "grass", "on grass", "a"]
    assert batch["caption_image"].tolist() == [0, 0, 1, 2, 2, 2]
    assert batch["keys"] == ["s/t/0", "s/t/2", "s/t/3"]
    assert batch["skipped"] == [skipped]
    ids, mask = tokenise(batch["text"], tokenizer, T)
    assert torch.equal(batch["input_ids"], ids) and torch.equal(batch["attention_mask"], mask)


def test_an_eval_batch_may_be_empty(tokenizer):
    skipped = {"shard": "s/t", "key": "1", "reason": "bad"}
    batch = collate_eval([skipped], tokenizer=tokenizer, max_text_tokens=T)
    assert len(batch["image"]) == len(batch["image_id"]) == len(batch["caption_image"]) == 0
    assert batch["input_ids"].shape == (0, T) and batch["input_ids"].dtype == torch.int64
    assert batch["skipped"] == [skipped]


@pytest.mark.parametrize(
    ("longest", "bucket", "maximum", "length"),
    [(1, 8, 32, 8), (8, 8, 32, 8), (9, 8, 32, 16), (31, 8, 32, 32), (30, 8, 30, 30), (5, 1, 9, 5)],
)
def test_texts_are_trimmed_to_a_bucket(longest, bucket, maximum, length):
    assert text_bucket(longest, bucket, maximum) == length
