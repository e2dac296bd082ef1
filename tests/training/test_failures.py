"""What goes wrong on clusters: lost and hanging ranks, full disks, vanished folders, two jobs."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import start_training
from tiny import command, tiny_run, train_in_process
from whole_runs import last_checkpoint, one_thread, pids_of, rows, start

from blip2_train.checkpoint import io

LONG = {"trainer.max_steps": 4000, "validation.every": "null", "checkpoint.every": 5}


def ranks_of(run: Path, launcher: int) -> list[int]:
    """Processes of the ranks, in the order in which they were started."""
    return sorted(pid for pid in pids_of(f"run.dir={run.parent}") if pid != launcher)


def wait_for_line(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def end_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    output = process.stdout.read()
    process.stdout.close()
    process.wait()
    return output


def test_a_rank_that_dies_ends_the_others_with_a_sentence(shards: Path, tmp_path: Path) -> None:
    process = start(command(tiny_run(shards, tmp_path, "run", **LONG), 2))
    wait_for_line(process, "step 6/")
    os.kill(ranks_of(tmp_path / "run", process.pid)[-1], signal.SIGKILL)
    output = end_of(process)
    assert process.returncode != 0
    assert "error: another process of this run is gone" in output
    assert "the same command goes on" in output
    assert "exitcode  : 3" in output or "-9" in output  # torchrun's table of who failed
    assert last_checkpoint(tmp_path / "run")["step"] >= 5


def test_a_rank_that_hangs_is_shown_by_everyones_stacks(shards: Path, tmp_path: Path) -> None:
    changes = LONG | {"trainer.hang_seconds": 4}
    training = start_training(tiny_run(shards, tmp_path, "run", **changes), 2)
    training.wait_for("step 6/")
    os.kill(training.ranks[1].pid, signal.SIGSTOP)
    training.ranks[0].join(60)
    assert training.ranks[0].exitcode == 3
    output = training.kill()
    assert "has made no progress for 4 s (trainer.hang_seconds); rank 0 of 2" in output
    assert ("error: step " in output and "training_step" in output) or "backward" in output


def test_a_process_that_was_suspended_does_not_count_as_hanging(
    shards: Path, tmp_path: Path
) -> None:
    changes = LONG | {"trainer.hang_seconds": 2, "trainer.max_steps": 40}
    training = start_training(tiny_run(shards, tmp_path, "run", **changes))
    training.wait_for("step 6/")
    os.kill(training.pid, signal.SIGSTOP)
    time.sleep(5)
    os.kill(training.pid, signal.SIGCONT)
    training.finish()


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"may not mount a small disk: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The old checkpoint stays, the run goes on and says so; with room again nothing is missing."""
    changes = {"checkpoint.keep_last": 2, "validation.every": 6, "validation.samples": 2}
    assert train_in_process(tiny_run(shards, tmp_path, "whole", **changes)) == 0
    size = max(p.stat().st_size for p in (tmp_path / "whole" / "checkpoints").iterdir())
    with small_disk(tmp_path / "disk", int(1.7 * size / 1024)):
        overrides = tiny_run(shards, tmp_path / "disk", "run", **changes)
        assert train_in_process(overrides) == 2  # the last checkpoint is missing, too
        assert "could not be written" in caplog.text and "the run goes on" in caplog.text
        run = tmp_path / "disk" / "run"
        assert list(io.steps(run / "checkpoints")) == [4]
        assert not list(run.glob("checkpoints/.*"))
        assert last_checkpoint(run)["step"] == 4
        subprocess.run(
            ["mount", "-o", f"remount,size={20 * size // 1024}k", str(tmp_path / "disk")],
            check=True,
        )
        assert train_in_process(overrides) == 0
        ours, theirs = rows(run), rows(tmp_path / "whole")
        assert ours == theirs


def test_rows_wait_for_room(tmp_path: Path) -> None:
    from blip2_train.training.run_log import MetricsCsv, SkippedLog

    with small_disk(tmp_path / "disk", 64):
        log, skipped = MetricsCsv(tmp_path / "disk" / "m.csv"), SkippedLog(tmp_path / "disk" / "s")
        log.log_metrics({"a": 1.0}, 1)
        filler = tmp_path / "disk" / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        for step in range(2, 200):
            log.log_metrics({"a": 1 / step, "b": 2.0}, step)
            skipped.add(step, [{"key": f"{step}" * 9}])
        assert log.waiting and skipped.waiting
        assert (tmp_path / "disk" / "m.csv").read_text().endswith("\n")
        filler.unlink()
        log.log_metrics({"a": 1.0, "b": 3.0}, 200)
        skipped.add(400, [{"key": "last"}])
        text = (tmp_path / "disk" / "m.csv").read_text().splitlines()
        assert text[0] == "step,a,b" and [int(t.split(",")[0]) for t in text[1:]] == [
            *range(1, 201)
        ]
        assert len((tmp_path / "disk" / "s").read_text().splitlines()) == 199


def test_lines_that_a_killed_process_did_not_finish(tmp_path: Path) -> None:
    from blip2_train.training.run_log import MetricsCsv, SkippedLog

    (tmp_path / "m.csv").write_text("step,a\n1,2.0\n2,3.0\n3")
    (tmp_path / "s").write_text('{"step": 1}\n{"ste')
    MetricsCsv(tmp_path / "m.csv", 9)
    SkippedLog(tmp_path / "s", 9)
    assert (tmp_path / "m.csv").read_text().splitlines() == ["step,a", "1,2.0", "2,3.0"]
    assert (tmp_path / "s").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("gone", ["checkpoints", "."])
def test_a_folder_that_disappears_in_training(shards: Path, tmp_path: Path, gone: str) -> None:
    run = tmp_path / "run"
    changes = LONG | {"trainer.max_steps": 60}
    training = start_training(tiny_run(shards, tmp_path, "run", **changes))
    training.wait_for("step 12/")
    shutil.rmtree(run / gone)
    output = training.finish()
    assert "has disappeared, with its checkpoints; it is made anew" in output
    assert last_checkpoint(run)["step"] == 60
    assert rows(run)[-1]["step"] == "60"


def test_two_jobs_on_one_folder(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    overrides = tiny_run(shards, tmp_path, "run", **LONG)
    first = start_training(overrides)
    first.wait_for("step 6/")
    assert train_in_process(overrides) == 2
    error = capsys.readouterr().err
    assert f"is in use by process {first.pid} on {socket.gethostname()}" in error
    assert first.is_alive()
    first.kill()


def test_machines_that_see_different_files(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks whose relative run.dir is not the same folder."""
    changes = {"trainer.max_steps": 4, "validation.every": "null"}
    assert train_in_process(tiny_run(shards, tmp_path / "a" / "runs", "run", **changes)) == 0
    (tmp_path / "b").mkdir()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    overrides = tiny_run(shards, Path("runs"), "run", **changes | {"trainer.max_steps": 8})
    overrides += ["resume.allow=[trainer.max_steps]"]
    code = "from blip2_train.training import fit; fit.FILE_PATIENCE = 1; import sys; "
    code += "from blip2_train.train import main; main()"
    processes = []
    for rank, place in enumerate("ab"):
        env = one_thread() | {
            "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code, *overrides],
                cwd=tmp_path / place,
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    outputs = [process.communicate(timeout=200) for process in processes]
    for process, (_, stderr) in zip(processes, outputs, strict=True):
        assert process.returncode == 2, stderr
        assert "run.dir must be one folder for all processes (so says rank 1)" in stderr
        assert "Traceback" not in stderr
