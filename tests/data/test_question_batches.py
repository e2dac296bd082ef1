"""Questions in training batches: what is drawn, and what the two models are given of it.

- of n questions each is drawn once in n epochs, answers as often as annotators gave them; the same
  on any number of ranks and loader workers
- samples without a question that has an answer are skipped and named, captions are never asked for
- the answer alone is learned; of a question that is too long the beginning is cut, never the answer
- the Q-Former's word pieces; evaluation batches
"""

import itertools
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import question_shards
from torch.utils.data import DataLoader

from blip2_train.data.batch import EvalSample, Sample
from blip2_train.data.index import write_index
from blip2_train.data.language import load_language_tokenizer
from blip2_train.data.language_batch import collate_causal, collate_seq2seq
from blip2_train.data.pool import Reading
from blip2_train.data.question_batch import (
    answered,
    ask,
    asked_sample,
    collate_eval_questions,
    collate_questions,
)
from blip2_train.data.shards import write_shard
from blip2_train.data.source import Source, open_source
from blip2_train.data.stream import EvalStream, TrainStream
from blip2_train.data.text import load_text_tokenizer
from blip2_train.data.transforms import EvalTransform

PROMPT = "Question: {} Answer:"


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return question_shards(tmp_path_factory.mktemp("asked") / "synthetic", samples=30)


def texts_and_skipped(samples: list[Sample], skipped: list[Any]) -> Any:
    return [[s.key, s.question, s.captions, s.text, s.prompt] for s in samples], skipped


def stream(source: Source, batch: int, **settings: Any) -> TrainStream:
    common: dict[str, Any] = {"contrastive_batch": batch, "seed": 1, "shuffle_window": 1}
    return TrainStream(
        [source], {source.name: None}, texts_and_skipped,
        text="questions", prompt=PROMPT, **(common | settings),
    )  # fmt: skip


def made_up(folder: Path, metas: list[dict[str, Any]], jpeg: bytes = b"x") -> Source:
    folder.mkdir()
    samples = [{"__key__": f"k{n}", "jpg": jpeg, "json": meta} for n, meta in enumerate(metas)]
    write_index(folder, [write_shard(folder / "train-000000.tar", samples)])
    return open_source("made_up", folder, "train")


def question(number: int, text: str, *answers: str) -> dict[str, Any]:
    return {"question_id": number, "question": text, "answers": list(answers)}


def test_every_question_comes_once_in_so_many_epochs(asked: Path) -> None:
    source = open_source("s", asked, "train")
    seen: dict[str, list[str]] = {}
    for rows, skipped in itertools.islice(stream(source, 30), 10):  # an epoch each
        assert skipped == [] and len({key for key, *_ in rows}) == 30
        for key, text, answers, whole, prompt in rows:
            seen.setdefault(key, []).append(text)
            assert len(answers) == 1 and prompt == f"Question: {text} Answer:"
            assert whole == f"{prompt} {answers[0]}"
    for texts in seen.values():
        assert len(set(texts[:5])) == len(set(texts[5:])) == 5
    orders = Counter(tuple(t.split()[0] for t in texts[:5]) for texts in seen.values())
    assert len(orders) > 5  # not all alike
    assert any(texts[:5] != texts[5:] for texts in seen.values())


def test_neither_ranks_nor_workers_matter(asked: Path) -> None:
    source = open_source("s", asked, "train")
    whole = [row for rows, _ in itertools.islice(stream(source, 12), 6) for row in rows]
    for world, workers in ((2, 0), (3, 2)):
        parts = [
            DataLoader(
                stream(source, 12, rank=rank, world=world), batch_size=None, num_workers=workers
            )
            for rank in range(world)
        ]
        found = [list(itertools.islice(part, 6)) for part in parts]
        assert [row for n in range(6) for rank in found for row in rank[n][0]] == whole


def test_answers_are_drawn_as_often_as_they_were_given(tmp_path: Path) -> None:
    asked_once = question(1, "is it?", *["yes"] * 7, *["no"] * 2, " ", "maybe so")
    source = made_up(tmp_path / "a", [{"questions": [asked_once]}])
    rows = [row for rows, _ in itertools.islice(stream(source, 100), 10) for row in rows]
    drawn = Counter(answers[0] for _, _, answers, *_ in rows)
    assert set(drawn) == {"yes", "no", "maybe so"}
    assert drawn["yes"] == pytest.approx(700, abs=60) and drawn["no"] == pytest.approx(200, abs=50)


def test_what_cannot_be_learned_from_is_skipped_and_named(tmp_path: Path) -> None:
    source = made_up(
        tmp_path / "a",
        [
            {"captions": ["a cat"]},
            {"captions": ["a cat"], "questions": [question(1, "é {}?", "ja")]},
            {"questions": [question(2, "who?"), question(3, "who?", "", " ")]},
            {"questions": [question(4, " .", "x")]},
            {"questions": 3},
        ],
    )
    rows, skipped = next(iter(stream(source, 5)))
    assert {(key.rpartition("/")[2], text, whole) for key, text, _, whole, _ in rows} == {
        ("k1", "é {}?", "Question: é {}? Answer: ja")  # braces of a question are no hole
    }
    assert {line["key"]: line["reason"] for line in skipped} == {
        "k0": "no question with an answer",
        "k2": "no question with an answer",
        "k3": "no question with an answer",
        "k4": "questions are not a list of objects",
    }


def test_questions_are_cleaned_and_answers_are_not() -> None:
    found = answered([question(1, 'What is "This"?  ', " A Cat. ", "")], 50)
    assert found == [("what is this?", ["A Cat."])]
    assert answered([question(1, "one two three", "x")], 2) == [("one two", ["x"])]
    assert ask(PROMPT, "{} what?") == "Question: {} what? Answer:"


# -- what the models are given ---------------------------------------------------------------------


def sample(text: str, answer: str) -> Sample:
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    return asked_sample(text, answer, PROMPT, image=image, image_id=1, key="s/t/k")


def test_the_answer_alone_is_learned(asked: Path) -> None:
    text = load_language_tokenizer(asked / "tokenizer")
    samples = [
        sample("what colour is the ring?", "dark blue"), sample("where is the red ring?", "centre")
    ]  # fmt: skip
    settings: dict[str, Any] = {"text": text, "max_text_tokens": 40, "prompt": PROMPT, "bucket": 4}
    batch = collate_causal(samples, [], **settings)
    rows = batch["lm_index"] // batch["input_ids"].shape[1]
    for row, one in enumerate(samples):
        learned = batch["lm_targets"][rows == row].tolist()
        assert learned == [*text.words([one.captions[0]])[0], text.end_id]
        ids = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
        assert ids == [*text.start, *text.words([one.text])[0], text.end_id]
    seq2seq = collate_seq2seq(samples, [], prefix="none", **settings)
    for row, one in enumerate(samples):
        asked_ids = seq2seq["input_ids"][row][seq2seq["attention_mask"][row] == 1].tolist()
        assert asked_ids == [*text.words([one.prompt or ""])[0], text.encoder_end_id]
        said = seq2seq["target_ids"][row][seq2seq["target_mask"][row] == 1].tolist()
        assert said == [*text.words([one.captions[0]])[0], text.end_id]


def test_a_long_question_loses_its_beginning(asked: Path) -> None:
    text = load_language_tokenizer(asked / "tokenizer")
    long = sample("is the ring red " * 20 + "or blue?", "blue")
    settings: dict[str, Any] = {"text": text, "max_text_tokens": 16, "prompt": PROMPT, "bucket": 4}
    batch = collate_causal([long, sample("what?", "red")], [], **settings)
    ids = batch["input_ids"][0].tolist()
    assert len(ids) == 16 and ids[: len(text.start)] == text.start
    assert ids[len(text.start) :] == [*text.words([long.text])[0], text.end_id][-15:]
    first = batch["lm_targets"][batch["lm_index"] < 16].tolist()
    assert first == [*text.words(["blue"])[0], text.end_id]
    encoder = collate_seq2seq([long], [], prefix="none", **settings)["input_ids"][0].tolist()
    assert encoder == [*text.words([long.prompt or ""])[0], text.encoder_end_id][-16:]
    # an answer that fills everything still is an answer
    words = collate_causal([sample("what?", "red " * 40)], [], **settings)
    assert len(words["lm_targets"]) == 15 and words["lm_targets"][-1] == text.end_id


def test_what_the_q_former_reads(asked: Path) -> None:
    tokenizer = load_text_tokenizer(asked / "tokenizer")
    texts = ["what colour is the ring?", "what?", "where is the large red ring at the top?" * 3]
    batch = collate_questions(
        [sample(text, "x") for text in texts], [],
        collate=lambda samples, skipped: {"rest": len(samples)},
        tokenizer=tokenizer, max_question_tokens=18, bucket=4,
    )  # fmt: skip
    ids, mask = batch["question_ids"], batch["question_mask"]
    assert batch["rest"] == 3 and ids.shape == mask.shape == (3, 18)
    for row, text in enumerate(texts[:2]):
        assert ids[row][mask[row] == 1].tolist() == tokenizer(text)["input_ids"]
    last = ids[2].tolist()
    assert last[0] == tokenizer.cls_token_id and last[-1] == tokenizer.sep_token_id
    short = collate_questions(
        [sample("what?", "x")], [],
        collate=lambda *_: {}, tokenizer=tokenizer, max_question_tokens=18, bucket=4,
    )  # fmt: skip
    assert short["question_ids"].shape == (1, 4)  # [CLS] what ? [SEP]


def test_evaluation_batches(asked: Path) -> None:
    tokenizer = load_text_tokenizer(asked / "tokenizer")
    text = load_language_tokenizer(asked / "tokenizer")
    settings: dict[str, Any] = {"text": text, "max_text_tokens": 40, "prompt": PROMPT, "bucket": 4}
    collate = partial(
        collate_eval_questions,
        collate=partial(
            collate_questions,
            collate=partial(collate_causal, **settings),
            tokenizer=tokenizer,
            max_question_tokens=20,
            bucket=4,
        ),
        prompt=PROMPT,
        max_words=50,
    )
    images = EvalStream(
        open_source("v", asked, "val"),
        EvalTransform(16),
        reading=Reading(need_captions=False),
        extra=("questions",),
    )
    items = [images[number] for number in range(len(images))]
    batch = collate(items)
    assert len(batch["questions"]) == 6 and batch["items"] == list(range(6))
    assert len({question.split()[0] for question in batch["questions"]}) > 1  # not all colours
    assert batch["image"].shape == (6, 3, 16, 16) and len(batch["question_ids"]) == 6
    none = EvalSample(torch.zeros(3, 16, 16, dtype=torch.uint8), [], 1, "v/val-0.tar/k", 9)
    bad = EvalSample(none.image, [], 2, "v/val-0.tar/m", 10, {"questions": [{}]})
    several = {"questions": [question(1, "is it?", "no", "yes", "yes")]}
    good = EvalSample(none.image, [], 2, "v/val-0.tar/n", 11, several)
    batch = collate([none, bad, good])
    assert batch["items"] == [11] and batch["captions"] == [["yes", "no"]]
    assert batch["text"] == ["Question: is it? Answer: yes"]
    assert batch["skipped"] == [
        {"shard": "v/val-0.tar", "key": "k", "reason": "no question with an answer"},
        {"shard": "v/val-0.tar", "key": "m", "reason": "a question has no question_id"},
    ]
    assert collate([none])["keys"] == []


def test_images_are_not_decoded_where_text_alone_is_wanted(tmp_path: Path) -> None:
    source = made_up(tmp_path / "a", [{"questions": [question(1, "who?", "me")]}], b"no image")
    settings: dict[str, Any] = {
        "reading": Reading(need_captions=False), "extra": ("questions", "image_id")
    }  # fmt: skip
    images = EvalStream(source, EvalTransform(16), **settings)
    assert isinstance(images[0], dict)
    item = images.undecoded()[0]
    assert isinstance(item, EvalSample) and item.extra["questions"][0]["question"] == "who?"
    assert images.source is source
