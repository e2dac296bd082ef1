"""What a run writes down: metrics.csv, skipped.jsonl, and the W&B run that a restart continues."""

import csv
import errno
import io
import json
import logging
import netrc
import os
import sys
import threading
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only

log = logging.getLogger(__name__)


class MetricsCsv(Logger):
    """One row per logged step, one column per metric; a restarted run appends to it.

    Args:
        path: of the file.
        start_step: rows of later steps are dropped: they belong to a run that was killed after
            its last checkpoint, and will come again.
    """

    def __init__(self, path: Path, start_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self.columns = ["step"]
        self.waiting: list[dict[str, Any]] = []  # rows that could not be written yet
        if path.is_file():
            reader = csv.DictReader(io.StringIO(whole_lines(path.read_text())))
            rows = [row for row in reader if int(row["step"]) <= start_step]
            self._write(list(reader.fieldnames or self.columns), rows)

    @property
    def name(self) -> str:
        """Of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """There is one file per run."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> None:
        """There is nothing to hand out."""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """They are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends a row; a metric that was not there before adds a column to the whole file.

        A row that cannot be written is kept for the next time: training goes on.
        """
        self.waiting.append({"step": step, **metrics})
        try:
            self._append(self.waiting)
        except OSError as error:
            log.error("%s could not be written (%s); training goes on", self.path, error)
        else:
            self.waiting = []

    def _append(self, rows: list[dict[str, Any]]) -> None:
        columns = self.columns + [
            name for name in dict.fromkeys(k for row in rows for k in row)
            if name not in self.columns
        ]  # fmt: skip
        if columns != self.columns or not self.path.is_file():
            before: list[dict[str, Any]] = []
            if self.path.is_file():
                before = list(csv.DictReader(io.StringIO(self.path.read_text())))
            self._write(columns, before)
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns).writerows(rows)
        append(self.path, text.getvalue())

    def _write(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path, text.getvalue())
        self.columns = columns


class SkippedLog:
    """skipped.jsonl: one line per sample that could not be used, with shard, key and reason.

    Args:
        path: of the file.
        start_step: lines of later steps are dropped (see `MetricsCsv`).
    """

    def __init__(self, path: Path, start_step: int = 0) -> None:
        self.path = path
        self.waiting = ""  # lines that could not be written yet
        if path.is_file():
            lines = whole_lines(path.read_text()).splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= start_step]
            write_whole(path, "".join(kept))

    def add(self, step: int, skipped: list[Mapping[str, Any]]) -> None:
        """Appends lines; those that cannot be written are kept for the next time."""
        self.waiting += "".join(json.dumps({"step": step, **line}) + "\n" for line in skipped)
        if not self.waiting:
            return
        try:
            append(self.path, self.waiting)
        except OSError as error:
            log.error("%s could not be written (%s); training goes on", self.path, error)
        else:
            self.waiting = ""


def write_whole(path: Path, text: str) -> None:
    """Writes a file, or leaves the one that was there.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, newline="")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def append(path: Path, text: str) -> None:
    """Appends to a file, wholly or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            data = text.encode()
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def whole_lines(text: str) -> str:
    """Without a last line that a killed process did not finish."""
    return text[: text.rfind("\n") + 1]


def wandb_mode(mode: str) -> str:
    """Decides "auto": "online" where there is an account, else "offline"."""
    if mode != "auto":
        return mode
    if chosen := os.environ.get("WANDB_MODE"):
        return chosen
    return "online" if os.environ.get("WANDB_API_KEY") or _has_netrc_account() else "offline"


def _has_netrc_account() -> bool:
    """Whether `wandb login` was run on this machine; it writes the key to ~/.netrc."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host is not None and netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wandb_logger(
    run_dir: Path, settings: Mapping[str, Any], config: Mapping[str, Any], run_id: str | None
) -> WandbLogger | None:
    """A W&B logger that goes on with the run of the same id, or None where W&B is disabled.

    Args:
        run_dir: its files go into `run_dir/wandb`.
        settings: `mode`, `project`, `entity`.
        config: the run's configuration, shown on its page.
        run_id: of the run to continue; None starts a new one.
    """
    mode = wandb_mode(settings["mode"])
    if mode == "disabled":
        return None
    if mode == "offline":
        os.environ.setdefault("WANDB_SILENT", "true")  # before the first import of wandb
    from wandb.sdk.lib.runid import generate_id

    return WandbLogger(
        name=run_dir.name,
        save_dir=str(run_dir),
        project=settings["project"],
        entity=settings["entity"],
        id=run_id or generate_id(),
        resume="allow",
        config=dict(config),
        mode=mode,
    )


def finish_wandb(patience: float | None = None) -> None:
    """Ends this process's W&B run, if there is one, within so many seconds."""
    if wandb := sys.modules.get("wandb"):
        if patience is None:
            wandb.finish()
            return
        thread = threading.Thread(target=wandb.finish, daemon=True)
        thread.start()
        thread.join(patience)
