"""`task=classify`, zero-shot classification by prompts.

Proven: accuracies equal a loop over images, queries, classes and templates; labels are numbers or
names, and samples without a known one are skipped and counted; no captions are needed; ties count
against us; classes and templates come from files of three kinds; their content, not only their
name, says whether results may be taken; what cannot be is refused with one sentence.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from splits import make_split, open_split

import blip2_train
from blip2_train.data.pool import Reading
from blip2_train.data.transforms import EvalTransform
from blip2_train.errors import UserError
from blip2_train.evaluate import run
from blip2_train.evaluation.classify_task import ClassifyTask, accuracies, ranks_of
from blip2_train.evaluation.inference import Blip2
from blip2_train.evaluation.task import Outcome
from blip2_train.evaluation.work import Work

CLASSES = ["red circle", "Grünes Dreieck", "blue square", "a star", "nothing at all", "cat", "dog"]
TEMPLATES = ["a photo of a {}", "{}", "many of {} there"]
LABELS: list[Any] = [0, "blue square", 6, "cat", 3, 5, 1, "Grünes Dreieck"]
BAD: list[Any] = [7, -1, "wolf", True, 1.0, None, [1], ...]


@pytest.fixture(scope="module")
def split(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = [{"label": label, "captions": ...} for label in [*LABELS, *BAD]]
    changes.insert(3, {"jpg": b"no picture", "label": 0})
    return make_split(shards, tmp_path_factory.mktemp("classify") / "s", changes)


def evaluated(blip2: Blip2, split: Path, parts: Path, **settings: Any) -> Outcome:
    task = ClassifyTask(**({"classes": CLASSES, "templates": TEMPLATES} | settings))
    task.batch_size, task.samples = 3, 2
    task.check(blip2)
    reading = Reading(need_captions=task.need_captions)
    images = open_split(split, EvalTransform(blip2.image_size), reading=reading, extra=task.extra)
    return task.run(blip2, images, Work(parts, {}))


def naive(blip2: Blip2, split: Path) -> dict[str, float]:
    images = open_split(
        split, EvalTransform(32), reading=Reading(need_captions=False), extra=["label"]
    )
    known = [n for n in range(len(images)) if n < 9 and n != 3]
    ranks, labels = [], []
    for n, label in zip(known, LABELS, strict=True):
        number = CLASSES.index(label) if isinstance(label, str) else label
        scores = []
        for name in CLASSES:
            feats = [blip2.encode_text([t.replace("{}", name)])[0] for t in TEMPLATES]
            mean = sum(feats) / len(feats)  # type: ignore[arg-type]
            mean = mean / mean.norm()  # type: ignore[union-attr]
            queries = blip2.encode_image(images[n].image[None])[0]  # type: ignore[union-attr]
            scores.append(max((query @ mean).item() for query in queries))
        ranks.append(sum(s >= scores[number] for k, s in enumerate(scores) if k != number))
        labels.append(number)
    of_class = [[r < 1 for r, k in zip(ranks, labels, strict=True) if k == c] for c in range(7)]
    means = [sum(rights) / len(rights) for rights in of_class if rights]
    return {
        "top1": 100 * sum(r < 1 for r in ranks) / 8,
        "top5": 100 * sum(r < 5 for r in ranks) / 8,
        "top1_per_class": 100 * sum(means) / len(means),
    }


@pytest.mark.parametrize("kind", ["stage1", "clip"])
def test_it_equals_a_loop(kind: str, finished: Path, split: Path, tmp_path: Path) -> None:
    blip2 = blip2_train.load(finished / kind)
    outcome = evaluated(blip2, split, tmp_path)
    assert outcome.metrics == pytest.approx(naive(blip2, split))
    assert outcome.counts == {
        "images": 8, "classes": 7, "classes with images": 6, "templates": 3, "skipped": 9,
    }  # fmt: skip
    reasons = [line["reason"] for line in outcome.skipped]
    assert sum("is none of the 7 classes" in reason for reason in reasons) == 7
    assert sum("has no 'label'" in reason for reason in reasons) == 1
    assert outcome.skipped[-1] == {
        "shard": "own/test-000003.tar", "key": "s016", "reason": "its json has no 'label'",
    }  # fmt: skip
    assert len(outcome.best) == len(outcome.worst) == 2
    row = outcome.best[0]
    assert len(row.texts) == 3 and row.truth[0] in CLASSES


def test_ties_and_no_numbers_count_against_us() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 3.0], [torch.nan, 0.0, 0.0], [3, 2, 1]])
    rank, margin = ranks_of(scores, torch.tensor([0, 0, 0, 0]))
    assert rank.tolist() == [1, 1, 2, 0]
    assert margin[[0, 1, 3]].tolist() == [0.0, -1.0, 1.0]
    assert ranks_of(torch.zeros(1, 1), torch.tensor([0]))[0].tolist() == [0]


def test_accuracies() -> None:
    found = accuracies(torch.tensor([0, 0, 4, 5]), torch.tensor([0, 0, 0, 3]))
    assert found == pytest.approx({"top1": 50, "top5": 75, "top1_per_class": 100 / 3})


def test_lists_from_files(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("\n".join(CLASSES) + "\n\n", encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps(CLASSES))
    (tmp_path / "c.yaml").write_text("".join(f"- {name}\n" for name in CLASSES))
    (tmp_path / "t.json").write_text(json.dumps(TEMPLATES))
    want = ClassifyTask(CLASSES, TEMPLATES)
    for name in ("c.txt", "c.json", "c.yaml"):
        task = ClassifyTask(str(tmp_path / name), str(tmp_path / "t.json"))
        assert task.classes == CLASSES and task.templates == TEMPLATES
        assert task.identity() == want.identity()
    assert ClassifyTask(CLASSES[1:], TEMPLATES).identity() != want.identity()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": []}, "must be a list of texts"),
        ({"classes": ["a", 3]}, "must be a list of texts"),
        ({"classes": ["a", " "]}, "none of them empty"),
        ({"classes": ["a", "b", "a"]}, "has 'a' twice"),
        ({"classes": "/nowhere.txt"}, r"task\.classes=/nowhere\.txt cannot be read"),
        ({"templates": ["a photo"]}, "must have {} once"),
        ({"templates": ["{} {}"]}, "must have {} once"),
        ({"templates": 3}, "must be a list of texts"),
        ({"label": ""}, "must be the name of a field"),
    ],
)
def test_what_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ClassifyTask(**({"classes": ["a", "b"]} | settings))


def test_damaged_files_of_classes(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    for content in (b"{", b"\xff\xfe\x00", b'{"a": 1}', b"- !!python/object:os.system x"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"task\.classes"):
            ClassifyTask(str(path))


def test_no_image_has_a_label(finished: Path, shards: Path, tmp_path: Path) -> None:
    bare = make_split(shards, tmp_path / "s", [None, None])
    with pytest.raises(UserError, match=r"none of the 2 images can be used.*has no 'class'"):
        evaluated(blip2_train.load(finished / "clip"), bare, tmp_path / "parts", label="class")


def test_the_command(finished: Path, split: Path, tmp_path: Path, capsys: Any) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(CLASSES), encoding="utf-8")
    words = [
        "task=classify", f"ckpt={finished / 'stage1'}", "data=synthetic", "accelerator=cpu",
        f"data.validation.shards={split}", f"task.classes={classes}", f"out={tmp_path / 'out'}",
        "data.num_workers=0",
    ]  # fmt: skip
    assert run(words) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(found["metrics"]) == {"top1", "top5", "top1_per_class"}
    assert found["counts"]["skipped"] == 9
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 9
    assert run(words) == 0
    classes.write_text("\n".join(CLASSES[::-1]), encoding="utf-8")
    capsys.readouterr()
    assert run(words) == 2  # the same file name, other classes
    assert "task.classes and templates" in capsys.readouterr().err
