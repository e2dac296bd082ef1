"""Validation in the middle of training; each stage's `Evaluator` says what is measured."""

import abc
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from blip2_train.data.batch import EvalSample
from blip2_train.data.stream import EvalStream
from blip2_train.distributed import World, current_world, gather_objects
from blip2_train.errors import UserError
from blip2_train.evaluation.grounding import GAP_WARNING
from blip2_train.evaluation.retrieval import own_batches
from blip2_train.evaluation.samples import Row, draw_sheet
from blip2_train.training.checkpointing import Checkpointing
from blip2_train.training.feeding import start_loader_process
from blip2_train.training.monitor import Monitor
from blip2_train.training.run_log import SkippedLog
from blip2_train.training.run_report import RunReport
from blip2_train.training.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass
class Findings:
    """What a validation found, the same on every rank (but for the rows).

    Attributes:
        metrics: {name: value}.
        score: by which checkpoints are compared, higher is better.
        lines: of the log.
        rows: of the picture, on rank 0.
        title: of the picture.
    """

    metrics: dict[str, float]
    score: float
    lines: list[str]
    rows: list[Row] = field(default_factory=list)
    title: str = ""


class Evaluator(abc.ABC):
    """Collects over the batches of one validation, then sums up.

    Batches are whole on one rank, and their make-up does not depend on the number of ranks: so
    neither should any number, and every image counts exactly once.
    """

    @abc.abstractmethod
    def start(self) -> None:
        """Forgets the validation before."""

    @abc.abstractmethod
    def add(self, number: int, batch: dict[str, Any]) -> None:
        """Takes in one batch.

        Args:
            number: of the batch within the whole set.
            batch: on the device, with at least one image.
        """

    @abc.abstractmethod
    def finish(self, world: World) -> Findings:
        """Sums up; all ranks call it, also those that got no batch."""


class Validation(pl.Callback):
    """Evaluates every `every` optimizer steps and at the end; scores checkpoints.

    Args:
        evaluator: what is measured.
        images: the validation split.
        collate: puts an evaluation batch together.
        monitor: whose clock stands still meanwhile.
        checkpointing: gets the score of the step.
        report: written anew with what was found (rank 0).
        skipped: where unusable samples are written down (rank 0).
        watchdog: is told of each batch.
        folder: of the pictures.
        settings: `every`, `batch_size` of the configuration.
        num_workers: loader processes.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        images: EvalStream,
        collate: Any,
        monitor: Monitor,
        checkpointing: Checkpointing,
        report: RunReport,
        skipped: SkippedLog | None,
        watchdog: Watchdog,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        num_workers: int,
    ) -> None:
        self.evaluator = evaluator
        self.images = images
        self.collate = collate
        self.monitor = monitor
        self.checkpointing = checkpointing
        self.report = report
        self.skipped_log = skipped
        self.watchdog = watchdog
        self.folder = folder
        self.settings = settings
        self.num_workers = num_workers
        self.last_step = checkpointing.start_step
        self.blind = 0  # validations in a row without a grounding gap

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        """Validates when a step is due."""
        step = trainer.global_step
        due = step % self.settings["every"] == 0 or step >= trainer.max_steps
        if due and step > self.last_step:
            self.last_step = step
            with self.monitor.paused():
                self.validate(trainer, pl_module, step)

    @torch.no_grad()
    def validate(self, trainer: pl.Trainer, pl_module: Any, step: int) -> None:
        """Runs a whole validation; all ranks call it."""
        world = current_world()
        pl_module.before_validation(world)
        pl_module.model.eval()
        skipped: list[Any] = []
        self.evaluator.start()
        used = 0
        self.watchdog.beat()
        with trainer.precision_plugin.val_step_context():
            for number, batch in self._batches(world):
                skipped += batch["skipped"]
                used += len(batch["keys"])
                self.watchdog.beat()
                if batch["keys"]:
                    self.evaluator.add(number, trainer.strategy.batch_to_device(batch))
            used = sum(gather_objects(used, world))
            if not used:
                raise UserError(
                    "no validation image can be used; data.validation.* says which are read"
                )
            found = self.evaluator.finish(world)
        pl_module.model.train()
        skipped = [line for part in gather_objects(skipped, world) for line in part]
        if self.skipped_log is not None:
            self.skipped_log.add(step, skipped)
        self.checkpointing.state.scores[step] = found.score
        if trainer.is_global_zero:
            log.info("validation at step %d on %d images (%d skipped):", step, used, len(skipped))
            self._tell(trainer, found, step)
        self._warn_if_blind(found.metrics)

    def _batches(self, world: World) -> Iterator[tuple[int, dict[str, Any]]]:
        size = self.settings["batch_size"]
        numbers = range(-(-len(self.images) // size))[world.rank :: world.size]
        loader = DataLoader(
            self.images,
            batch_sampler=own_batches(len(self.images), size, world),
            collate_fn=self.collate,
            num_workers=self.num_workers,
            worker_init_fn=start_loader_process,
        )
        return zip(numbers, loader, strict=True)

    def _tell(self, trainer: pl.Trainer, found: Findings, step: int) -> None:
        for line in found.lines:
            log.info("  %s", line)
        for logger in trainer.loggers:
            logger.log_metrics({f"val/{k}": v for k, v in found.metrics.items()}, step)
        self.report.write(step, found.lines, found.rows, found.title)
        if not found.rows:
            return
        path = self.folder / f"step-{step:08d}.png"
        try:
            draw_sheet(found.rows, f"step {step}: {found.title}", path)
        except OSError as error:
            log.error("%s could not be written (%s); training goes on", path, error)
            return
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("val/samples", [str(path)], step=step)

    def _warn_if_blind(self, metrics: Mapping[str, float]) -> None:
        gap = metrics.get("grounding_gap")
        self.blind = self.blind + 1 if gap is not None and gap < GAP_WARNING else 0
        if self.blind >= 2:
            log.warning(
                "grounding_gap is %.3f nats per token, near zero at the last %d validations: the "
                "text hardly depends on the image; check the first weights (init_from), the "
                "images (samples/) and that captions belong to their images",
                gap, self.blind,
            )  # fmt: skip


def chosen_samples(images: EvalStream, count: int) -> list[EvalSample]:
    """Some images for pictures, evenly spread over the set; unusable ones are left out."""
    count = min(count, len(images))
    items = (images[i * len(images) // count] for i in range(count))
    return [item for item in items if isinstance(item, EvalSample)]
