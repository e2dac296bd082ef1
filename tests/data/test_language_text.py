"""Proven here, with tokenizers of OPT's, T5's and BERT's make:

- which tokens stand around a text, and that cutting it never takes the end token
- which tokens are targets, with and without a prompt
- that a caption is split by its sample's own number, whatever the ranks and workers
- what a document of captions holds
- prompts are padded on the side where generation needs it, and generated ids become text
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import pickle
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.utils.data import DataLoader

from blip2_train.data.batch import EvalSample, Sample
from blip2_train.data.index import write_index
from blip2_train.data.language import (
    LanguageTokenizer,
    decode,
    encode,
    encode_prompts,
    load_language_tokenizer,
    tokenizer_digest,
)
from blip2_train.data.language_batch import (
    collate_causal,
    collate_documents,
    collate_eval_causal,
    collate_eval_documents,
    collate_eval_seq2seq,
    collate_seq2seq,
)
from blip2_train.data.shards import write_shard
from blip2_train.data.source import open_source
from blip2_train.data.stream import EvalStream, TrainStream
from blip2_train.data.tokenizer import train_tokenizer
from blip2_train.errors import UserError

WORDS = ["a", "photo", "of", "red", "dog", "on", "grass"]
LONG = "a red dog on grass"


def byte_pairs(folder: Path, special: list[str], **settings: object) -> Path:
    """A GPT-2 tokenizer as published for OPT: a byte-level BPE in which " dog" is one token."""
    vocabulary = {token: i for i, token in enumerate(special)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    merges = []
    for word in WORDS:
        for end, letter in enumerate(word):
            start = "Ġ" + word[:end]  # as GPT-2 spells a space
            if start + letter not in vocabulary:
                merges.append((start, letter))
                vocabulary[start + letter] = len(vocabulary)
    folder.mkdir()
    models.BPE(vocabulary, merges).save(str(folder))
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def unigrams(folder: Path) -> Path:
    """A T5 tokenizer: SentencePiece unigrams, texts end with </s> and begin with nothing."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -4.0) for word in WORDS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 0,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of tokenizers: opt, gpt2, t5, wordpiece."""
    folder = tmp_path_factory.mktemp("tokenizers")
    opt = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    byte_pairs(folder / "opt", ["<s>", "<pad>", "</s>", "<unk>"], add_bos_token=True, **opt)
    ends = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    byte_pairs(folder / "gpt2", ["<|endoftext|>"], unk_token="<|endoftext|>", **ends)
    unigrams(folder / "t5")
    train_tokenizer(folder / "wordpiece", ["a photo of a red dog on grass"] * 3, 100)
    return folder


@pytest.fixture(scope="module")
def opt(folder) -> LanguageTokenizer:
    return load_language_tokenizer(folder / "opt", end="\n")


@pytest.fixture(scope="module")
def t5(folder) -> LanguageTokenizer:
    return load_language_tokenizer(folder / "t5")


@pytest.fixture(scope="module")
def wordpiece(folder) -> LanguageTokenizer:
    return load_language_tokenizer(folder / "wordpiece")


def tokens(ids, text: LanguageTokenizer) -> str:
    """Ids as their tokens; OPT's newline and space are Ċ and Ġ, T5's space is ▁."""
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    return " ".join(text.tokenizer.convert_ids_to_tokens(ids))


def sample(*captions: str, prompt: str = "", uniform: float = 0.0, number: int = 0) -> Sample:
    image = torch.full((3, 2, 2), number, dtype=torch.uint8)
    text = prompt + captions[0]
    return Sample(image, text, 10 + number, f"s/t/{number}", list(captions), uniform)


# The tokens around a text.


def test_opt_begins_with_its_bos_token_and_ends_with_a_newline(opt):
    assert (opt.start_id, opt.end_id, opt.pad_id) == (2, opt.tokenizer.get_vocab()["Ċ"], 1)
    assert tokens(encode(["a red dog"], opt, 8)[0], opt) == "</s> a Ġred Ġdog Ċ"


def test_without_an_end_text_the_eos_token_ends(folder):
    text = load_language_tokenizer(folder / "opt")
    assert tokens(encode(["a dog"], text, 8)[0], text) == "</s> a Ġdog </s>"
    assert load_language_tokenizer(folder / "opt", end="</s>").end_id == 2  # also OPT's unknown


def test_gpt2_has_neither_start_nor_padding(folder):
    text = load_language_tokenizer(folder / "gpt2")
    assert (text.start_id, text.end_id, text.pad_id) == (None, 0, 0)
    assert tokens(encode(["a dog"], text, 8)[0], text) == "a Ġdog <|endoftext|>"


def test_t5_has_no_start(t5):
    assert (t5.start_id, t5.end_id, t5.pad_id) == (None, 1, 0)
    assert tokens(encode(["a dog"], t5, 8)[0], t5) == "▁a ▁dog </s>"


def test_a_prepared_wordpiece_stands_between_cls_and_sep(wordpiece):
    assert (wordpiece.start_id, wordpiece.end_id, wordpiece.pad_id) == (2, 3, 0)
    assert tokens(encode(["a red dog"], wordpiece, 8)[0], wordpiece) == "[CLS] a red dog [SEP]"


@pytest.mark.parametrize("name", ["opt", "gpt2", "t5", "wordpiece"])
def test_words_are_cut_and_the_end_token_is_not(folder, name):
    text = load_language_tokenizer(folder / name)
    around = len(text.start) + 1
    full = encode([LONG], text, 99)[0]
    assert len(full) == 5 + around
    for room in range(around, len(full) + 1):
        row = encode([LONG], text, room)[0]
        assert len(row) == room
        assert row[:-1] == full[: room - 1]
        assert row[-1] == text.end_id


def test_it_pickles_for_the_workers(opt):
    copy = pickle.loads(pickle.dumps(opt))
    assert encode([LONG], copy, 9) == encode([LONG], opt, 9)


def test_the_digest_knows_a_tokenizer_again(opt, t5):
    items = sorted(opt.tokenizer.get_vocab().items())
    assert tokenizer_digest(opt.tokenizer) == hashlib.sha256(repr(items).encode()).hexdigest()
    assert tokenizer_digest(opt.tokenizer) != tokenizer_digest(t5.tokenizer)
    before = tokenizer_digest(opt)
    opt.tokenizer(["some", "more texts"])
    assert tokenizer_digest(opt) == before != tokenizer_digest(opt.tokenizer)
    assert before != tokenizer_digest(dataclasses.replace(opt, start_id=None))
    assert before != tokenizer_digest(dataclasses.replace(opt, end_id=opt.end_id + 1))


# Decoder-only batches.


def targets(batch) -> list[list[tuple[int, int]]]:
    """Column and token of the targets of each row, as `lm_index` and `lm_targets` say."""
    ids = batch["target_ids"] if "target_ids" in batch else batch["input_ids"]
    rows: list[list[tuple[int, int]]] = [[] for _ in ids]
    index, found = batch["lm_index"], batch["lm_targets"]
    assert index.dtype == found.dtype == torch.int64
    assert index.tolist() == sorted(set(index.tolist()))
    for i, token in zip(index.tolist(), found.tolist(), strict=True):
        b, t = divmod(i, ids.shape[1])
        assert ids[b, t] == token
        rows[b].append((t, token))
    return rows


def columns(batch) -> list[list[int]]:
    return [[t for t, _ in row] for row in targets(batch)]


def test_a_causal_batch(opt):
    samples = [sample("a dog", number=0), sample("a red dog on grass", number=1)]
    skipped = [{"shard": "s/t", "key": "9", "reason": "bad"}]
    batch = collate_causal(samples, skipped, text=opt, max_text_tokens=32, prompt="", bucket=4)
    assert batch["input_ids"].shape == (2, 8)
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert tokens(batch["input_ids"][0], opt) == "</s> a Ġdog Ċ" + 4 * " <pad>"
    assert tokens(batch["input_ids"][1], opt) == "</s> a Ġred Ġdog Ġon Ġgrass Ċ <pad>"
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 7]
    assert columns(batch) == [[0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]]  # the start token too
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 1]
    assert batch["image_id"].tolist() == [10, 11]
    assert batch["text"] == ["a dog", LONG]
    assert batch["keys"] == ["s/t/0", "s/t/1"]
    assert batch["skipped"] == skipped


@pytest.mark.parametrize("prompt", ["a photo of", "a photo of "])
def test_start_and_prompt_are_no_targets(opt, prompt):
    samples = [sample(" red dog" if prompt[-1] == "f" else "red dog", prompt=prompt)]
    batch = collate_causal(samples, [], text=opt, max_text_tokens=32, prompt=prompt, bucket=1)
    assert tokens(batch["input_ids"][0], opt) == "</s> a Ġphoto Ġof Ġred Ġdog Ċ"
    assert columns(batch) == [[4, 5, 6]]


def test_what_of_a_prompt_melts_into_the_caption_is_a_target(opt):
    """The prompt's last token, " o", is none of the row's: there it is part of " on"."""
    samples = [sample("n grass", prompt="a photo o")]
    batch = collate_causal(samples, [], text=opt, max_text_tokens=9, prompt="a photo o", bucket=1)
    assert tokens(batch["input_ids"][0], opt) == "</s> a Ġphoto Ġon Ġgrass Ċ"
    assert columns(batch) == [[3, 4, 5]]


def test_a_cut_prompt_leaves_the_end_as_target(opt):
    samples = [sample("red dog", prompt="a photo of ")]
    batch = collate_causal(samples, [], text=opt, max_text_tokens=4, prompt="a photo of ", bucket=8)
    assert tokens(batch["input_ids"][0], opt) == "</s> a Ġphoto Ċ"
    assert columns(batch) == [[3]]
    # A prompt that holds the end symbol where the cut puts it.
    samples = [sample("red", prompt="a\na ")]
    batch = collate_causal(samples, [], text=opt, max_text_tokens=3, prompt="a\na ", bucket=8)
    assert tokens(batch["input_ids"][0], opt) == "</s> a Ċ"
    assert columns(batch) == [[2]]


def test_a_prompt_for_a_model_without_a_start_token(folder):
    text = load_language_tokenizer(folder / "gpt2")
    samples = [sample("red dog", prompt="a photo of ")]
    batch = collate_causal(
        samples, [], text=text, max_text_tokens=32, prompt="a photo of ", bucket=1
    )
    assert columns(batch) == [[3, 4, 5]]


# Encoder-decoder batches.


def seq2seq(samples, text, prompt="", prefix="random_split", max_text_tokens=32):
    return collate_seq2seq(
        samples,
        [],
        text=text,
        max_text_tokens=max_text_tokens,
        prompt=prompt,
        prefix=prefix,
        bucket=4,
    )


def test_the_encoder_reads_the_prompt_and_the_decoder_says_the_caption(t5):
    samples = [sample("a dog", "x", uniform=0.9), sample(LONG, uniform=0.9, number=1)]
    batch = seq2seq(samples, t5, prompt="a photo of ", prefix="none")
    assert batch["input_ids"].shape == (2, 4) and batch["target_ids"].shape == (2, 8)
    assert tokens(batch["input_ids"][0], t5) == "▁a ▁photo ▁of </s>"
    assert tokens(batch["target_ids"][0], t5) == "▁a ▁dog </s>" + 5 * " <pad>"
    assert tokens(batch["target_ids"][1], t5) == "▁a ▁red ▁dog ▁on ▁grass </s> <pad> <pad>"
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 4]
    assert batch["target_mask"].sum(dim=1).tolist() == [3, 6]
    assert columns(batch) == [[0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert batch["image"].shape == (2, 3, 2, 2)
    assert batch["keys"] == ["s/t/0", "s/t/1"]


def test_without_prompt_and_prefix_the_encoder_reads_the_end_alone(t5):
    batch = seq2seq([sample("a dog")], t5, prefix="none")
    assert tokens(batch["input_ids"][0], t5) == "</s> <pad> <pad> <pad>"
    assert batch["attention_mask"].tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("uniform", "read", "said"),
    [
        (0.0, "", "▁a ▁red ▁dog ▁on ▁grass"),
        (0.19, "", "▁a ▁red ▁dog ▁on ▁grass"),
        (0.2, "▁a", "▁red ▁dog ▁on ▁grass"),
        (0.5, "▁a ▁red", "▁dog ▁on ▁grass"),
        (1 - 2**-24, "▁a ▁red ▁dog ▁on", "▁grass"),
    ],
)
def test_a_caption_is_split_by_its_number(t5, uniform, read, said):
    batch = seq2seq([sample(LONG, uniform=uniform)], t5, prompt="photo ")
    count = int(batch["attention_mask"].sum())
    assert tokens(batch["input_ids"][0, :count], t5).split() == ["▁photo", *read.split(), "</s>"]
    assert tokens(batch["lm_targets"], t5) == f"{said} </s>"


def test_both_sides_keep_their_ends_when_cut(t5):
    batch = seq2seq([sample(LONG, uniform=0.5)], t5, prompt="a photo of", max_text_tokens=3)
    assert tokens(batch["input_ids"][0], t5) == "▁a ▁photo </s>"
    assert tokens(batch["target_ids"][0], t5) == "▁dog ▁on </s>"


# Shapes.


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_batches_take_few_shapes(kind, request):
    """So a compiled model meets few, and a GPU's memory is cut into pieces of few sizes."""
    text = request.getfixturevalue(kind)
    generator = random.Random(0)
    shapes = set()
    for _ in range(300):
        captions = [" ".join(generator.choices(WORDS, k=generator.randint(1, 40))) for _ in "abc"]
        samples = [sample(c, uniform=generator.random(), number=i) for i, c in enumerate(captions)]
        if kind == "opt":
            batch = collate_causal(samples, [], text=text, max_text_tokens=32, prompt="", bucket=4)
            shapes.add(tuple(batch["input_ids"].shape))
        else:
            batch = seq2seq(samples, text)
            shapes.add((batch["input_ids"].shape[1], batch["target_ids"].shape[1]))
    lengths = {length for shape in shapes for length in shape[1 if kind == "opt" else 0 :]}
    assert lengths <= set(range(4, 33, 4))
    assert 4 < len(shapes) <= (8 if kind == "opt" else 64)


# Documents.


def documents(samples, text, max_text_tokens):
    return collate_documents(samples, [], text=text, max_text_tokens=max_text_tokens, bucket=4)


def test_a_document_holds_whole_captions_that_fit(wordpiece):
    captions = ["a dog", "a red dog", "grass"]
    whole = "[CLS] a dog [SEP] [CLS] a red dog [SEP] [CLS] grass [SEP]"
    for room, kept in [(12, 12), (11, 9), (9, 9), (8, 4), (4, 4)]:
        batch = documents([sample(*captions)], wordpiece, room)
        ids = batch["input_ids"][0, : int(batch["attention_mask"].sum())]
        assert tokens(ids, wordpiece).split() == whole.split()[:kept]
        assert columns(batch) == [list(range(1, kept))]
        assert "image" not in batch


def test_a_first_caption_that_is_too_long_loses_words(wordpiece):
    batch = documents([sample(LONG, "a")], wordpiece, 4)
    assert tokens(batch["input_ids"][0], wordpiece) == "[CLS] a red [SEP]"


def test_documents_of_a_batch_are_padded_alike(opt):
    batch = documents([sample("a", "a dog"), sample("a dog", number=1)], opt, 32)
    assert tokens(batch["input_ids"][0], opt) == "</s> a Ċ </s> a Ġdog Ċ <pad>"
    assert tokens(batch["input_ids"][1], opt) == "</s> a Ġdog Ċ <pad> <pad> <pad> <pad>"
    assert columns(batch) == [[1, 2, 3, 4, 5, 6], [1, 2, 3]]
    assert batch["text"] == ["a", "a dog"] and batch["image_id"].tolist() == [10, 11]


# Evaluation.

SKIPPED = {"shard": "s/t", "key": "1", "reason": "bad"}


def eval_items(prompt: str = "") -> list:
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    return [
        EvalSample(image, [prompt + "a dog", prompt + "a red dog"], 5, "s/t/0", 0),
        SKIPPED,
        EvalSample(image, [prompt + "grass"], 7, "s/t/2", 2),
    ]


def check_origin(batch):
    assert batch["captions"] == [["a dog", "a red dog"], ["grass"]]
    assert batch["items"] == [0, 2]
    assert batch["keys"] == ["s/t/0", "s/t/2"]
    assert batch["image_id"].tolist() == [5, 7]
    assert batch["skipped"] == [SKIPPED]


def test_a_causal_eval_batch_is_that_of_the_first_captions(opt):
    prompt = "a photo of "
    settings = {"text": opt, "max_text_tokens": 9, "prompt": prompt, "bucket": 4}
    batch = collate_eval_causal(eval_items(prompt), **settings)
    check_origin(batch)
    assert batch["text"] == [prompt + "a dog", prompt + "grass"]
    trained = collate_causal(
        [sample("a dog", prompt=prompt), sample("grass", prompt=prompt)], [], **settings
    )
    for key in ("input_ids", "attention_mask", "lm_index", "lm_targets"):
        assert torch.equal(batch[key], trained[key])
    assert batch["image"].shape == (2, 3, 2, 2)


def test_a_seq2seq_eval_batch_has_nothing_of_the_caption_in_the_encoder(t5):
    prompt = "a photo of "
    settings = {"text": t5, "max_text_tokens": 9, "prompt": prompt, "bucket": 1}
    batch = collate_eval_seq2seq(eval_items(prompt), **settings)
    check_origin(batch)
    assert tokens(batch["input_ids"].flatten(), t5) == " ".join(2 * ["▁a ▁photo ▁of </s>"])
    assert tokens(batch["lm_targets"], t5) == "▁a ▁dog </s> ▁grass </s>"


def test_a_document_eval_batch_holds_all_captions(wordpiece):
    settings = {"text": wordpiece, "max_text_tokens": 16, "bucket": 8}
    batch = collate_eval_documents(eval_items("a photo of "), prompt="a photo of ", **settings)
    check_origin(batch)
    assert tokens(batch["lm_targets"], wordpiece) == (
        "a dog [SEP] [CLS] a red dog [SEP] grass [SEP]"
    )
    assert "image" not in batch


def test_eval_batches_may_be_empty(opt, t5):
    settings = {"max_text_tokens": 9, "bucket": 4}
    causal = collate_eval_causal([SKIPPED], text=opt, prompt="a ", **settings)
    both = collate_eval_seq2seq([SKIPPED], text=t5, prompt="", **settings)
    captions = collate_eval_documents([SKIPPED], text=opt, **settings)
    for batch in (causal, both, captions):
        assert batch["skipped"] == [SKIPPED]
        assert batch["keys"] == batch["captions"] == batch["items"] == []
        assert batch["input_ids"].shape == (0, 0) and len(batch["lm_index"]) == 0
        assert batch["image_id"].dtype == batch["lm_targets"].dtype == torch.int64
    assert len(causal["image"]) == len(both["image"]) == 0


# Through a real stream.


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Twelve samples of two captions whose images cannot be decoded."""
    folder = tmp_path_factory.mktemp("shards")
    infos = []
    for shard in range(3):
        samples = [
            {
                "__key__": f"k{n}",
                "jpg": b"no image",
                "json": {"captions": [LONG, "A photo of a red dog on a dog."]},
            }
            for n in range(4 * shard, 4 * shard + 4)
        ]
        infos.append(write_shard(folder / f"train-{shard:06d}.tar", samples))
    write_index(folder, infos)
    return open_source("one", folder, "train")


def splits(source, text, world: int, workers: int, seed: int = 3) -> list[tuple[str, str, str]]:
    """Key, encoder text and decoder text in global order: four batches of six, two epochs."""
    collate = functools.partial(
        collate_seq2seq,
        text=text,
        max_text_tokens=16,
        prompt="",
        prefix="random_split",
        bucket=4,
    )
    parts = []
    for rank in range(world):
        stream = TrainStream(
            [source],
            {"one": None},
            collate,
            contrastive_batch=6,
            seed=seed,
            shuffle_window=2,
            rank=rank,
            world=world,
        )
        loader = DataLoader(stream, batch_size=None, num_workers=workers)
        parts.append(list(itertools.islice(loader, 4)))
    found = []
    for batch in itertools.chain(*zip(*parts, strict=True)):
        read, said = decode(batch["input_ids"], text), decode(batch["target_ids"], text)
        found += zip(batch["keys"], read, said, strict=True)
    return found


def test_splits_depend_on_the_sample_and_the_epoch_alone(source, t5):
    expected = splits(source, t5, 1, 0)
    assert splits(source, t5, 1, 2) == expected
    assert splits(source, t5, 3, 0) == expected
    assert splits(source, t5, 2, 1) == expected
    assert splits(source, t5, 1, 0, seed=4) != expected
    epochs = (
        {row[0]: row[1:] for row in expected[:12]},
        {row[0]: row[1:] for row in expected[12:]},
    )
    assert len(epochs[0]) == len(epochs[1]) == 12
    assert sum(epochs[0][key] != epochs[1][key] for key in epochs[0]) >= 6
    captions = {LONG, "a photo of a red dog on a dog"}
    assert {f"{read} {said}".strip() for _, read, said in expected} == captions
    assert len({read for _, read, _ in expected}) > 4
    assert all(said for _, _, said in expected)


def test_documents_of_a_stream_rotate(source, wordpiece):
    make = functools.partial(collate_documents, text=wordpiece, max_text_tokens=99, bucket=1)
    stream = TrainStream(
        [source], {"one": None}, make, contrastive_batch=12, seed=3, shuffle_window=2
    )
    batch = next(iter(stream))
    first, second = LONG, "a photo of a red dog on a dog"
    expected = {f"[CLS] {a} [SEP] [CLS] {b} [SEP]" for a, b in [(first, second), (second, first)]}
    assert {
        tokens(row[: int(count)], wordpiece)
        for row, count in zip(batch["input_ids"], batch["attention_mask"].sum(dim=1), strict=True)
    } == expected


def test_an_evaluation_without_images(source, wordpiece):
    make = functools.partial(collate_eval_documents, text=wordpiece, max_text_tokens=99, bucket=1)
    loader = DataLoader(EvalStream(source, None), batch_size=5, collate_fn=make)
    batches = list(loader)
    assert [item for batch in batches for item in batch["items"]] == list(range(12))
    assert not any(batch["skipped"] for batch in batches)


# Prompts and generated text.


def test_prompts_of_a_decoder_are_padded_on_the_left(opt):
    ids, mask = encode_prompts(["a photo of ", "a", ""], opt, encoder=False)
    assert ids.dtype == mask.dtype == torch.int64
    assert [tokens(row, opt) for row in ids] == [
        "</s> a Ġphoto Ġof",
        "<pad> <pad> </s> a",
        "<pad> <pad> <pad> </s>",
    ]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]


def test_prompts_of_an_encoder_end_and_are_padded_on_the_right(t5):
    ids, mask = encode_prompts([" a photo of ", ""], t5, encoder=True)
    assert [tokens(row, t5) for row in ids] == ["▁a ▁photo ▁of </s>", "</s> <pad> <pad> <pad>"]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]


def test_a_prompt_may_be_nothing(folder):
    ids, mask = encode_prompts(["", ""], load_language_tokenizer(folder / "gpt2"), encoder=False)
    assert ids.shape == mask.shape == (2, 0)


def test_a_prompt_is_what_training_does_not_ask_for(opt):
    """The tokens that a caption is generated from are those that training masks."""
    prompt = "a photo of "
    asked, _ = encode_prompts([prompt], opt, encoder=False)
    batch = collate_causal(
        [sample("red dog", prompt=prompt)], [], text=opt, max_text_tokens=9, prompt=prompt, bucket=1
    )
    first = columns(batch)[0][0]
    assert batch["input_ids"][0, :first].tolist() == asked[0].tolist()


@pytest.mark.parametrize("name", ["opt", "gpt2", "t5", "wordpiece"])
def test_generated_ids_become_text(folder, name):
    text = load_language_tokenizer(folder / name, end="\n" if name == "opt" else None)
    captions = [LONG, "a dog", ""]
    rows = [row[len(text.start) :] for row in encode(captions, text, 32)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [text.pad_id] * (width - len(row)) for row in rows])
    assert decode(ids, text) == captions
    noise = torch.full_like(ids, rows[1][0])
    assert decode(torch.cat([ids, noise], dim=1), text) == captions  # nothing after the end counts
    cut = torch.tensor([rows[0][:3]])
    assert decode(cut, text) == ["a red dog"]
    assert decode(ids[:0], text) == []


def test_the_eos_token_ends_a_caption_too(opt):
    row = [*encode([" red dog"], opt, 9)[0][1:-1], 2, *encode([LONG], opt, 9)[0][1:-1]]
    assert decode(torch.tensor([row]), opt) == ["red dog"]


# What the user can get wrong.


def test_an_end_of_several_or_no_tokens_is_refused(folder):
    with pytest.raises(UserError, match=r"language_model.end=' \.' is 2 tokens of .*opt; .*null"):
        load_language_tokenizer(folder / "opt", end=" .")
    with pytest.raises(UserError, match=r"language_model.end='\\n' is 0 tokens of"):
        load_language_tokenizer(folder / "t5", end="\n")
    with pytest.raises(UserError, match=r"language_model.end='%' is unknown to"):
        load_language_tokenizer(folder / "wordpiece", end="%")


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"language_model.end=null, .*neither an eos nor a sep"):
        load_language_tokenizer(tmp_path)
    assert load_language_tokenizer(tmp_path, end="a").pad_id == 0


def test_a_missing_or_broken_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"language_model\.tokenizer=.*nothing: there is no such"):
        load_language_tokenizer(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"language_model\.tokenizer=.*neither tokenizer\.json, "):
        load_language_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"language_model\.tokenizer=.*could not be read"):
        load_language_tokenizer(tmp_path)


def test_a_download_takes_no_weights(folder, tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(name, revision, allow_patterns):
        asked[name] = allow_patterns
        return str(folder / "opt")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert load_language_tokenizer("facebook/opt-2.7b", end="\n").start_id == 2
    (patterns,) = asked.values()
    assert {"vocab.json", "merges.txt", "tokenizer.json", "spiece.model"} <= set(patterns)
    assert not any("*" in name or "safetensors" in name for name in patterns)
