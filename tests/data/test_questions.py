"""Questions in shards, from made-up files of the published formats to samples.

- VQAv2, OK-VQA, GQA and files given by name become shards with the questions of an image together
- test splits have no answers; what does not fit together is listed, never lost silently
- another schema is one UserError that names the file; what is no question is refused in shards
"""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from blip2_train.data.annotations import Record
from blip2_train.data.index import read_index
from blip2_train.data.questions import Question, parse_questions, read_gqa, read_vqa
from blip2_train.data.shards import ShardReader
from blip2_train.errors import UserError
from blip2_train.prepare import main


def dump(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def asked(number: int, image: int, text: str = "what is it?") -> dict[str, Any]:
    return {"question_id": number, "image_id": image, "question": text}


def answered(number: int, *answers: str, **more: str) -> dict[str, Any]:
    given = [
        {"answer": answer, "answer_id": k, "answer_confidence": "yes"}
        for k, answer in enumerate(answers, start=1)
    ]
    return {"question_id": number, "image_id": 0, "answers": given, **more}


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), "red").save(path)


def vqa(root: Path, prefix: str = "v2_") -> Path:
    """Train: image 9 with 2 questions and image 30; test: image 5. All images but 30 are there."""
    kinds = {"answer_type": "yes/no", "question_type": "is it"}
    dump(
        root / f"{prefix}OpenEnded_mscoco_train2014_questions.json",
        {
            "data_subtype": "train2014",
            "questions": [asked(90, 9, "Is it é?"), asked(300, 30), asked(91, 9)],
        },
    )
    dump(
        root / f"{prefix}mscoco_train2014_annotations.json",
        {
            "annotations": [
                answered(91, "a cat"),
                answered(90, *["yes"] * 7, *["no"] * 3, **kinds),
                answered(300, "dog"),
            ]
        },
    )
    dump(
        root / f"{prefix}OpenEnded_mscoco_test-dev2015_questions.json",
        {"data_subtype": "test-dev2015", "questions": [asked(50, 5)]},
    )
    picture(root / "train2014" / "COCO_train2014_000000000009.jpg")
    picture(root / "test2015" / "COCO_test2015_000000000005.jpg")
    return root


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def questions(out: Path, split: str) -> dict[Any, list[Question]]:
    """Of each image id, as a sample has them."""
    found = {}
    for info in read_index(out).values():
        reader = ShardReader(out / info.name, info, need_captions=False)
        for number in range(len(reader) if info.split == split else 0):
            meta = reader.read(number).meta
            assert meta["captions"] == []
            found[meta["image_id"]] = parse_questions(meta["questions"])
    return found


@pytest.mark.parametrize("prefix", ["v2_", ""])
def test_vqa_becomes_shards(tmp_path: Path, prefix: str, capsys: Any) -> None:
    root, out = vqa(tmp_path / "root", prefix), tmp_path / "out"
    assert run("vqa", root, "--out", out, "--workers", 1, "--tokenizer", 60) == 0
    yes = ["yes"] * 7 + ["no"] * 3
    assert questions(out, "train") == {
        9: [
            Question(90, "Is it é?", yes, "yes/no", "is it"),
            Question(91, "what is it?", ["a cat"]),
        ]
    }
    assert questions(out, "testdev") == {5: [Question(50, "what is it?", [])]}
    report = json.loads((out / "report.json").read_text())
    counts = {"records": 2, "samples": 1, "captions": 0, "shards": 1, "questions": 2}
    assert report["splits"]["train"] == counts
    assert report["skipped"] == [{"file": "COCO_train2014_000000000030.jpg", "reason": "missing"}]
    words = (out / "tokenizer" / "vocab.txt").read_text().split()
    assert {"y", "c"} <= set(words)  # of answers and questions
    assert "questions" in capsys.readouterr().out
    assert run("verify", out) == 0
    assert run("vqa", root, "--out", out, "--workers", 1, "--tokenizer", 60) == 0  # again: the same
    again = json.loads((out / "report.json").read_text())
    assert again["splits"] == report["splits"]


def test_files_by_name(tmp_path: Path) -> None:
    """The split is in the name or given; images lie in COCO's folders or side by side."""
    root, out = vqa(tmp_path / "root"), tmp_path / "out"
    asked_file = root / "v2_OpenEnded_mscoco_train2014_questions.json"
    truth = root / "v2_mscoco_train2014_annotations.json"
    images = root / "train2014"
    args = ("vqa", "--questions", asked_file, "--annotations", truth, "--images", images)
    assert run(*args, "--out", out, "--workers", 1) == 0
    assert list(questions(out, "train")) == [9]
    named = ("vqa", "--questions", f"mine={asked_file}", "--images", root, "--out", tmp_path / "b")
    assert run(*named, "--workers", 1) == 0
    assert [one.answers for one in questions(tmp_path / "b", "mine")[9]] == [[], []]


def test_both_sets_in_one_folder_and_files_that_do_not_belong_together(
    tmp_path: Path, capsys: Any
) -> None:
    root, out = vqa(vqa(tmp_path / "root"), prefix=""), tmp_path / "out"
    file = root / "v2_OpenEnded_mscoco_train2014_questions.json"
    for args, message in [
        ([root], "holds VQAv2 and OK-VQA"),
        ([tmp_path], "has no questions"),
        (["--annotations", file, "--images", root], "give --questions as well"),
        (["--questions", file, "--annotations", f"val={file}", "--images", root], "split val"),
        (
            ["--questions", file, "--annotations", file, file, "--images", root],
            "two files of one split",
        ),
    ]:
        assert run("vqa", *args, "--out", out) == 2
        assert message in capsys.readouterr().err
    assert run("gqa", root, "--out", out) == 2
    assert "no questions of GQA" in capsys.readouterr().err


def test_gqa_becomes_shards(tmp_path: Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    entries = {
        "0213": {
            "imageId": "n16", "question": "Is it on?", "answer": "no",
            "types": {"structural": "verify", "semantic": "rel"},
        },
        "0214": {"imageId": "n16", "question": "Where?", "answer": "t-shirt"},
    }  # fmt: skip
    dump(root / "questions" / "testdev_balanced_questions.json", entries)
    dump(root / "test_balanced_questions.json", {"7": {"imageId": "8", "question": "Who?"}})
    picture(root / "images" / "n16.jpg")
    picture(root / "images" / "8.jpg")
    assert run("gqa", root, "--out", out, "--workers", 1) == 0
    assert questions(out, "testdev") == {
        "n16": [
            Question("0213", "Is it on?", ["no"], question_type="verify"),
            Question("0214", "Where?", ["t-shirt"]),
        ]
    }
    assert questions(out, "test") == {"8": [Question("7", "Who?", [])]}


def test_what_does_not_fit_together_is_listed(tmp_path: Path) -> None:
    entries = [asked(1, 9), asked(1, 9), asked(2, 9, " "), asked(3, 9), asked(4, 9)]
    entries.append({"question_id": 5, "image_id": 9, "question": "\ud800"})
    entries.append({"question_id": None, "image_id": 9, "question": "whose?"})
    path = dump(tmp_path / "q.json", {"data_subtype": "val2014", "questions": entries})
    truth = [answered(1, "x"), answered(2, "y"), answered(8, "z")]
    truth.append({"question_id": 3, "answers": [{"answer": 3}, {"answer": "three"}, "3"]})
    annotations = dump(tmp_path / "a.json", {"annotations": truth})
    read = read_vqa(path, annotations, "val")
    (record,) = read.records
    assert record.image == "COCO_val2014_000000000009.jpg" and record.captions == []
    assert [(one["question_id"], one["answers"]) for one in record.questions] == [
        (1, ["x"]), (2, ["y"]), (3, ["three", "3"]), (4, []),
    ]  # fmt: skip
    assert read.problems == [
        ("q.json:question 1", "question id stands there twice: only the first is kept"),
        ("q.json:question 2", "empty question: kept, it wants an answer all the same"),
        ("q.json:annotation of question 3", "answers are not all text"),
        ("q.json:question 4", "no annotation: kept without answers"),
        ("q.json:question 5", "no annotation: kept without answers"),
        ("q.json:question 5", "questions, answers or their types are not text"),
        ("q.json:question None", "no annotation: kept without answers"),
        ("q.json:question None", "a question has no question_id"),
        ("q.json:annotation of question 8", "unknown question"),
    ]


def test_an_image_may_have_a_name_of_its_own(tmp_path: Path) -> None:
    entry = {**asked(1, 9), "image": "folder/x.png"}
    read = read_vqa(dump(tmp_path / "q.json", {"questions": [entry]}), None, "val")
    stored = [{"question_id": 1, "question": "what is it?", "answers": []}]
    assert read.records == [Record("folder/x.png", 9, [], "val", stored)]


@pytest.mark.parametrize(
    "data",
    [
        "{",
        [],
        {"questions": 3},
        {"questions": [3]},
        {"questions": [{"question_id": 1}]},
        {"questions": [asked(1, 9)]},  # of which images?
        {"data_subtype": "val2014", "questions": [{**asked(1, 9), "image_id": "x"}]},
        {"data_subtype": "val2014", "questions": [{**asked(1, 9), "image": ""}]},
    ],
)
def test_another_schema_is_one_user_error(tmp_path: Path, data: Any) -> None:
    path = dump(tmp_path / "q.json", data)
    with pytest.raises(UserError, match=r"q\.json") as caught:
        read_vqa(path, None, "val")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", ["[", [], {}, {"1": 2}, {"1": {"question": "x"}}])
def test_another_schema_of_gqa_is_one_user_error(tmp_path: Path, data: Any) -> None:
    with pytest.raises(UserError, match=r"g\.json"):
        read_gqa(dump(tmp_path / "g.json", data), "val")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (3, "not a list"),
        ([3], "not a list of objects"),
        ([{}], "no question_id"),
        ([{"question_id": True, "question": "x"}], "no question_id"),
        ([{"question_id": 1}], "not text"),
        ([{"question_id": 1, "question": "x", "answers": "yes"}], "not text"),
        ([{"question_id": 1, "question": "x", "answers": [1]}], "not text"),
        ([{"question_id": 1, "question": "x", "answer_type": 4}], "not text"),
        ([{"question_id": "\ud800", "question": "x"}], "not text"),
        ([{"question_id": 1, "question": "x"}] * 10_001, "oversized"),
    ],
)
def test_no_questions_in_a_shard(value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_questions(value)


def test_a_sample_without_questions() -> None:
    assert parse_questions(None) == parse_questions([]) == []
