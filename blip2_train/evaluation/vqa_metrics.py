"""Accuracy of answers to questions, as the benchmarks compute it.

VQAv2 and OK-VQA: ten people answered each question, and an answer counts as right as far as three
of them gave it (Antol et al., "VQA", 2015). The rules are those of the authors' `vqaEval.py` at
github.com/GT-Vision-Lab/VQA (its present state), odd corners included, because numbers in papers
rest on them:

- Where all annotators gave the same answer, nothing is normalised, not even the case: beside ten
  times "yes" an answer "Yes" is wrong. (The authors' reason: questions about text in the image.)
- A mark is deleted where a space stands on either side of it anywhere in the text, or where the
  text has digits around a comma anywhere; else a space takes its place. So "1,000" is "1000",
  "t-shirt" is "t shirt", and "cat-like -or so" has both of its marks deleted.
- Full stops are deleted, at most 32 of them, but not those in front of a digit: "3.5" and even
  "no.5" stay. (The pattern looks as if it also asked for a digit before; it does not.) Apostrophes
  and colons stay.
- "none" and "zero" are 0, "one" to "ten" are digits, and the articles are left out: an answer that
  is an article alone becomes empty.
- Missing apostrophes are put in ("dont" is "don't"), by a list; one of its entries takes one out.

GQA: one answer each; right is what equals it after the same normalisation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MARKS = ';/[]"{}()=+\\_-><@`,?!'  # in this order
ARTICLES = ("a", "an", "the")
WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(WORDS.split())} | {"none": "0"}
# Each is recognised with any one of its apostrophes missing.
WITH_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in WITH_APOSTROPHES.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
FULL_MARKS = 3  # people who agree with an answer that is right

_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32  # the authors pass a flag where `re.sub` takes a count
_THOUSANDS = re.compile(r"\d,\d")


def normalise(answer: str) -> str:
    """An answer as it is compared: marks, case, number words, articles and contractions.

    Args:
        answer: of a model or a person.

    Returns:
        Lower-case words with single spaces; may be empty.
    """
    return _words(_without_marks(_one_line(answer)))


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """Accuracy of one answer, as the authors' code computes it for VQAv2 and OK-VQA.

    It is the mean over the annotators of min(1, n / 3), where n of the *others* gave the answer: of
    ten people who agree with it 0, 1, 2, 3 and 4 give 0, 0.3, 0.6, 0.9 and 1.

    Args:
        answer: of the model.
        answers: of the annotators, ten as a rule. A single one gives 0, whatever was answered:
            there are no others; see `gqa_accuracy`.

    Raises:
        ValueError: there are no annotators.
    """
    if not answers:
        raise ValueError("a question without answers has no accuracy")
    answer, truth = _one_line(answer), [_one_line(given) for given in answers]
    if len(set(truth)) > 1:
        answer, truth = normalise(answer), [normalise(given) for given in truth]
    agree = [given == answer for given in truth]
    return sum(min(1.0, (sum(agree) - own) / FULL_MARKS) for own in agree) / len(agree)


def gqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """1 where the answer is one of the annotators', both normalised, else 0.

    Args:
        answer: of the model.
        answers: of the annotators; of GQA one.
    """
    return float(normalise(answer) in {normalise(given) for given in answers})


class Scored(NamedTuple):
    """The accuracy of one answer, and of what kind its question is ("" where it is not known)."""

    accuracy: float
    answer_type: str  # VQAv2: yes/no, number, other
    question_type: str


def mean_accuracy(scored: Iterable[Scored]) -> float:
    """In percent.

    Raises:
        ValueError: there are none.
    """
    values = [one.accuracy for one in scored]
    if not values:
        raise ValueError("no question has answers")
    return 100 * sum(values) / len(values)


def by_kind(scored: Sequence[Scored], kind: str) -> dict[str, float]:
    """Mean accuracy of each kind of question, percent.

    Args:
        scored: of all questions.
        kind: `answer_type` or `question_type`; questions without one are left out.

    Returns:
        {kind: mean}, by name.
    """
    kinds = sorted({getattr(one, kind) for one in scored} - {""})
    return {
        name: mean_accuracy(one for one in scored if getattr(one, kind) == name) for name in kinds
    }


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_marks(text: str) -> str:
    thousands = _THOUSANDS.search(text) is not None
    left = text
    for mark in MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        left = left.replace(mark, "" if beside_space or thousands else " ")
    return _FULL_STOP.sub("", left, count=_MOST_FULL_STOPS)


def _words(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    kept = [CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES]
    return " ".join(kept)
