"""What an evaluation is: a task makes an outcome of a model and a split."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blip2_train.data.stream import EvalStream
from blip2_train.evaluation.inference import Blip2
from blip2_train.evaluation.samples import Row
from blip2_train.evaluation.work import Work


@dataclass
class Outcome:
    """What a task found, the same on every rank (but for the rows).

    Attributes:
        metrics: {name: value}, percent where it is an accuracy or a recall; None: it could not be
            computed here, and `notes` say why.
        counts: {what: how many}: images, captions, questions, skipped, ...
        files: {file name: content}, written as JSON beside the metrics: what a benchmark's server
            takes.
        best: of the page, on rank 0.
        worst: of the page, on rank 0.
        skipped: {"shard", "key", "reason"} of each sample that could not be used.
        text: of the page: how its samples are to be read.
        notes: {about what: sentence}, in metrics.json and on the page: how metrics came about.
        digits: of the metrics where they are shown.
    """

    metrics: Mapping[str, float | None]
    counts: dict[str, int]
    files: dict[str, Any] = field(default_factory=dict)
    best: list[Row] = field(default_factory=list)
    worst: list[Row] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    text: str = ""
    notes: dict[str, str] = field(default_factory=dict)
    digits: int = 2


class Task(abc.ABC):
    """One kind of evaluation, built from `conf/task/<name>.yaml` by its `_target_`.

    Constructors check what they are given, and raise `UserError` where it cannot be.

    Attributes:
        extra: fields of the samples' json that items shall bring along (`EvalSample.extra`).
        need_captions: images without captions cannot be used; else they are items, too.
        samples: images that the page shows of the best, and of the worst; set from `samples`.
        batch_size: images at a time; set from `batch_size`.
    """

    extra: tuple[str, ...] = ()
    need_captions: bool = True
    samples: int = 0
    batch_size: int = 64

    def identity(self) -> dict[str, Any]:
        """What the results depend on beside the configuration, such as the content of files."""
        return {}

    def check(self, blip2: Blip2) -> None:
        """Refuses, before any long work, a model that cannot do this.

        Raises:
            UserError: says which model can.
        """

    @abc.abstractmethod
    def run(self, blip2: Blip2, images: EvalStream, work: Work) -> Outcome:
        """Evaluates; all ranks call it.

        Whatever takes long goes through `work`. Numbers must not depend on the ranks.

        Raises:
            UserError: the data is not what this task needs.
        """
