"""`task=retrieval` on splits that are not tidy.

Proven: metrics equal those of a loop over all pairs of the model's own features and matching
logits, for any k and batch size, with images that cannot be decoded, have no captions, come twice
or have many captions; a split of one image; nothing usable is refused; the page shows what was
found.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from splits import make_split, open_split

import blip2_train
from blip2_train.data.batch import EvalSample
from blip2_train.data.transforms import EvalTransform
from blip2_train.errors import UserError
from blip2_train.evaluation import matching
from blip2_train.evaluation.inference import Blip2
from blip2_train.evaluation.retrieval import recalls, rerank
from blip2_train.evaluation.retrieval_task import RetrievalTask
from blip2_train.evaluation.task import Outcome
from blip2_train.evaluation.work import Work

# the second has no picture, the fifth no caption; three show one image; one has many captions
UNTIDY: list[Any] = [
    None, {"jpg": b"no picture"}, {"captions": [f"caption {n} of 9" for n in range(9)]},
    {"image_id": 7}, {"captions": []}, {"captions": ["Ein Bär.", "a", "ein bär"]}, {"image_id": 7},
    None, {"captions": ["..."]}, {"image_id": 7, "captions": ["the same"]}, None, None,
]  # fmt: skip


@pytest.fixture(scope="module")
def stage1(finished: Path) -> Blip2:
    return blip2_train.load(finished / "stage1")


@pytest.fixture(scope="module")
def untidy(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_split(shards, tmp_path_factory.mktemp("untidy") / "s", UNTIDY)


def evaluated(
    blip2: Blip2, split: Path, parts: Path, *, k: int = 128, batch_size: int = 5, samples: int = 2
) -> Outcome:
    task = RetrievalTask(k)
    task.batch_size, task.samples = batch_size, samples
    task.check(blip2)
    images = open_split(split, EvalTransform(blip2.image_size))
    return task.run(blip2, images, Work(parts, {}))


def naive(blip2: Blip2, split: Path, k: int) -> dict[str, float]:
    """Of every image with every caption."""
    images = open_split(split, EvalTransform(blip2.image_size))
    pixels: dict[int, torch.Tensor] = {}
    texts, owner = [], []
    for sample in (images[n] for n in range(len(images))):
        if isinstance(sample, EvalSample):
            pixels.setdefault(sample.image_id, sample.image)
            texts += sample.captions
            owner += [list(pixels).index(sample.image_id)] * len(sample.captions)
    stack, caption_image = torch.stack(list(pixels.values())), torch.tensor(owner)
    sims = torch.stack([feat @ blip2.encode_text(texts).T for feat in blip2.encode_image(stack)])
    sims = sims.amax(dim=1)
    found = recalls(sims, sims.T, caption_image)
    if k and blip2.kind == "stage1":
        match = torch.stack(
            [blip2.match(image.expand(len(texts), -1, -1, -1), texts).logit() for image in stack]
        )
        # the head's own logit: the reference adds that, not the difference of the two
        with torch.no_grad():
            ids, mask = blip2.tokens(texts)
            for n, image in enumerate(stack):
                kv = blip2.model.qformer.project_image(blip2.model.vision(image[None]))
                logits = blip2.model.match([(kv, len(texts))], ids, mask)
                torch.testing.assert_close(logits.diff(dim=1)[:, 0], match[n], atol=1e-4, rtol=0)
                match[n] = logits[:, 1]
        i2t, t2i = rerank(sims, match, k), rerank(sims.T, match.T, k)
        found |= {f"itm_{key}": value for key, value in recalls(i2t, t2i, caption_image).items()}
    return found


@pytest.mark.parametrize(("k", "batch_size"), [(0, 5), (1, 1), (3, 2), (6, 64), (128, 5)])
def test_it_equals_a_loop(
    stage1: Blip2, untidy: Path, tmp_path: Path, k: int, batch_size: int
) -> None:
    outcome = evaluated(stage1, untidy, tmp_path, k=k, batch_size=batch_size)
    assert outcome.metrics == pytest.approx(naive(stage1, untidy, k))
    counts = outcome.counts
    assert counts["images"] == 7 and counts["repeated images"] == 2 and counts["skipped"] == 3
    reasons = sorted(line["reason"] for line in outcome.skipped)
    assert [reason.split(":")[0] for reason in reasons] == [
        "no caption is left after cleaning", "no captions", "not a readable image",
    ]  # fmt: skip
    assert {line["key"] for line in outcome.skipped} == {"s001", "s004", "s008"}
    assert ("matched pairs" in counts) == (k > 0)


def test_clip_has_nothing_to_match(finished: Path, untidy: Path, tmp_path: Path) -> None:
    clip = blip2_train.load(finished / "clip")
    outcome = evaluated(clip, untidy, tmp_path)
    assert outcome.metrics == pytest.approx(naive(clip, untidy, 128))
    assert not [name for name in outcome.metrics if name.startswith("itm")]


def test_small_portions_change_nothing(
    stage1: Blip2, untidy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluated(stage1, untidy, tmp_path / "whole", k=5)
    monkeypatch.setattr(matching, "PAIRS_OF_A_PORTION", 7)
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", 3)
    assert evaluated(stage1, untidy, tmp_path / "parts", k=5).metrics == whole.metrics
    assert len(list((tmp_path / "parts").glob("matching-*"))) > 5


def test_parts_of_other_portions_are_not_taken(stage1: Blip2, untidy: Path, tmp_path: Path) -> None:
    whole = evaluated(stage1, untidy, tmp_path / "whole", k=5).metrics
    for batch_size in (4, 5):  # both make two portions
        assert evaluated(stage1, untidy, tmp_path, k=5, batch_size=batch_size).metrics == whole
        for second in tmp_path.glob("matching-*000001.pt"):
            second.unlink()


def test_one_image(stage1: Blip2, shards: Path, tmp_path: Path) -> None:
    split = make_split(shards, tmp_path / "s", [{"captions": ["one"]}])
    outcome = evaluated(stage1, split, tmp_path / "parts")
    assert set(outcome.metrics.values()) == {100.0} and outcome.counts["matched pairs"] == 1
    assert len(outcome.best) == 1 and not outcome.worst


def test_a_model_that_sees_no_difference_finds_nothing(
    stage1: Blip2, shards: Path, tmp_path: Path
) -> None:
    """All images the same picture, all captions the same text: every pair ties."""
    one = open_split(make_split(shards, tmp_path / "one", [None]), EvalTransform(32))
    one.picture(0).save(tmp_path / "p.png")
    data = (tmp_path / "p.png").read_bytes()
    same = [{"jpg": data, "captions": ["a thing"]} for _ in range(12)]
    split = make_split(shards, tmp_path / "s", same)
    outcome = evaluated(stage1, split, tmp_path / "parts", batch_size=12)
    assert set(outcome.metrics.values()) == {0.0}


def test_nothing_usable(stage1: Blip2, shards: Path, tmp_path: Path) -> None:
    split = make_split(shards, tmp_path / "s", [{"jpg": b"x"}, {"captions": []}])
    with pytest.raises(UserError, match="none of the 2 images can be used, the first because of"):
        evaluated(stage1, split, tmp_path / "parts")


def test_the_page_shows_what_was_found(stage1: Blip2, untidy: Path, tmp_path: Path) -> None:
    outcome = evaluated(stage1, untidy, tmp_path, samples=3)
    assert len(outcome.best) == len(outcome.worst) == 3
    ranks = [int(row.notes["rank"]) for row in [*outcome.best, *outcome.worst[::-1]]]
    assert ranks == sorted(ranks)
    for row in outcome.best:
        assert (int(row.notes["rank"]) == 1) == row.texts[0][1]
        assert len(row.texts) == len(row.images) == 3 and row.query == row.truth[0]
        assert [right for text, right in row.texts] == [text in row.truth for text, _ in row.texts]
    everything = evaluated(stage1, untidy, tmp_path, samples=99)
    assert len(everything.best) == 7 and everything.worst == []
    assert evaluated(stage1, untidy, tmp_path, samples=0).best == []
