"""Visual question answering: VQAv2, OK-VQA and GQA, by a model of stage 2.

With a model that never saw a question this is the paper's zero-shot protocol (section 4.1): a
prompt, five beams, a length penalty of -1. One that was fine-tuned on questions gets them in its
Q-Former as well.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from blip2_train.data.batch import EvalSample, Skipped
from blip2_train.data.question_batch import HOLE, ask
from blip2_train.data.questions import Question, parse_questions
from blip2_train.data.stream import EvalStream
from blip2_train.data.text import clean_question
from blip2_train.errors import UserError
from blip2_train.evaluation.inference import Blip2
from blip2_train.evaluation.samples import Row, spread
from blip2_train.evaluation.task import Outcome, Task
from blip2_train.evaluation.vqa_metrics import (
    Scored,
    by_kind,
    gqa_accuracy,
    mean_accuracy,
    normalise,
    vqa_accuracy,
)
from blip2_train.evaluation.work import Work

log = logging.getLogger(__name__)

PROMPTS = {False: "Question: {} Answer:", True: "Question: {} Short answer:"}  # encoder-decoder
BENCHMARKS = ("auto", "vqa", "gqa")
LISTED_AT_ONCE = 1024  # images whose questions are read at a time


class Asked(NamedTuple):
    """A question of an image of the stream."""

    item: int
    question: Question


class Answered(NamedTuple):
    """A question with what was answered."""

    item: int
    question: Question
    said: str | None  # by the model; None where the image could not be seen
    answer: str  # as it is handed in
    accuracy: float | None  # None where the answers of people are not known


class VqaTask(Task):
    """Answers every question of a split, and scores the answers where the annotators' are known.

    Args:
        prompt: around the question, with {} in its place; None: as the model reads it.
        num_beams: 1: greedy.
        length_penalty: see `LanguageModel.generate`.
        max_new_tokens: of an answer.
        benchmark: "vqa", "gqa" or "auto".
        normalise: answers, before they are scored and handed in.

    Raises:
        UserError: a value that cannot be.
    """

    extra = ("questions", "source")
    need_captions = False

    def __init__(
        self,
        prompt: str | None = None,
        num_beams: int = 5,
        length_penalty: float = -1.0,
        max_new_tokens: int = 10,
        benchmark: str = "auto",
        normalise: bool = True,
    ) -> None:
        if prompt is not None and (not isinstance(prompt, str) or prompt.count(HOLE) != 1):
            raise UserError(f"task.prompt={prompt} must have one {HOLE}, for the question")
        if benchmark not in BENCHMARKS:
            raise UserError(f"task.benchmark={benchmark} must be one of {', '.join(BENCHMARKS)}")
        if not isinstance(normalise, bool):
            raise UserError(f"task.normalise={normalise} must be true or false")
        for name, value in (("num_beams", num_beams), ("max_new_tokens", max_new_tokens)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"task.{name}={value} must be a whole number of at least 1")
        if not isinstance(length_penalty, int | float) or isinstance(length_penalty, bool):
            raise UserError(f"task.length_penalty={length_penalty} must be a number")
        self.prompt = prompt
        self.search = {
            "num_beams": num_beams,
            "length_penalty": float(length_penalty),
            "max_new_tokens": max_new_tokens,
        }
        self.benchmark = benchmark
        self.normalise = normalise

    def check(self, blip2: Blip2) -> None:
        """Refuses a model that speaks without a language model."""
        blip2.needs("stage2")

    def run(self, blip2: Blip2, images: EvalStream, work: Work) -> Outcome:
        """Answers and scores; see `Task.run`."""
        listed = work.map("questions", images.undecoded(), LISTED_AT_ONCE, _listed)
        everything, skipped, sources = _gathered(listed)
        first: dict[str, Asked] = {}  # a server takes each question once
        for one in everything:
            first.setdefault(repr(one.question.id), one)
        asked = list(first.values())
        if not asked:
            raise UserError(
                f"split {images.source.split} of {images.source.name} has no question; prepare it "
                "with blip2-prepare vqa or gqa"
            )
        gqa = self.benchmark == "gqa" or (self.benchmark == "auto" and sources == {"gqa"})
        batches = Batches(images, asked, self.batch_size)
        answer = _Answerer(blip2, self._prompt(blip2), self.search)
        parts = work.map(f"answers-{batches.digest}", batches, 1, answer)
        said = [text for part in parts for text in part["answers"]]
        unseen = {(line["shard"], line["key"]): line for p in parts for line in p["skipped"]}
        answered = [self._scored(one, text, gqa) for one, text in zip(asked, said, strict=True)]
        outcome = _outcome(answered, images.source.name, images.source.split, gqa)
        outcome.skipped = [*skipped, *unseen.values()]
        outcome.counts["skipped"] = len(outcome.skipped)
        outcome.counts["repeated questions"] = len(everything) - len(asked)
        if work.world.rank == 0 and self.samples:
            best, worst = _extremes(answered, self.samples)
            outcome.best = [_row(one, images) for one in best]
            outcome.worst = [_row(one, images) for one in worst]
        return outcome

    def _prompt(self, blip2: Blip2) -> str:
        if self.prompt is not None:
            return self.prompt
        if blip2.asks:
            return blip2.cfg["data"]["prompt"]
        return PROMPTS[blip2.model.language_model.is_encoder_decoder]

    def _scored(self, one: Asked, said: str | None, gqa: bool) -> Answered:
        """A question without an answer counts as answered with nothing, as it does elsewhere."""
        answer = said or ""
        if self.normalise:  # GQA compares letters: marks within words stay
            answer = answer.lower().rstrip(". ") if gqa else normalise(answer)
        accuracy = None
        if people := one.question.answers:
            accuracy = gqa_accuracy(answer, people) if gqa else vqa_accuracy(answer, people)
        return Answered(one.item, one.question, said, answer, accuracy)


def _outcome(answered: Sequence[Answered], name: str, split: str, gqa: bool) -> Outcome:
    """Metrics, counts and files."""
    scored = [
        Scored(one.accuracy, one.question.answer_type, one.question.question_type)
        for one in answered
        if one.accuracy is not None
    ]
    keys = ("questionId", "prediction") if gqa else ("question_id", "answer")
    results = [dict(zip(keys, (one.question.id, one.answer), strict=True)) for one in answered]
    files: dict[str, Any] = {f"vqa_{name}_{split}_results.json": results}
    metrics: dict[str, float] = {}
    text = "No question has answers to compare with: there is no accuracy, only a file of results."
    if scored:
        metric = "gqa_accuracy" if gqa else "vqa_accuracy"
        metrics[metric] = mean_accuracy(scored)
        kinds = by_kind(scored, "answer_type")
        metrics |= {f"{metric}_{_plain(kind)}": value for kind, value in kinds.items()}
        files[f"vqa_{name}_{split}_by_question_type.json"] = by_kind(scored, "question_type")
        text = "Accuracy in percent; what people said, the commonest first."
    else:
        log.info("%s", text)
    counts = {
        "images": len({one.item for one in answered}),
        "questions": len(answered),
        "scored": len(scored),
        "unanswered": sum(one.said is None for one in answered),
    }
    return Outcome(metrics, counts, files, text=text)


def _extremes(answered: Sequence[Answered], count: int) -> tuple[list[Answered], list[Answered]]:
    """The best and the worst; of many that are equally good, some from all over the split."""
    seen = [one for one in answered if one.said is not None]
    known = sorted((one for one in seen if one.accuracy is not None), key=_accuracy)
    if not known:  # none is better than another
        return _spread(seen, count), []
    worst = [] if _accuracy(known[0]) == _accuracy(known[-1]) else _first(known, count)
    return _first(sorted(known, key=_accuracy, reverse=True), count), worst


def _first(ranked: Sequence[Answered], count: int) -> list[Answered]:
    """The first ones; where the last of them is as good as others, some of these."""
    last = _accuracy(ranked[min(count, len(ranked)) - 1])
    equal = [one for one in ranked if _accuracy(one) == last]
    before = list(ranked[: ranked.index(equal[0])])
    return before + _spread(equal, count - len(before))


def _accuracy(one: Answered) -> float:
    assert one.accuracy is not None, "only where people's answers are known"
    return one.accuracy


def _spread(answered: Sequence[Answered], count: int) -> list[Answered]:
    """Some, evenly spaced, of different images where there are so many."""
    by_image = {one.item: one for one in answered}
    pool = list(by_image.values() if len(by_image) >= count else answered)
    return spread(pool, count)


def _row(one: Answered, images: EvalStream) -> Row:
    people = Counter(one.question.answers).most_common()
    notes = {"asked": one.question.text}
    if people:
        notes["people"] = ", ".join(f"{answer} ({count})" for answer, count in people)
        notes["accuracy"] = f"{100 * _accuracy(one):.0f}"
    truth = [answer for answer, _ in people]
    return Row(images.picture(one.item), {"says": one.said or ""}, truth, notes=notes)


class Batches(Dataset[tuple[list[EvalSample | Skipped], list[Asked]]]):
    """Questions in batches of one size, whatever images they are about; each image decoded once.

    Args:
        images: of the split.
        asked: all questions, image by image.
        size: questions of a batch; the last one may have fewer.
    """

    def __init__(self, images: EvalStream, asked: Sequence[Asked], size: int) -> None:
        self.images = images
        self.batches = [asked[start : start + size] for start in range(0, len(asked), size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[list[EvalSample | Skipped], list[Asked]]:
        asked = list(self.batches[number])
        return [self.images[item] for item in dict.fromkeys(one.item for one in asked)], asked

    @property
    def digest(self) -> str:
        """Of how the questions lie in batches."""
        ids = [[(one.item, one.question.id) for one in batch] for batch in self.batches]
        return hashlib.sha256(repr(ids).encode()).hexdigest()[:8]


class _Answerer:
    """What the model says to a batch of questions."""

    def __init__(self, blip2: Blip2, prompt: str, search: dict[str, Any]) -> None:
        self.blip2 = blip2
        self.prompt = prompt
        self.search = search

    def __call__(self, items: list[Any]) -> dict[str, list[Any]]:
        ((samples, asked),) = items
        seen = [sample for sample in samples if isinstance(sample, EvalSample)]
        row = {sample.item: number for number, sample in enumerate(seen)}
        rows = [number for number, one in enumerate(asked) if one.item in row]
        answers: list[str | None] = [None] * len(asked)
        if rows:
            words = self.blip2.cfg["data"]["max_words"]
            texts = [clean_question(asked[number].question.text, words) for number in rows]
            said = self.blip2.generate(
                torch.stack([sample.image for sample in seen]),
                [ask(self.prompt, text) for text in texts],
                questions=texts if self.blip2.asks else None,
                image_of=[row[asked[number].item] for number in rows],
                **self.search,
            )
            for number, text in zip(rows, said, strict=True):
                answers[number] = text
        skipped = [dict(sample) for sample in samples if not isinstance(sample, EvalSample)]
        return {"answers": answers, "skipped": skipped}


def _listed(items: list[EvalSample | Skipped]) -> list[dict[str, Any]]:
    """The questions of images, as plain values."""
    found: list[dict[str, Any]] = []
    for item in items:
        if not isinstance(item, EvalSample):
            found.append({"skipped": dict(item)})
            continue
        try:
            questions = parse_questions(item.extra.get("questions"))
        except ValueError as error:
            shard, _, key = item.key.rpartition("/")
            found.append({"skipped": {"shard": shard, "key": key, "reason": str(error)}})
            continue
        entry = [
            [one.id, one.text, one.answers, one.answer_type, one.question_type] for one in questions
        ]
        source = item.extra.get("source")
        found.append({"item": item.item, "questions": entry, "source": str(source or "")})
    return found


def _gathered(
    parts: Sequence[list[dict[str, Any]]],
) -> tuple[list[Asked], list[dict[str, str]], set[str]]:
    """All questions, image by image; images that cannot be used; and where they are from."""
    lines = [line for part in parts for line in part]
    used = [line for line in lines if "skipped" not in line]
    asked = [Asked(line["item"], Question(*entry)) for line in used for entry in line["questions"]]
    skipped = [line["skipped"] for line in lines if "skipped" in line]
    return asked, skipped, {line["source"] for line in used if line["questions"]}


def _plain(kind: str) -> str:
    """An answer type in a metric's name: yes/no is yes_no."""
    return "".join(letter if letter.isalnum() else "_" for letter in kind.lower())
