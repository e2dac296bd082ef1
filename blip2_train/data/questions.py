"""Questions about images: what a sample holds of them, and readers of the published JSON formats.

A shard sample has them in its json, beside the captions or in their place:

    "questions": [{"question_id": 42, "question": "is it open?", "answers": ["yes", "no", ...],
                   "answer_type": "yes/no", "question_type": "is it"}, ...]

with one answer for each annotator (VQAv2, OK-VQA: ten, GQA: one; none where they are not
published), and the types where the annotations have them. Text stays as annotated.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2_train.data.annotations import (
    Annotations,
    Record,
    is_unicode,
    list_of_objects,
    load_json,
    text_of,
)
from blip2_train.errors import UserError

MAX_QUESTIONS = 10_000  # of one image
TYPES = ("answer_type", "question_type")


@dataclass(frozen=True)
class Question:
    """A question about an image."""

    id: int | str
    text: str  # verbatim; may be blank
    answers: list[str]  # one for each annotator; empty where they are not known
    answer_type: str = ""  # VQAv2: yes/no, number, other
    question_type: str = ""  # VQAv2: its first words; GQA: query, verify, ...


def parse_questions(value: Any) -> list[Question]:
    """Read the `questions` of a sample's json.

    Args:
        value: what stands there; None: the sample has none.

    Raises:
        ValueError: it is not as described above; a few words say what.
    """
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError("questions are not a list of objects")
    if len(value) > MAX_QUESTIONS:
        raise ValueError(f"oversized: {len(value)} questions")
    return [_question(entry) for entry in value]


def _question(entry: dict[str, Any]) -> Question:
    number, answers = entry.get("question_id"), entry.get("answers")
    if isinstance(number, bool) or not isinstance(number, int | str):
        raise ValueError("a question has no question_id")
    answers = [] if answers is None else answers
    types = {name: entry.get(name) or "" for name in TYPES}
    texts = [number if isinstance(number, str) else "", entry.get("question"), *types.values()]
    if not isinstance(answers, list) or not all(map(is_unicode, [*texts, *answers])):
        raise ValueError("questions, answers or their types are not text")
    return Question(number, entry["question"], answers, **types)


@dataclass
class _Asked:
    """The questions of one image, as they will be stored."""

    image_id: Any
    questions: list[dict[str, Any]] = field(default_factory=list)


class _Collector:
    """Groups questions by image, images in order of first appearance."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._images: dict[str, _Asked] = {}
        self._ids: set[int | str] = set()
        self._problems: list[tuple[str, str]] = []

    def problem(self, where: object, reason: str) -> None:
        self._problems.append((f"{self.path.name}:{where}", reason))

    def add(self, image: str, image_id: Any, entry: dict[str, Any]) -> None:
        """Add a question in the form of a shard, if it can be read as such."""
        where = f"question {entry['question_id']}"
        try:
            question = _question(entry)
        except ValueError as error:
            return self.problem(where, str(error))
        if question.id in self._ids:
            return self.problem(where, "question id stands there twice: only the first is kept")
        if not question.text.strip():
            self.problem(where, "empty question: kept, it wants an answer all the same")
        self._ids.add(question.id)
        self._images.setdefault(image, _Asked(image_id)).questions.append(entry)

    def finish(self, split: str) -> Annotations:
        records = [
            Record(image, asked.image_id, [], split, asked.questions)
            for image, asked in self._images.items()
        ]
        return Annotations(records, self._problems)


def read_vqa(path: Path, annotations: Path | None, split: str) -> Annotations:
    """Read questions of the VQA format (VQAv2, OK-VQA), and their annotations.

    An image is called by the entry's own `image`, or as COCO calls it:
    `COCO_train2014_000000000009.jpg` for image 9 of `data_subtype` train2014.

    Args:
        path: `v2_OpenEnded_mscoco_val2014_questions.json` and the like.
        annotations: `v2_mscoco_val2014_annotations.json` and the like; None: there are none, as of
            test splits.
        split: of all its images.

    Raises:
        UserError: not such files.
    """
    data = load_json(path)
    questions = list_of_objects(path, data, "questions", {"question_id", "question", "image_id"})
    subset = data.get("data_subtype")
    if isinstance(subset, str):
        subset = subset.replace("-dev", "")  # test-dev2015 is about images of test2015
    collector = _Collector(path)
    known = {} if annotations is None else _annotations(annotations)
    for asked in questions:
        if "image" in asked:
            image = text_of(path, asked, "image")
        elif not isinstance(subset, str):
            raise UserError(
                f'{path} does not say which images it is about: it has no "data_subtype", and its '
                'questions have no "image"'
            )
        elif isinstance(asked["image_id"], int):
            image = f"COCO_{subset}_{asked['image_id']:012d}.jpg"
        else:
            raise UserError(f"{path} has another schema: {asked['image_id']!r} is no COCO image id")
        entry = {"question_id": asked["question_id"], "question": asked["question"], "answers": []}
        found = known.get(_key(asked["question_id"]))
        if found is not None:
            entry["answers"] = _answers(collector, asked["question_id"], found)
            entry |= {name: found[name] for name in TYPES if found.get(name)}
        elif annotations is not None:
            collector.problem(
                f"question {asked['question_id']}", "no annotation: kept without answers"
            )
        collector.add(image, asked["image_id"], entry)
    asked_about = {_key(asked["question_id"]) for asked in questions}
    for number in known:
        if number not in asked_about:
            collector.problem(f"annotation of question {number}", "unknown question")
    return collector.finish(split)


def read_gqa(path: Path, split: str) -> Annotations:
    """Read questions of GQA: an object of them by id.

    Args:
        path: `testdev_balanced_questions.json` and the like.
        split: of all its images.

    Raises:
        UserError: not such a file.
    """
    data = load_json(path)
    if not isinstance(data, dict) or not data:
        raise UserError(f"{path} has another schema: it should be an object of questions by id")
    entries = list_of_objects(path, {"": list(data.values())}, "", {"question", "imageId"})
    collector = _Collector(path)
    for number, asked in zip(data, entries, strict=True):
        image = text_of(path, asked, "imageId")
        answer, types = asked.get("answer"), asked.get("types")
        entry = {
            "question_id": number,
            "question": asked["question"],
            "answers": [] if answer is None else [answer],
        }
        if isinstance(types, dict) and types.get("structural"):
            entry["question_type"] = types["structural"]
        collector.add(f"{image}.jpg", image, entry)
    return collector.finish(split)


def _annotations(path: Path) -> dict[str, dict[str, Any]]:
    entries = list_of_objects(path, load_json(path), "annotations", {"question_id", "answers"})
    return {_key(entry["question_id"]): entry for entry in entries}


def _answers(collector: _Collector, number: Any, found: dict[str, Any]) -> list[str]:
    """The answers of an annotation; of those that are no text it is said so."""
    answers = found["answers"] if isinstance(found["answers"], list) else []
    words = [one.get("answer") if isinstance(one, dict) else one for one in answers]
    good = [sys.intern(word) for word in words if is_unicode(word)]  # most stand there often
    if len(good) < len(words) or not isinstance(found["answers"], list):
        collector.problem(f"annotation of question {number}", "answers are not all text")
    return good


def _key(number: Any) -> str:
    """Of a question in either file; some published files have numbers in one, text in the other."""
    return str(number)
