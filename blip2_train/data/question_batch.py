"""Batches of questions for stage 2: the Q-Former reads the question, the language model answers it.

What the language model reads is put together by `language_batch.py`, with the question as the
prompt of each sample. B: images, T: word pieces of the longest question, rounded up to a bucket.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from blip2_train.data.batch import EvalSample, Sample, Skipped, text_bucket, tokenise
from blip2_train.data.questions import Question, parse_questions
from blip2_train.data.tar import SampleError
from blip2_train.data.text import clean_question
from blip2_train.seeding import stable_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HOLE = "{}"  # where a prompt has the question
NO_ANSWER = "no question with an answer"


def ask(prompt: str, question: str) -> str:
    """The prompt with the question in it; braces of the question stay as they are."""
    return prompt.replace(HOLE, question, 1)


def answered(value: Any, max_words: int) -> list[tuple[str, list[str]]]:
    """The questions of a sample that can be learned from.

    Args:
        value: `questions` of its json.
        max_words: of a question, see `clean_question`.

    Returns:
        Each cleaned question with its answers, outer spaces and blank ones dropped, one for each
        annotator. Questions of which nothing is left, or that have no answer, are not there.

    Raises:
        ValueError: the value is not as shards have it.
    """
    found = []
    for question in parse_questions(value):
        text, answers = clean_question(question.text, max_words), _said(question)
        if text.strip() and answers:
            found.append((text, answers))
    return found


def drawn_question(
    meta: Mapping[str, Any],
    max_words: int,
    epoch: int,
    sample: tuple[Any, ...],
    generator: torch.Generator,
) -> tuple[str, str]:
    """A question of an image and the answer of one of its annotators.

    Of n questions each comes once in n epochs, in an order of the sample's own. Were they drawn
    anew each time, many would wait long: of 5 questions one in 10 for ten epochs.

    Args:
        meta: a sample's json.
        max_words: see `answered`.
        epoch: of the source.
        sample: what the order depends on: seed, source, shard and key.
        generator: chooses the annotator.

    Raises:
        SampleError: the sample has no question that could be learned from.
    """
    try:
        questions = answered(meta.get("questions"), max_words)
    except ValueError as error:
        raise SampleError(str(sample[-1]), str(error)) from None
    if not questions:
        raise SampleError(str(sample[-1]), NO_ANSWER)
    turn, place = divmod(epoch, len(questions))
    order = torch.Generator()
    order.manual_seed(stable_hash("questions", turn, *sample))
    number = int(torch.randperm(len(questions), generator=order)[place])
    question, answers = questions[number]
    return question, answers[int(torch.randint(len(answers), (1,), generator=generator))]


def _said(question: Question) -> list[str]:
    return [answer.strip() for answer in question.answers if answer.strip()]


def question_ids(
    questions: Sequence[str], tokenizer: PreTrainedTokenizerFast, longest: int, bucket: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Word pieces that the Q-Former reads, [CLS] ... [SEP], padded on the right.

    Args:
        questions: B, cleaned.
        tokenizer: see `load_text_tokenizer`.
        longest: word pieces at most; more are cut, [SEP] is kept.
        bucket: T is a multiple of it, but at most `longest`.

    Returns:
        ids and mask, int64 [B, T].
    """
    ids, mask = tokenise(list(questions), tokenizer, longest)
    used = int(mask.sum(dim=1).max()) if len(mask) else 0
    length = text_bucket(used, bucket, longest)
    return ids[:, :length], mask[:, :length]


def collate_questions(
    samples: Sequence[Sample],
    skipped: Sequence[Skipped],
    *,
    collate: Callable[..., Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    max_question_tokens: int,
    bucket: int,
) -> dict[str, Any]:
    """A batch of stage 2 with `question_ids` and `question_mask`, int64 [B, T].

    Args:
        samples: of a `TrainStream` of questions.
        skipped: samples that were replaced.
        collate: puts the rest together, for instance `collate_in_parts`.
        tokenizer: see `load_text_tokenizer`.
        max_question_tokens: [CLS] and [SEP] included.
        bucket: T is a multiple of it.
    """
    questions = [sample.question for sample in samples]
    ids, mask = question_ids(questions, tokenizer, max_question_tokens, bucket)
    return {**collate(samples, skipped), "question_ids": ids, "question_mask": mask}


def collate_eval_questions(
    items: Sequence[EvalSample | Skipped],
    *,
    collate: Callable[..., Mapping[str, Any]],
    prompt: str,
    max_words: int,
) -> dict[str, Any]:
    """An evaluation batch of one answered question of each image, with its commonest answer.

    Images without one are left out and reported, like those that are unusable. As of the other
    evaluation batches of stage 2, `items` are numbers within the stream; `captions` are the answers
    of all annotators, the commonest first, and `questions` what was asked, as it was cleaned.

    Args:
        items: of an `EvalStream` with `extra=("questions",)`.
        collate: `collate_questions` with its settings.
        prompt: see `ask`.
        max_words: of a question.
    """
    samples, numbers = [], []
    skipped = [item for item in items if not isinstance(item, EvalSample)]
    for item in items:
        if not isinstance(item, EvalSample):
            continue
        found = one_answered(item, max_words)
        if isinstance(found, str):
            shard, _, key = item.key.rpartition("/")
            skipped.append({"shard": shard, "key": key, "reason": found})
            continue
        question, answers = found
        numbers.append(item.item)
        samples.append(
            asked_sample(
                question, answers[0], prompt,
                image=item.image, image_id=item.image_id, key=item.key,
            )
        )  # fmt: skip
        samples[-1].captions.extend(answers[1:])
    return {
        **collate(samples, skipped),
        "captions": [sample.captions for sample in samples],
        "questions": [sample.question for sample in samples],
        "items": numbers,
    }


def one_answered(item: EvalSample, max_words: int) -> tuple[str, list[str]] | str:
    """A question of an image that has answers: of one image the first, of the next the second.

    Returns:
        The cleaned question and the different answers, the commonest first; or why there is none.
    """
    try:
        found = answered(item.extra.get("questions"), max_words)
    except ValueError as error:
        return str(error)
    if not found:
        return NO_ANSWER
    question, answers = found[item.item % len(found)]
    return question, [answer for answer, _ in Counter(answers).most_common()]


def asked_sample(question: str, answer: str, prompt: str, **others: Any) -> Sample:
    """A sample whose text is the prompt with the question, and then the answer.

    Args:
        question: cleaned.
        answer: to be said.
        prompt: see `ask`.
        others: of `Sample`.
    """
    asked = ask(prompt, question)
    return Sample(
        text=f"{asked} {answer}", captions=[answer], question=question, prompt=asked, **others
    )
