"""Whole runs: started, killed, compared."""

import contextlib
import csv
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from forked import start_training

from blip2_train.checkpoint import io

NOT_LEARNED = ".key.bias"  # no loss depends on it; AdamW turns the rounding of 0 into steps


def one_thread() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def last_checkpoint(run: Path) -> dict[str, Any]:
    path = io.newest_valid(run / "checkpoints")
    assert path is not None
    return io.load(path)


def rows(run: Path, *, without_speed: bool = True) -> list[dict[str, str]]:
    speed = ("samples_per_second", "data_wait", "peak_memory", "model_flops", "received_mb")
    with (run / "metrics.csv").open() as file:
        return [
            {k: v for k, v in row.items() if not (without_speed and k.startswith(speed))}
            for row in csv.DictReader(file)
        ]


def last_metrics(path: Path) -> dict[str, dict[str, float]]:
    """The last training and the last validation row of a run's metrics.csv."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    found = {}
    for part in ("train", "val"):
        row = [line for line in lines if line.get(f"{part}/loss")][-1]
        found[part] = {
            key.removeprefix(f"{part}/"): float(value)
            for key, value in row.items()
            if key.startswith(f"{part}/") and value
        }
    return found


def assert_equal_states(ours: Any, theirs: Any, where: str = "") -> None:
    """Bit for bit."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in ours.items():
            assert_equal_states(value, theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal_states(a, b, f"{where}[{number}]")
    elif isinstance(ours, torch.Tensor):
        assert ours.equal(theirs), f"{where} differs by {(ours - theirs).abs().max()}"
    else:
        assert ours == theirs, where


def assert_same_end(ours: Path, theirs: Path) -> None:
    a, b = last_checkpoint(ours), last_checkpoint(theirs)
    for key in ("step", "drawn", "scores", "model", "optimizer"):
        assert_equal_states(a[key], b[key], key)
    assert rows(ours) == rows(theirs)


def largest_differences(ours: Path, theirs: Path) -> dict[str, float]:
    """How far two runs are apart: in any loss of any step or validation, in any weight."""
    found = {"losses": 0.0, "weights": 0.0, "weights not learned": 0.0}
    for a, b in zip(rows(ours), rows(theirs), strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for name, value in b.items():
            assert bool(a[name]) == bool(value), name
            if name.startswith(("epochs/", "lr", "skipped")):
                assert a[name] == value, name
            elif name.startswith(("train/loss", "val/loss")) and value:
                found["losses"] = max(found["losses"], abs(float(a[name]) - float(value)))
    ends = last_checkpoint(ours), last_checkpoint(theirs)
    assert ends[0]["step"] == ends[1]["step"]
    assert ends[0]["drawn"] == ends[1]["drawn"]
    weights = [end["model"] for end in ends]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[1].items():
        apart = (weights[0][name] - value).abs()
        if name.endswith("attn.qkv.bias"):  # of a trained tower, the keys' in the middle
            keys = apart.chunk(3)[1].clone()
            apart.chunk(3)[1].zero_()
            found["weights not learned"] = max(found["weights not learned"], keys.max().item())
        kind = "weights not learned" if name.endswith(NOT_LEARNED) else "weights"
        found[kind] = max(found[kind], apart.max().item())
    print(f"{ours.name} and {theirs.name}:", {k: f"{v:.1e}" for k, v in found.items()})
    return found


def pids_of(argument: str) -> list[int]:
    """Other processes that were started with this argument."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if argument.encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def children_of(pid: int) -> list[int]:
    """Processes that it has started."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start(words: list[str]) -> subprocess.Popen[str]:
    """Starts a command in a session of its own, on one thread; stdout and stderr are one pipe."""
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=one_thread(),
        start_new_session=True,
    )


def kill_in_the_middle(
    overrides: list[str], run: Path, processes: int, last: int = 12, step: int = 6
) -> None:
    """Starts a run and kills it, once a checkpoint was followed by more.

    It is killed after the line of `step`; `last` is the run's last step, which it must not have
    reached.
    """
    training = start_training(overrides, processes)
    training.wait_for(f"step {step}/")
    while not (run / "checkpoints").is_dir():
        assert training.is_alive(), training.output()
        time.sleep(0.01)
    training.kill()
    assert max(io.steps(run / "checkpoints")) < last
