"""Parts of a batch of texts.

Proven, for decoder-only models and encoder-decoders: together the parts hold every row and every
target once, aligned with the batch; each is padded to its own longest text and no further, and is
of similar length; there are as many as asked for, if each has enough; a batch that the loader's
processes put together has them.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from blip2_train.data.batch import text_bucket
from blip2_train.data.language_parts import LEAST, collate_in_parts, text_parts


def padded(lengths: Tensor, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mask = (torch.arange(width) < lengths[:, None]).long()
    return torch.randint(3, 99, mask.shape, generator=generator) * mask, mask


def texts(B: int, *, encoder: bool) -> dict[str, Tensor]:
    """Of 2 to 26 tokens; the first of each is no target."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 27, (B,), generator=generator)
    ids, mask = padded(lengths, 28, generator)
    text = {"input_ids": ids, "attention_mask": mask}
    if encoder:
        ids, mask = padded(28 - lengths, 28, generator)
        text |= {"target_ids": ids, "target_mask": mask}
    index = (mask * (torch.arange(28) > 0)).flatten().nonzero().squeeze(1)
    return {**text, "lm_index": index, "lm_targets": ids.flatten()[index]}


@pytest.mark.parametrize("encoder", [False, True])
@pytest.mark.parametrize(("B", "asked", "count"), [(64, 4, 4), (33, 4, 4), (20, 4, 2), (5, 4, 1)])
def test_parts_hold_everything_once(B: int, asked: int, count: int, encoder: bool) -> None:
    text = texts(B, encoder=encoder)
    parts = text_parts(text, asked, bucket=4)
    assert len(parts) == count
    rows = torch.cat([part["rows"] for part in parts])
    assert rows.sort().values.equal(torch.arange(B))
    assert all(len(part["rows"]) >= min(LEAST, B) for part in parts)
    predicted = "target_ids" if encoder else "input_ids"
    found = []
    for part in parts:
        for name in set(text) - {"lm_index", "lm_targets"}:
            width = part[name].shape[1]
            assert part[name].equal(text[name][part["rows"], :width])
            if "mask" in name:
                assert not text[name][part["rows"], width:].any()  # nothing is cut
                assert width == text_bucket(int(part[name].sum(dim=1).max()), 4, 28)
        b, t = (
            part["lm_index"] // part[predicted].shape[1],
            part["lm_index"] % part[predicted].shape[1],
        )
        assert part["lm_targets"].equal(part[predicted][b, t])
        found += (part["rows"][b] * 28 + t).tolist()
    assert sorted(found) == text["lm_index"].tolist()


@pytest.mark.parametrize("encoder", [False, True])
def test_there_is_less_padding(encoder: bool) -> None:
    text = texts(128, encoder=encoder)

    def positions(parts: int) -> int:
        masks = ("attention_mask", "target_mask")
        found = text_parts(text, parts, bucket=4)
        return sum(part[mask].numel() for part in found for mask in masks if mask in part)

    real = sum(int(text[mask].sum()) for mask in text if "mask" in mask)
    assert real < positions(8) < positions(4) < positions(1) == 128 * 28 * (1 + encoder)
    assert positions(4) - real < 0.5 * (positions(1) - real)


def test_a_batch_gets_its_parts() -> None:
    def collate(samples: Any, skipped: Any, *, bucket: int, prompt: str) -> dict[str, Any]:
        return {**texts(len(samples), encoder=False), "prompt": prompt}

    samples: Any = [None] * 16
    batch = collate_in_parts(samples, [], collate=collate, parts=2, bucket=4, prompt="a")
    assert batch["prompt"] == "a" and [len(part["rows"]) for part in batch["parts"]] == [8, 8]
