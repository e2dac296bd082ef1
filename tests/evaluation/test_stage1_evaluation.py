"""Validation counts every image once, and no number depends on how batches lie on ranks.

Proven on 1 and 3 real processes: contrastive and re-ranked recalls and the order of the results;
and that batching does not matter to the similarities.
"""

from typing import Any

import torch
from ranks import run_ranks
from tiny import PATCHES, TEXT, VOCAB, WIDTH, tiny_model

from blip2_train.distributed import World, current_world
from blip2_train.evaluation.retrieval import own_batches
from blip2_train.evaluation.stage1 import Retrieval, encode, first_captions, retrieve

IMAGES, SIZE = 11, 2  # six batches, the last one short


def eval_batch(items: list[int]) -> dict[str, Any]:
    """Image i has 1 + i % 3 captions; everything is a function of i."""
    ids, owner = [], []
    for row, item in enumerate(items):
        for caption in range(1 + item % 3):
            generator = torch.Generator().manual_seed(100 * item + caption)
            text = torch.randint(5, VOCAB - 1, (TEXT,), generator=generator)
            text[0], text[4 + caption :] = 2, 0
            ids.append(text)
            owner.append(row)
    input_ids = torch.stack(ids)
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != 0).long(),
        "image_id": torch.tensor(items),
        "caption_image": torch.tensor(owner),
        "text": [f"caption {n}" for n in range(len(ids))],
        "keys": [str(item) for item in items],
        "items": items,
    }


def tokens_of(items: list[int]) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(item) for item in items]
    rows = [torch.randn(PATCHES, WIDTH, generator=g, dtype=torch.float64) for g in generators]
    return torch.stack(rows)


@torch.no_grad()
def evaluate(size: int = SIZE) -> dict[str, Any]:
    world = current_world()
    model = tiny_model().double().eval()
    numbers = range(-(-IMAGES // size))[world.rank :: world.size]
    features, tokens = [], {}
    for number, items in zip(numbers, own_batches(IMAGES, size, world), strict=True):
        tokens[number] = tokens_of(items)
        features.append(encode(model, tokens[number], eval_batch(items), number))
    found: Retrieval = retrieve(model, features, tokens, rerank_k=3, world=world)
    return {
        "metrics": found.metrics,
        "sims": found.sims,
        "items": found.items,
        "caption_image": found.caption_image,
    }


def test_three_processes_find_what_one_finds() -> None:
    alone = evaluate()
    assert alone["items"] == list(range(IMAGES))
    assert alone["metrics"]["i2t_r10"] > alone["metrics"]["i2t_r1"] >= 0
    for rank in run_ranks(evaluate, 3):
        assert rank["metrics"] == alone["metrics"]
        assert rank["items"] == alone["items"]
        assert rank["caption_image"].equal(alone["caption_image"])
        torch.testing.assert_close(rank["sims"], alone["sims"], atol=1e-12, rtol=0)


def test_batches_do_not_matter() -> None:
    few, many = evaluate(4), evaluate(1)
    torch.testing.assert_close(few["sims"], many["sims"], atol=1e-12, rtol=0)
    assert few["metrics"] == many["metrics"]


def test_every_item_is_in_one_batch_of_one_rank() -> None:
    for size in (1, 3, 4, 11, 50):
        for ranks in (1, 2, 3, 7):
            parts = [own_batches(IMAGES, size, World(rank, ranks)) for rank in range(ranks)]
            items = [item for part in parts for batch in part for item in batch]
            assert sorted(items) == list(range(IMAGES))


def test_the_first_caption_of_each_image() -> None:
    batch = first_captions(eval_batch([2, 0, 1]))  # 3, 1 and 2 captions
    whole = eval_batch([2, 0, 1])
    assert batch["input_ids"].equal(whole["input_ids"][[0, 3, 4]])
    assert batch["text_length"] == 4 and batch["image_id"].tolist() == [2, 0, 1]
