"""SIGKILL at any moment, on one process and on three: the same weights in the end.

`--kills 50` kills that often in all (3 in the suite).
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from forked import train
from tiny import command, tiny_run
from whole_runs import assert_same_end, one_thread, pids_of

from blip2_train.checkpoint import io

# Most of a run is steps; saves and validations come often, and dropout is on.
CHANGES = {
    "trainer.max_steps": 24,
    "trainer.log_every": 5,
    "validation.every": 6,
    "checkpoint.every": 2,
    "qformer.dropout": 0.1,
    "batch.accumulate": 2,
}


@pytest.mark.parametrize(("processes", "share"), [(1, 2), (3, 1)])
def test_killed_at_random_moments(
    shards: Path, tmp_path: Path, processes: int, share: int, request: pytest.FixtureRequest
) -> None:
    kills = -(-request.config.getoption("--kills") * share // 3)
    began = time.monotonic()
    train(tiny_run(shards, tmp_path, "whole", **CHANGES), processes)
    duration = time.monotonic() - began
    overrides = tiny_run(shards, tmp_path, "killed", **CHANGES)
    checkpoints = tmp_path / "killed" / "checkpoints"
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for number in range(kills):
        if newest(checkpoints) >= 24:  # finished before it was killed: from the start again
            shutil.rmtree(tmp_path / "killed")
        before = newest(checkpoints)
        log = tmp_path / "log"
        process = started(overrides, processes, log)
        if rng.random() < 0.75:  # else it is killed in start-up, most likely
            while process.poll() is None and "batch 12 = " not in log.read_text():
                time.sleep(0.05)
        time.sleep(rng.uniform(0, duration))
        kill(process, tmp_path)
        after = newest(checkpoints)
        assert after >= before, f"seed {seed}, kill {number}: {before} -> {after}"
        if checkpoints.is_dir() and io.steps(checkpoints):
            assert loadable(checkpoints, tmp_path / "copy") == after, f"seed {seed}, kill {number}"
    train(overrides, processes)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


def newest(checkpoints: Path) -> int:
    return max(io.steps(checkpoints), default=0) if checkpoints.is_dir() else 0


def loadable(checkpoints: Path, copy: Path) -> int:
    """Step of the newest undamaged checkpoint; looked for in a copy, for finding it may rename."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoints, copy)
    path = io.newest_valid(copy)
    assert path is not None
    return io.load(path)["step"]


def started(overrides: list[str], processes: int, log: Path) -> subprocess.Popen:
    with log.open("w") as file:
        return subprocess.Popen(
            command(overrides, processes), stdout=file, stderr=file, env=one_thread(),
            start_new_session=True,
        )  # fmt: skip


def kill(process: subprocess.Popen, runs: Path) -> None:
    """SIGKILL, for all that have to do with a run there."""
    while pids := pids_of(f"run.dir={runs}"):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.poll()  # or it would stay as a zombie
    process.wait()
