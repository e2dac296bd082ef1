"""One run, one folder: who may have it, and when a dead holder's lock is taken over."""

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from blip2_train.errors import UserError
from blip2_train.training.lock import NAME, Holder, RunLock

FAST = 0.1  # seconds between heartbeats


def write(folder: Path, **changes: Any) -> Holder:
    """A lock of this process, but for the changes."""
    holder = dataclasses.replace(Holder.this_process(), **changes)
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def elsewhere(folder: Path, **changes: Any) -> Holder:
    return write(folder, host="other", boot="other", **changes)


def token(folder: Path) -> str:
    return json.loads((folder / NAME).read_text())["token"]


def test_a_second_one_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path / "run"), RunLock(tmp_path / "run")
    assert first.acquire()
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "):
        second.acquire()
    second.release()
    assert token(tmp_path / "run") == first.me.token
    first.release()
    assert not list((tmp_path / "run").iterdir())
    again = RunLock(tmp_path / "run")
    assert again.acquire()
    again.release()


def test_of_a_process_that_is_gone(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    write(tmp_path, pid=child.pid)
    lock = RunLock(tmp_path)  # heartbeats every ten seconds: nothing is waited for
    started = time.monotonic()
    assert lock.acquire()
    assert time.monotonic() - started < 5
    assert token(tmp_path) == lock.me.token
    lock.release()


def test_of_another_process_with_the_same_number(tmp_path: Path) -> None:
    write(tmp_path, started=1)
    lock = RunLock(tmp_path)
    assert lock.acquire()
    lock.release()


def test_processes_of_another_container_cannot_be_seen(tmp_path: Path) -> None:
    """It runs on this machine but counts its processes by itself: only its heart tells."""
    boot = Holder.this_process().boot.split(":")[0]
    write(tmp_path, boot=f"{boot}:pid:[1]", pid=2**22 + 1)
    lock = RunLock(tmp_path, interval=FAST)
    started = time.monotonic()
    assert lock.acquire()
    assert time.monotonic() - started > 3 * FAST
    lock.release()


def test_of_this_job_of_slurm_before_it_was_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(tmp_path, slurm_job="7", slurm_restarts=1)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    lock = RunLock(tmp_path)
    started = time.monotonic()
    assert lock.acquire()
    assert time.monotonic() - started < 5
    lock.release()


def test_of_another_machine_that_lives(tmp_path: Path) -> None:
    elsewhere(tmp_path, slurm_job="12")
    lock = RunLock(tmp_path, interval=FAST)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        beating = pool.apply_async(beat, (tmp_path / NAME, 20))
        with pytest.raises(UserError, match="on other, Slurm job 12"):
            lock.acquire()
        assert not lock.acquire(patience=FAST)
        beating.wait()
    assert lock.acquire()  # five intervals after the last heartbeat
    lock.release()


def beat(path: Path, times: int) -> None:
    for _ in range(times):
        time.sleep(FAST)
        os.utime(path)


def test_by_the_file_servers_clock(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    os.utime(tmp_path / NAME, (time.time() - 60, time.time() - 60))
    lock = RunLock(tmp_path)  # 60 s are more than five times 10
    assert lock.acquire()
    lock.release()


@pytest.mark.parametrize("text", ["", "{}", '{"token": 3}', "[]", "no json"])
def test_a_lock_that_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    lock = RunLock(tmp_path, interval=FAST)
    assert lock.acquire()
    lock.release()


def test_it_is_kept_alive(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, interval=FAST)
    assert lock.acquire()
    first = (tmp_path / NAME).stat().st_mtime_ns
    time.sleep(4 * FAST)
    assert (tmp_path / NAME).stat().st_mtime_ns > first
    lock.release()


def test_one_that_was_taken_over_notices(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, interval=FAST)
    assert lock.acquire()
    (tmp_path / NAME).unlink()
    time.sleep(3 * FAST)
    assert not lock.lost  # deleted is not taken
    other = elsewhere(tmp_path)
    time.sleep(3 * FAST)
    assert lock.lost
    lock.release()
    assert token(tmp_path) == other.token


def test_a_dead_ones_is_taken_over_by_one_alone(tmp_path: Path) -> None:
    for _ in range(8):
        elsewhere(tmp_path)
        os.utime(tmp_path / NAME, (0, 0))
        # six processes on few processors: each is held up wherever it may be
        with multiprocessing.get_context("fork").Pool(6) as pool:
            taken = pool.map(try_to_take, [tmp_path] * 6, chunksize=1)
        assert sum(taken) == 1, taken
        (tmp_path / NAME).unlink()


def try_to_take(folder: Path) -> bool:
    try:
        taken = RunLock(folder, interval=3.0).acquire()
    except UserError:
        return False
    time.sleep(0.5)  # while the others try
    return taken


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be"):
        RunLock(tmp_path / "file" / "run").acquire()
