"""runs/NAME/report.html: how a run goes, written anew at each validation and at the end."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from blip2_train.evaluation.curves import read_metrics, run_charts
from blip2_train.evaluation.report import Section, write_page
from blip2_train.evaluation.samples import Row
from blip2_train.training.monitor import Monitor

log = logging.getLogger(__name__)

NAME = "report.html"


class RunReport(pl.Callback):
    """Writes the report; rank 0 alone does.

    Args:
        folder: of the run, with its metrics.csv.
        monitor: knows chance and floor of each loss, and its clock stands still meanwhile.
    """

    def __init__(self, folder: Path, monitor: Monitor) -> None:
        self.folder = folder
        self.monitor = monitor
        self.written = -1  # step of the report

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """At the last step, where no validation has written it: before the last checkpoint."""
        step = trainer.global_step
        if trainer.is_global_zero and step >= trainer.max_steps and step > self.written:
            with self.monitor.paused():
                self.write(step)

    def write(
        self, step: int, lines: Sequence[str] = (), rows: Sequence[Row] = (), title: str = ""
    ) -> None:
        """Writes the report; one that cannot be written does not stop a training.

        Args:
            step: the run is at.
            lines: what the last validation found.
            rows: its pictures.
            title: of the pictures.
        """
        self.written = step
        try:
            self._write(step, lines, rows, title)
        except Exception:  # whatever it is: days of training must not end for a picture
            log.warning("%s could not be written", self.folder / NAME, exc_info=True)

    def _write(self, step: int, lines: Sequence[str], rows: Sequence[Row], title: str) -> None:
        metrics = read_metrics(self.folder / "metrics.csv")
        levels = {name: level._asdict() for name, level in self.monitor.levels.items()}
        text = "Solid: training batches; dashed: validation. Dotted lines: a model that learned "
        text += "nothing (chance) and the lowest loss there is (floor)."
        sections = [Section("Curves", text, charts=run_charts(metrics, levels))]
        if rows:
            text = f"{title[:1].upper()}{title[1:]}. Green words are in a caption that the image "
            text += "has; underlined ones are in none of them."
            sections.append(Section("Samples", text, rows=rows))
        write_page(self.folder / NAME, f"{self.folder.name}, step {step}", lines, sections)
