"""Sweeps: one run per combination of the values given, each in a folder of its own, one table.

No torch here: the table is read from the runs' folders, wherever they were trained.
"""

import csv
import hashlib
import io
import itertools
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from blip2_train.config import flatten
from blip2_train.errors import UserError

RESULTS = "results.csv"
FAILURE = "failure.txt"
LATER = "the same command goes on with the sweep (jobs of Slurm go on by themselves: squeue --me)"


def folder_name(overrides: str) -> str:
    """What a run is called after its overrides, "a.b=1,c=[2,3]" -> "a.b-1,c-2-3"."""
    name = re.sub(r"[\[\](){},=/\s'\"]+", "-", overrides).strip("-") or "run"
    if len(name) > 180:  # file systems end at 255 bytes
        name = f"{name[:160]}-{hashlib.sha256(overrides.encode()).hexdigest()[:12]}"
    return name


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def _parse(overrides: Iterable[str]) -> list[Any]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UserError(" ".join(str(error).split())) from error


def keys(overrides: list[str]) -> set[str]:
    """Keys that a sweep varies."""
    return {o.key_or_group for o in _parse(overrides) if o.is_sweep_override()}


def jobs(overrides: list[str]) -> list[list[str]]:
    """The overrides of each run of a grid, in Hydra's order.

    Raises:
        UserError: they cannot be parsed, or nothing varies.
    """
    choices: list[list[str]] = []
    parsed = _parse(overrides)
    for given, override in zip(overrides, parsed, strict=True):
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        elif not given.startswith("hydra"):
            choices.append([given])
    if own := [text for text in overrides if text.lstrip("+~").startswith("hydra.sweep.")]:
        raise UserError(f"{own[0]}: give sweep.name, and run.dir where it is to be")
    if not any(override.is_sweep_override() for override in parsed):
        raise UserError("a sweep (-m) needs a key with several values, such as seed=1,2,3")
    return [list(job) for job in itertools.product(*choices)]


def note_failure(folder: Path, reason: str | None) -> None:
    """Writes why a run ended early into its folder; None: forgets the time before."""
    path = folder / FAILURE
    if reason is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(reason + "\n")


def results(folder: Path) -> list[dict[str, Any]]:
    """One row per run of a sweep: what it varies, how it stands, and its last metrics.

    Args:
        folder: of the sweep.

    Returns:
        By name; every row has `run`, `status`, `step`, the varied keys, `val/*` and `train/*`.
    """
    runs = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    configs: list[dict[str, Any]] = []
    metrics: list[dict[str, float]] = []
    rows: list[dict[str, Any]] = []
    for run in runs:
        config: dict[str, Any] = {}
        if (run / "config.yaml").is_file():
            config = flatten(yaml.safe_load((run / "config.yaml").read_text()) or {})
        configs.append(config)
        step, found = _last_metrics(run / "metrics.csv")
        metrics.append(found)
        saved = max((int(path.stem[5:]) for path in run.glob("checkpoints/step-*.ckpt")), default=0)
        status = f"stopped at step {step}"
        if (run / FAILURE).is_file():
            status = f"failed: {(run / FAILURE).read_text().strip()}"
        elif saved >= config.get("trainer.max_steps", math.inf):
            status = "finished"
        rows.append({"run": run.name, "status": status, "step": step})
    known = [config for config in configs if config]
    varied = [
        key
        for key in dict.fromkeys(key for config in known for key in config)
        if key != "run.name" and len({repr(config.get(key)) for config in known}) > 1
    ]
    names = list(dict.fromkeys(name for found in metrics for name in found))
    for row, config, found in zip(rows, configs, metrics, strict=True):
        row |= {key: config.get(key, "") for key in varied}
        row |= {name: found.get(name, "") for name in names}
    return rows


def _last_metrics(path: Path) -> tuple[int, dict[str, float]]:
    """Last step and, of each metric of training or validation, the last value."""
    step = 0
    last: dict[str, float] = {}
    if path.is_file():
        text = path.read_text()
        for row in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])):  # whole lines
            step = int(row["step"])
            last |= {
                name: float(value)
                for name, value in row.items()
                if value and name.startswith(("val/", "train/"))
            }
    return step, dict(sorted(last.items(), reverse=True))  # val/ before train/


def report(folder: Path) -> int:
    """Writes `results.csv`, prints it as a table and returns how many runs are not finished."""
    from rich.console import Console
    from rich.table import Table

    if not folder.is_dir() or not (rows := results(folder)):
        return 0
    with (folder / RESULTS).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    shown = [name for name in _SHOWN if name in rows[0]]
    table = Table(title=f"{folder}: {len(rows)} runs", title_justify="left")
    for name in shown:
        table.add_column(name.removeprefix("val/"), overflow="fold")
    for row in rows:
        table.add_row(*(_text(row[name]) for name in shown))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(f"all numbers: {folder / RESULTS}")
    return sum(row["status"] != "finished" for row in rows)


_SHOWN = (  # a run's name says what it varies
    "run", "status", "step", "train/loss", "val/loss", "val/i2t_r1", "val/t2i_r1",
    "val/grounding_gap",
)  # fmt: skip


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
