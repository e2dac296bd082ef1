"""`task=caption` on splits that are not tidy, of both stages.

Proven: captions are the model's own, metrics those of its captions and the captions before
cleaning; images that cannot be decoded are counted, one that comes twice is one, one without
references is captioned but not scored; domains are scored apart; without any reference, package or
Java there is what can be; results are as a server takes them; the page shows best and worst; the
same on 1, 2 and 3 processes by the real command.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from splits import make_split, open_split

import blip2_train
from blip2_train import signals
from blip2_train.data.pool import Reading
from blip2_train.data.transforms import EvalTransform
from blip2_train.errors import UserError
from blip2_train.evaluate import compose, run
from blip2_train.evaluation import caption_task, java
from blip2_train.evaluation.caption_metrics import score_captions
from blip2_train.evaluation.caption_task import MAX_REFERENCE, CaptionTask, official_id
from blip2_train.evaluation.inference import Blip2
from blip2_train.evaluation.task import Outcome
from blip2_train.evaluation.work import Work
from blip2_train.training.build import instantiate_group

TWICE = {"image_id": 7, "domain": "near-domain"}
# the second has no picture, the fifth no captions, the sixth none that is left after cleaning
UNTIDY: list[Any] = [
    {"image_id": 391895, "domain": "in-domain", "captions": ["A Red (square).", "a red\nsquare"]},
    {"jpg": b"no picture"},
    TWICE | {"captions": ["Ein Bär!", "a bear", "a bear"]},
    {"image_id": "val2014/COCO_val2014_000000000042.jpg", "captions": ["it's blue", "x" * 20000]},
    {"image_id": 9, "captions": [], "domain": "in-domain"},
    {"image_id": 10, "captions": ["..."], "domain": "near-domain"},
    TWICE | {"captions": ["a bear", "another"]},
    {"image_id": ..., "captions": ["a green circle"], "domain": 3},
]  # fmt: skip
SEARCH = {"num_beams": 2, "max_new_tokens": 7, "min_new_tokens": 2}

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None, reason="pip install 'blip2-train[captions]'"
)
pytestmark = needs_package


@pytest.fixture(autouse=True)
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR takes ten seconds to start; test_caption_metrics.py has it."""
    monkeypatch.setattr(java, "JAVA", "no-such-program")


@pytest.fixture(scope="module", params=["stage1", "stage2"])
def blip2(request: pytest.FixtureRequest, finished: Path) -> Blip2:
    return blip2_train.load(finished / request.param)


@pytest.fixture(scope="module")
def untidy(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_split(shards, tmp_path_factory.mktemp("untidy") / "s", UNTIDY)


def evaluated(
    blip2: Blip2,
    split: Path,
    parts: Path,
    *,
    batch_size: int = 3,
    samples: int = 2,
    **settings: Any,
) -> Outcome:
    task = CaptionTask(**(SEARCH | settings))
    task.batch_size, task.samples = batch_size, samples
    task.check(blip2)
    images = open_split(
        split,
        EvalTransform(blip2.image_size),
        extra=task.extra,
        reading=need_no_captions(),
    )
    return task.run(blip2, images, Work(parts, {}))


def need_no_captions() -> Reading:
    return Reading(need_captions=CaptionTask.need_captions)


def test_an_untidy_split(blip2: Blip2, untidy: Path, tmp_path: Path) -> None:
    outcome = evaluated(blip2, untidy, tmp_path)
    assert outcome.counts == {
        "images": 6, "references": 9, "skipped": 1, "repeated images": 1,
        "images without references": 1, "oversized references": 1,
    }  # fmt: skip
    assert [line["key"] for line in outcome.skipped] == ["s001"]
    (name,) = outcome.files
    assert name == "captions_test_own_results.json"
    results = outcome.files[name]
    ids = [entry["image_id"] for entry in results]
    assert ids == [391895, 7, 42, 9, 10, "own/test-000001.tar/s007"]
    assert all(set(entry) == {"image_id", "caption"} for entry in results)

    # the model's own captions
    images = open_split(untidy, EvalTransform(32), reading=need_no_captions())
    rows = [0, 2, 3, 4, 5, 7]
    pixels = torch.stack([images[n].image for n in rows])
    prompt = "a photo of" if blip2.kind == "stage2" else None
    said = blip2.caption(pixels, prompt=prompt, **SEARCH)
    assert [entry["caption"] for entry in results] == said

    # against what people said, as they said it
    truth = [
        ["A Red (square).", "a red\nsquare"], ["Ein Bär!", "a bear", "a bear", "another"],
        ["it's blue"], ["..."], ["a green circle"],
    ]  # fmt: skip
    domains = ["in-domain", "near-domain", None, "near-domain", None]
    judged = [text for n, text in enumerate(said) if n != 3]
    wanted = score_captions(judged, truth, domains)
    assert outcome.metrics == wanted.metrics
    assert {"cider", "bleu4_in_domain", "meteor_near_domain"} < outcome.metrics.keys()
    assert outcome.metrics["meteor"] is None and "java" in outcome.notes["meteor"]
    shown = [float(row.notes["CIDEr"]) for row in [*outcome.best, *outcome.worst[::-1]]]
    assert shown == sorted(shown, reverse=True) and len(shown) == 4
    assert outcome.best[0].said["model"] in said and outcome.best[0].truth in truth


def test_a_caption_that_people_said_is_worth_most(
    finished: Path, shards: Path, tmp_path: Path
) -> None:
    """The model's own captions as references: everything is perfect, and words are counted."""
    stage2 = blip2_train.load(finished / "stage2")
    plain = evaluated(stage2, make_split(shards, tmp_path / "a", [None] * 6), tmp_path / "1")
    said = [entry["caption"] for entry in plain.files["captions_test_own_results.json"]]
    assert any(said)
    split = make_split(shards, tmp_path / "b", [{"captions": [text or "."]} for text in said])
    found = evaluated(stage2, split, tmp_path / "2")
    assert found.metrics["rougeL"] == pytest.approx(1)
    assert found.metrics["rougeL"] > plain.metrics["rougeL"]


def test_batches_do_not_matter(blip2: Blip2, untidy: Path, tmp_path: Path) -> None:
    few, many = (
        evaluated(blip2, untidy, tmp_path / str(size), batch_size=size) for size in (1, 64)
    )
    assert few.files == many.files and few.metrics == many.metrics and few.counts == many.counts


def test_settings_reach_the_search(finished: Path, untidy: Path, tmp_path: Path) -> None:
    stage2 = blip2_train.load(finished / "stage2")
    calls: list[dict[str, Any]] = []

    def caption(images: torch.Tensor, **settings: Any) -> list[str]:
        calls.append(settings)
        return ["a cat"] * len(images)

    stage2.caption = caption  # type: ignore[method-assign]
    evaluated(stage2, untidy, tmp_path / "1", prompt=None, length_penalty=2, metrics=False)
    assert calls[0] == SEARCH | {"prompt": None, "length_penalty": 2.0}
    calls.clear()
    task = instantiate_group("task", compose(words("stage2", "x", "y"))["task"])
    images = open_split(untidy, EvalTransform(32), extra=task.extra, reading=need_no_captions())
    task.run(stage2, images, Work(tmp_path / "2", {}))
    assert calls[0] == {  # those of the published numbers
        "prompt": "a photo of", "num_beams": 5, "max_new_tokens": 30, "min_new_tokens": 8,
        "length_penalty": 1.0,
    }  # fmt: skip


def test_without_references(blip2: Blip2, shards: Path, tmp_path: Path) -> None:
    split = make_split(shards, tmp_path / "s", [{"captions": [], "image_id": n} for n in range(4)])
    outcome = evaluated(
        blip2, split, tmp_path / "parts", results="captions_test2014_x_results.json"
    )
    assert outcome.metrics == {} and not outcome.worst
    # there is something to look at all the same
    assert [row.notes for row in outcome.best] == [{"image": "0"}, {"image": "2"}]
    assert "without scores" in outcome.text
    assert outcome.notes == {"metrics": "no image of this split has captions to compare with"}
    results = outcome.files["captions_test2014_x_results.json"]
    assert [entry["image_id"] for entry in results] == [0, 1, 2, 3]


def test_without_the_package(
    blip2: Blip2, untidy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "pycocoevalcap" else find(name, *args),
    )
    with pytest.raises(UserError, match=r"pip install 'blip2-train\[captions\]'"):
        evaluated(blip2, untidy, tmp_path)
    assert not list(tmp_path.iterdir())  # nothing was begun
    outcome = evaluated(blip2, untidy, tmp_path, metrics=False)
    assert outcome.metrics == {} and len(outcome.files["captions_test_own_results.json"]) == 6
    assert outcome.notes["metrics"] == "task.metrics=false: only captions were made"


def test_a_signal_while_captions_are_scored(
    blip2: Blip2, untidy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have ended the programs that score: nothing is taken, and the captions stay."""

    def score(*given: Any) -> Any:
        monkeypatch.setattr(signals, "received", lambda: 15)
        return score_captions(*given)

    monkeypatch.setattr(caption_task, "score_captions", score)
    with pytest.raises(signals.Stopped) as stopped:
        evaluated(blip2, untidy, tmp_path)
    assert stopped.value.number == 15 and len(list(tmp_path.glob("captions-*.pt"))) == 3


def test_one_image_and_none(blip2: Blip2, shards: Path, tmp_path: Path) -> None:
    one = make_split(shards, tmp_path / "one", [{"captions": ["one"]}])
    outcome = evaluated(blip2, one, tmp_path / "1")
    assert outcome.metrics["cider"] == 0.0 and len(outcome.best) == 1 and not outcome.worst
    none = make_split(shards, tmp_path / "none", [{"jpg": b"x"}])
    with pytest.raises(UserError, match="none of the 1 images can be used, the first because of"):
        evaluated(blip2, none, tmp_path / "2")


def test_who_writes_no_captions(finished: Path, untidy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is of kind clip, and this needs stage1 or stage2"):
        evaluated(blip2_train.load(finished / "clip"), untidy, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 0}, {"num_beams": True}, {"max_new_tokens": 2.5}, {"min_new_tokens": -1},
        {"min_new_tokens": 9, "max_new_tokens": 8}, {"length_penalty": "x"}, {"metrics": "no"},
        {"prompt": 3}, {"results": "../x.json"}, {"results": "metrics.json"}, {"results": "a.txt"},
        {"results": "lock.json"}, {"results": ".json"},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"task\.{next(iter(settings))}="):
        CaptionTask(**settings)


def test_official_ids() -> None:
    kept = [5, "x.jpg", "flickr/1000092795.jpg", None, "COCO_val2014_42.jpg", ["a"], "coco_"]
    assert [official_id(image_id) for image_id in kept] == kept
    for image_id in (
        "COCO_train2014_000000000042",
        "a/b/COCO_test2014_000000000042.jpg",
        "coco_42",
    ):
        assert official_id(image_id) == 42
    assert MAX_REFERENCE > 1000


# -- by the command --------------------------------------------------------------------------------


def words(kind: Any, shards: Any, out: Any, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {
        "task": "caption", "ckpt": kind, "data": "nocaps", "data.validation.shards": shards,
        "split": "test", "batch_size": 2, "samples": 1, "out": out, "accelerator": "cpu",
        "data.num_workers": 0,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in (settings | changes).items()]


def short(checkpoint: Path, untidy: Path, out: Path) -> list[str]:
    search = {f"task.{name}": value for name, value in SEARCH.items()}
    return words(checkpoint, untidy, out, **search)


def content(folder: Path) -> tuple[dict[str, Any], Any]:
    found = json.loads((folder / "metrics.json").read_text())
    results = json.loads((folder / "captions_test_nocaps_results.json").read_text())
    return {key: found[key] for key in ("metrics", "counts", "notes")}, results


@pytest.mark.parametrize(("kind", "sizes"), [("stage1", (2, 3)), ("stage2", (2,))])
def test_the_command_on_one_and_more_processes(
    kind: str, sizes: tuple[int, ...], finished: Path, untidy: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(java, "JAVA", "java")
    assert run(short(finished / kind, untidy, tmp_path / "1")) == 0
    alone = content(tmp_path / "1")
    printed = capsys.readouterr().out
    assert "cider_in_domain" in printed and "meteor: java does not work" in printed
    assert alone[0]["metrics"]["meteor"] is None and len(alone[1]) == 6
    page = (tmp_path / "1" / "report.html").read_text()
    assert "CIDEr" in page and "The worst" in page and "tokenizer: " in page
    assert "pycocoevalcap" in json.loads((tmp_path / "1" / "metrics.json").read_text())["versions"]
    for size in sizes:
        Forked(run, short(finished / kind, untidy, tmp_path / str(size)), size).finish()
        assert content(tmp_path / str(size)) == alone


def test_nothing_begins_without_the_package(
    finished: Path, untidy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "pycocoevalcap" else find(name, *args),
    )
    assert run(short(finished / "stage1", untidy, tmp_path / "x")) == 2
    assert "pip install 'blip2-train[captions]'" in capsys.readouterr().err
    assert not (tmp_path / "x" / "metrics.json").exists()
    assert not (tmp_path / "x" / "parts").exists()
