"""blip2-evaluate task=vqa: the whole command on tiny models of stage 2.

Proven: every question of a split is answered, zero-shot by the paper's prompt and by a model whose
Q-Former reads it; accuracy, counts and files of results are what the metrics make of the answers;
two processes, another batch size and a run that was stopped give the same; each image is decoded
once per batch; without annotations there is a file and no accuracy; images that cannot be seen
count as unanswered; what cannot be is refused in one sentence.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import question_shards, vqa_run
from forked import Forked
from tiny import tiny_run, tiny_stage_runs, train_in_process

import blip2_train
from blip2_train.data.batch import EvalSample
from blip2_train.data.index import read_index, write_index
from blip2_train.data.pool import Reading
from blip2_train.data.shards import ShardReader, write_shard
from blip2_train.data.source import open_source
from blip2_train.data.stream import EvalStream
from blip2_train.data.transforms import EvalTransform
from blip2_train.errors import UserError
from blip2_train.evaluate import run
from blip2_train.evaluation.inference import Blip2
from blip2_train.evaluation.task import Outcome
from blip2_train.evaluation.vqa_metrics import normalise, vqa_accuracy
from blip2_train.evaluation.vqa_task import VqaTask
from blip2_train.evaluation.work import Work


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return question_shards(tmp_path_factory.mktemp("asked") / "synthetic")


@pytest.fixture(scope="module")
def runs(asked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`aware` reads questions, `plain` never saw one, `stage1` has no language model."""
    folder = tmp_path_factory.mktemp("vqa-runs")
    short = {"trainer.max_steps": 2, "validation.every": "null"}
    assert train_in_process(vqa_run(asked, folder, "aware", **short)) == 0
    words = tiny_stage_runs(asked, folder, **short)["stage2"]
    assert train_in_process([*words, "run.name=plain"]) == 0
    assert train_in_process(tiny_run(asked, folder, "stage1", **short)) == 0
    return folder


def words(runs: Path, name: str, out: Path, shards: Path, *more: str, split: str = "novel") -> list:
    return [
        "task=vqa", f"ckpt={runs / name}", "data=synthetic", f"data.validation.shards={shards}",
        f"split={split}", f"out={out}", "data.num_workers=0", "accelerator=cpu", "samples=2",
        "task.num_beams=2", "task.max_new_tokens=4", *more,
    ]  # fmt: skip


def results(out: Path, name: str = "vqa_synthetic_novel_results.json") -> Any:
    return json.loads((out / name).read_text())


def metrics(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


def truth(shards: Path, split: str = "novel") -> dict[str, dict[str, Any]]:
    found = {}
    for info in read_index(shards).values():
        reader = ShardReader(shards / info.name, info, need_captions=False)
        for number in range(len(reader) if info.split == split else 0):
            found |= {one["question_id"]: one for one in reader.read(number).meta["questions"]}
    return found


@pytest.mark.parametrize("name", ["plain", "aware"])
def test_every_question_is_answered_and_scored(
    name: str, asked: Path, runs: Path, tmp_path: Path
) -> None:
    assert run(words(runs, name, tmp_path / "a", asked)) == 0
    given, people = results(tmp_path / "a"), truth(asked)
    assert [set(one) for one in given] == [{"question_id", "answer"}] * 60
    assert {one["question_id"] for one in given} == set(people)
    assert all(one["answer"] == normalise(one["answer"]) for one in given)
    scores = [vqa_accuracy(one["answer"], people[one["question_id"]]["answers"]) for one in given]
    found = metrics(tmp_path / "a")
    assert found["metrics"]["vqa_accuracy"] == pytest.approx(100 * sum(scores) / 60)
    assert set(found["metrics"]) == {"vqa_accuracy", "vqa_accuracy_other"}
    assert found["counts"] == {
        "images": 12, "questions": 60, "scored": 60, "unanswered": 0, "skipped": 0,
        "repeated questions": 0,
    }  # fmt: skip
    kinds = results(tmp_path / "a", "vqa_synthetic_novel_by_question_type.json")
    assert set(kinds) == {"background", "colour", "position", "shape", "size"}
    page = (tmp_path / "a" / "report.html").read_text()
    assert "(10)" in page and "data:image" in page and "asked" in page
    # the same on two processes, in batches that cut through images, with a loader process
    other = words(runs, name, tmp_path / "b", asked, "batch_size=7", "data.num_workers=1")
    Forked(run, other, 2).finish()
    assert results(tmp_path / "b") == given
    assert metrics(tmp_path / "b")["metrics"] == found["metrics"]


# -- on splits that are not tidy, in this process -------------------------------------------------


def split(shards: Path, folder: Path, metas: list[dict[str, Any]]) -> Path:
    """Images of `shards`' novel, each with this json; a `jpg` in it is the image."""
    info = next(info for info in read_index(shards).values() if info.split == "novel")
    reader = ShardReader(shards / info.name, info)
    folder.mkdir()
    samples = [
        {
            "__key__": f"k{n}",
            "jpg": meta.get("jpg", reader.read(n % 12).image),
            "json": {key: value for key, value in meta.items() if key != "jpg"},
        }
        for n, meta in enumerate(metas)
    ]
    write_index(folder, [write_shard(folder / "test-000000.tar", samples)])
    return folder


def ask(number: Any, text: str, *answers: str, **kinds: str) -> dict[str, Any]:
    return {"question_id": number, "question": text, "answers": list(answers), **kinds}


def stream(folder: Path, size: int, name: str = "own") -> EvalStream:
    return EvalStream(
        open_source(name, folder, "test"),
        EvalTransform(size),
        reading=Reading(need_captions=VqaTask.need_captions),
        extra=VqaTask.extra,
    )


def evaluated(
    blip2: Blip2,
    folder: Path,
    parts: Path,
    *,
    batch_size: int = 2,
    samples: int = 3,
    **settings: Any,
) -> Outcome:
    task = VqaTask(**{"num_beams": 1, "max_new_tokens": 3, **settings})
    task.batch_size, task.samples = batch_size, samples
    task.check(blip2)
    return task.run(blip2, stream(folder, blip2.image_size), Work(parts, {}))


class Speaking:
    """Stands for the model's `generate`: answers what it is told to, and notes what it is asked."""

    def __init__(self, blip2: Blip2, monkeypatch: pytest.MonkeyPatch, says: dict[str, str]) -> None:
        self.says = says
        self.calls: list[dict[str, Any]] = []
        monkeypatch.setattr(blip2, "generate", self)

    def __call__(self, images: Any, prompts: list[str], **settings: Any) -> list[str]:
        self.calls.append({"images": len(images), "prompts": prompts, **settings})
        return [self.says[prompt] for prompt in prompts]


@pytest.fixture
def plain(runs: Path) -> Blip2:
    return blip2_train.load(runs / "plain")


UNTIDY = [
    {"questions": [ask(1, "Is it RED?", *["yes"] * 10, answer_type="yes/no"),
                   ask(2, "How many?", *["2"] * 3, *["3"] * 7, answer_type="number")]},
    {"captions": ["no question"]},
    {"questions": [ask("é3", "Über?", "x", "b")], "jpg": b"no image"},
    {"questions": []},
    {"questions": 5},
    {"questions": [ask(4, "What {} is it?", "a cat", *["dog"] * 9, answer_type="other"),
                   ask(5, "", "x"), ask(6, "Who?"), ask(1, "is it red?", "no")]},
]  # fmt: skip


def test_an_untidy_split(
    plain: Blip2, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = split(asked, tmp_path / "s", UNTIDY)
    speaking = Speaking(
        plain,
        monkeypatch,
        {
            "Question: is it red? Answer:": "Yes.",
            "Question: how many? Answer:": "two",
            "Question: what {} is it? Answer:": "The Cat",
            "Question:  Answer:": "x",
            "Question: who? Answer:": "me",
        },
    )
    outcome = evaluated(plain, folder, tmp_path / "parts", batch_size=4)
    # yes: 1; two of three: 0.9; an image that cannot be seen: 0; cat of one: 0.3; alone: 0
    assert outcome.metrics == pytest.approx(
        {
            "vqa_accuracy": 100 * (1 + 0.9 + 0 + 0.3 + 0) / 5,
            "vqa_accuracy_yes_no": 100,
            "vqa_accuracy_number": 90,
            "vqa_accuracy_other": 30,
        }
    )
    assert outcome.counts == {
        "images": 3, "questions": 6, "scored": 5, "unanswered": 1, "skipped": 2,
        "repeated questions": 1,
    }  # fmt: skip
    assert [(line["key"], line["reason"].split(":")[0]) for line in outcome.skipped] == [
        ("k4", "questions are not a list of objects"), ("k2", "not a readable image"),
    ]  # fmt: skip
    assert outcome.files["vqa_own_test_results.json"] == [
        {"question_id": 1, "answer": "yes"},
        {"question_id": 2, "answer": "2"},
        {"question_id": "é3", "answer": ""},
        {"question_id": 4, "answer": "cat"},
        {"question_id": 5, "answer": "x"},
        {"question_id": 6, "answer": "me"},
    ]
    # batches of four questions: each image once, and who asks about which
    assert [(c["images"], c["image_of"]) for c in speaking.calls] == [(2, [0, 0, 1]), (1, [0, 0])]
    settings = {k: speaking.calls[0][k] for k in ("num_beams", "length_penalty", "questions")}
    assert settings == {"num_beams": 1, "length_penalty": -1.0, "questions": None}
    assert outcome.best[0].said == {"says": "Yes."} and outcome.best[0].notes["accuracy"] == "100"
    assert outcome.worst[0].notes["people"] == "x (1)"
    # what the model said, letter by letter: nobody's annotators all said "Yes."
    verbatim = evaluated(plain, folder, tmp_path / "verbatim", normalise=False)
    assert verbatim.metrics["vqa_accuracy_yes_no"] == 0
    assert verbatim.metrics["vqa_accuracy_number"] == pytest.approx(90)
    assert verbatim.files["vqa_own_test_results.json"][3] == {"question_id": 4, "answer": "The Cat"}


def test_the_papers_protocol(plain: Blip2, asked: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = split(asked, tmp_path / "s", [{"questions": [ask(1, "who?", "me")]}])
    prompt = "Question: who? {} answer:"
    said = {f"Question: who? {word}:": "me" for word in ("Answer", "Short answer")}
    speaking = Speaking(plain, monkeypatch, said | {"who": "me"})
    task = VqaTask()
    task.run(plain, stream(folder, plain.image_size), Work(tmp_path / "a", {}))
    assert speaking.calls[0] == {
        "images": 1, "prompts": ["Question: who? Answer:"], "questions": None, "image_of": [0],
        "num_beams": 5, "length_penalty": -1.0, "max_new_tokens": 10,
    }  # fmt: skip
    monkeypatch.setattr(plain.model.language_model, "is_encoder_decoder", True)
    task.run(plain, stream(folder, plain.image_size), Work(tmp_path / "b", {}))
    assert speaking.calls[1]["prompts"] == [prompt.format("Short")]


def test_gqa(plain: Blip2, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metas = [{"source": "gqa", "questions": [ask("01", "a?", "t-shirt"), ask("02", "b?", "yes")]}]
    folder = split(asked, tmp_path / "s", metas)
    says = {"Question: a? Answer:": "T-Shirt.", "Question: b? Answer:": "no"}
    Speaking(plain, monkeypatch, says)
    outcome = evaluated(plain, folder, tmp_path / "parts")
    assert outcome.metrics == {"gqa_accuracy": 50.0}
    assert outcome.files["vqa_own_test_results.json"] == [
        {"questionId": "01", "prediction": "t-shirt"}, {"questionId": "02", "prediction": "no"},
    ]  # fmt: skip
    forced = evaluated(plain, folder, tmp_path / "forced", benchmark="vqa")
    assert forced.metrics == {"vqa_accuracy": 0.0}  # a single annotator has no others


def test_without_annotations_there_is_a_file_alone(
    plain: Blip2, asked: Path, tmp_path: Path
) -> None:
    metas = [{"questions": [ask(number, "what?")]} for number in range(3)]
    outcome = evaluated(plain, split(asked, tmp_path / "s", metas), tmp_path / "parts")
    assert outcome.metrics == {} and outcome.counts["scored"] == 0
    assert "no accuracy" in outcome.text and len(outcome.best) == 3 and outcome.worst == []
    (name,) = outcome.files
    assert [one["question_id"] for one in outcome.files[name]] == [0, 1, 2]
    one = split(asked, tmp_path / "one", metas[:1])
    assert evaluated(plain, one, tmp_path / "parts-1", samples=0).best == []


def test_what_is_finished_is_not_answered_again(
    plain: Blip2, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metas = [{"questions": [ask(n, f"what {n}?", "x", "y")]} for n in range(6)]
    folder = split(asked, tmp_path / "s", metas)
    speaking = Speaking(plain, monkeypatch, {})
    speaking.says = {f"Question: what {n}? Answer:": str(n) for n in range(4)}
    with pytest.raises(KeyError):
        evaluated(plain, folder, tmp_path / "parts")
    assert len(speaking.calls) == 3
    speaking.says |= {f"Question: what {n}? Answer:": str(n) for n in (4, 5)}
    outcome = evaluated(plain, folder, tmp_path / "parts")
    assert len(speaking.calls) == 4
    results = outcome.files["vqa_own_test_results.json"]
    assert [one["answer"] for one in results] == ["0", "1", "2", "3", "4", "5"]
    # other batches are other work
    again = evaluated(plain, folder, tmp_path / "parts", batch_size=4)
    assert len(speaking.calls) == 6 and again.files == outcome.files


def test_what_cannot_be(plain: Blip2, runs: Path, asked: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(UserError, match="needs stage2"):
        VqaTask().check(blip2_train.load(runs / "stage1"))
    none = split(asked, tmp_path / "s", [{"captions": ["x"]}])
    with pytest.raises(UserError, match="has no question"):
        evaluated(plain, none, tmp_path / "parts")
    for settings, said in [
        ({"prompt": "Question:"}, "must have one {}"),
        ({"prompt": 3}, "must have one {}"),
        ({"benchmark": "okvqa"}, "auto, vqa, gqa"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"length_penalty": "low"}, "length_penalty=low"),
        ({"normalise": "yes"}, "normalise=yes"),
    ]:
        with pytest.raises(UserError, match=said):
            VqaTask(**settings)
    out = tmp_path / "out"
    assert run(words(runs, "stage1", out, asked)) == 2
    assert "needs stage2" in capsys.readouterr().err


# -- the model -------------------------------------------------------------------------------------


def test_generate_with_questions(runs: Path, plain: Blip2, asked: Path) -> None:
    aware = blip2_train.load(runs / "aware")
    assert aware.asks and not plain.asks and plain.tokenizer is None
    novel = EvalStream(open_source("n", asked, "novel"), EvalTransform(aware.image_size))
    items = [novel[number] for number in range(3)]
    pixels = [item.image for item in items if isinstance(item, EvalSample)]
    images, prompts = torch.stack(pixels), ["Question: a? Answer:"] * 3
    search: dict[str, Any] = {"num_beams": 1, "max_new_tokens": 4}
    said = aware.generate(images, prompts, questions=["Where?", "what colour is it?", ""], **search)
    assert len(said) == 3
    shared = aware.generate(
        images[:1], prompts, questions=["Where?"] * 3, image_of=[0, 0, 0], **search
    )
    assert shared == [said[0]] * 3
    with pytest.raises(UserError, match="give questions="):
        aware.generate(images, prompts)
    with pytest.raises(UserError, match="leave questions= out"):
        plain.generate(images, prompts, questions=["a"] * 3)
    with pytest.raises(UserError, match="do not agree"):
        aware.generate(images, prompts, questions=["a"])
    with pytest.raises(UserError, match="see generate"):
        aware.caption(images)
