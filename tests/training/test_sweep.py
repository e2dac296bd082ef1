"""`blip2-train -m`: a folder per run, one table, and a sweep that goes on."""

import csv
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hydra.core.plugins import Plugins
from tiny import run_command, tiny_run, train_in_process
from whole_runs import one_thread

from blip2_train import signals, sweep, train
from blip2_train.checkpoint import io
from blip2_train.errors import UserError
from blip2_train.training.module import StageModule

SHORT = {"validation.every": 4, "trainer.max_steps": 4, "checkpoint.every": 2}


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def folders(sweep_folder: Path) -> list[str]:
    return sorted(path.name for path in sweep_folder.iterdir() if path.is_dir())


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("optimizer.lr=1e-4", "optimizer.lr-1e-4"),
        ("data.crop_scale=[0.5,1.0],seed=1", "data.crop_scale-0.5-1.0-seed-1"),
        ("vision.weights=/a/b c.pt", "vision.weights-a-b-c.pt"),
        ("", "run"),
    ],
)
def test_names(overrides: str, name: str) -> None:
    assert sweep.folder_name(overrides) == name


def test_long_names_stay_different() -> None:
    names = {sweep.folder_name(f"data.prompt={'x' * 300}{n}") for n in range(3)}
    assert len(names) == 3 and all(len(name) < 200 for name in names)


def test_jobs_are_a_grid() -> None:
    found = sweep.jobs(["experiment=a", "seed=1,2", "+x=range(2)", "hydra/launcher=slurm"])
    assert found == [
        ["experiment=a", "seed=1", "+x=0"], ["experiment=a", "seed=1", "+x=1"],
        ["experiment=a", "seed=2", "+x=0"], ["experiment=a", "seed=2", "+x=1"],
    ]  # fmt: skip


def test_a_signal_after_a_failed_run_ends_the_sweep(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def fails(cfg: Any, **_: Any) -> None:
        started.append(cfg.seed)
        with signals.noted():
            os.kill(os.getpid(), signal.SIGTERM)
            raise UserError("the disk is full")

    monkeypatch.setattr(train, "train", fails)
    with pytest.raises(signals.Stopped) as stopped:
        train_in_process(["-m", *tiny_run(shards, tmp_path, "tiny", **SHORT), "seed=1,2"])
    assert stopped.value.code == 128 + signal.SIGTERM and started == [1]


def test_two_runs_then_more(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    overrides = ["-m", *tiny_run(shards, tmp_path, "tiny", **SHORT)]
    assert train_in_process([*overrides, "optimizer.lr=1e-3,2e-3"]) == 0
    runs = tmp_path / "tiny_sweep"
    assert folders(runs) == ["optimizer.lr-0.001", "optimizer.lr-0.002"]
    assert [(row["status"], row["step"], row["optimizer.lr"]) for row in table(runs)] == [
        ("finished", "4", "0.001"), ("finished", "4", "0.002"),
    ]  # fmt: skip
    assert all(float(row["val/loss"]) > 0 for row in table(runs))
    printed = capsys.readouterr().out
    assert "optimizer.lr-0.001" in printed and "finished" in printed
    before = (runs / "optimizer.lr-0.001" / "checkpoints" / "step-00000004.ckpt").stat().st_mtime_ns

    # one of them fails in training, which stops neither the others nor the table
    (tmp_path / "bad").mkdir()
    more = [*overrides, "optimizer.lr=1e-3,3e-3", f"data.validation.shards={shards},{tmp_path}/bad"]
    assert train_in_process(more) == 2
    rows = {row["run"]: row for row in table(runs)}
    assert len(rows) == 6
    failed = [run for run, row in rows.items() if row["status"].startswith("failed: ")]
    assert len(failed) == 2 and all("bad" in run for run in failed)
    after = (runs / "optimizer.lr-0.001" / "checkpoints" / "step-00000004.ckpt").stat().st_mtime_ns
    assert before == after


@pytest.mark.slow
def test_two_runs_on_two_processes(shards: Path, tmp_path: Path) -> None:
    """The second process group of the same processes must not read the first one's keys."""
    overrides = tiny_run(shards, tmp_path, "tiny", **SHORT)
    done = run_command(["-m", *overrides, "seed=1,2"], 2, env=one_thread())
    assert done.returncode == 0, done.stdout + done.stderr
    assert folders(tmp_path / "tiny_sweep") == ["seed-1", "seed-2"]
    assert {p.name for p in tmp_path.iterdir()} == {"tiny_sweep"}
    assert [row["status"] for row in table(tmp_path / "tiny_sweep")] == ["finished", "finished"]
    for name in ("seed-1", "seed-2"):
        assert max(io.steps(tmp_path / "tiny_sweep" / name / "checkpoints")) == 4


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("seed=1", "needs a key with several values"),
        ("sede=1,2", "did you mean seed?"),
        ("seed=1,-2", "seed=-2"),
        ("optimizer.lr=1e-3,fast", "optimizer.lr=fast"),
        ("seed=1,2)", "seed=1,2)"),
        ("hydra.sweep.dir=elsewhere", "give sweep.name"),
    ],
)
def test_every_configuration_is_checked_first(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture, given: str, sentence: str
) -> None:
    assert train_in_process(["-m", *tiny_run(shards, tmp_path, "tiny"), given]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
    assert not (tmp_path / "tiny_sweep").exists()


def test_dry_run(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    overrides = tiny_run(shards, tmp_path, "tiny")
    assert train_in_process(["-m", *overrides, "batch.size=12,24", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "batch 12 =" in printed and "batch 24 =" in printed
    assert not (tmp_path / "tiny_sweep").exists()


def test_what_a_bug_ends_is_a_failed_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Memory that ran out, say: the next run goes on in a process without leftovers."""
    step = StageModule.training_step
    calls = 0

    def training_step(self, batch, number):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("CUDA out of memory\nand so on")
        return step(self, batch, number)

    monkeypatch.setattr(StageModule, "training_step", training_step)
    overrides = tiny_run(shards, tmp_path, "tiny", **SHORT | {"wandb.mode": "offline"})
    assert train_in_process(["-m", *overrides, "seed=1,2"]) == 2
    assert "Traceback" in capsys.readouterr().err
    rows = table(tmp_path / "tiny_sweep")
    assert [row["status"] for row in rows] == [
        "failed: RuntimeError: CUDA out of memory",
        "finished",
    ]
    runs = [list(tmp_path.glob(f"tiny_sweep/seed-{seed}/wandb/offline-run-*")) for seed in (1, 2)]
    assert [len(found) for found in runs] == [1, 1]


def test_a_launcher_that_fails(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def launch(*_: object, **__: object) -> None:
        raise RuntimeError("no such partition")

    monkeypatch.setattr(Plugins, "instantiate_launcher", launch)
    assert train_in_process(["-m", *tiny_run(shards, tmp_path, "tiny"), "seed=1,2"]) == 2
    error = capsys.readouterr().err
    assert "no such partition" in error and "stopped; the same command goes on" in error


@pytest.mark.slow
def test_experiments_and_names_may_vary(shards: Path, tmp_path: Path) -> None:
    overrides = tiny_run(shards, tmp_path, "tiny", **SHORT)
    named = [o for o in overrides if not o.startswith("run.name=")]
    assert train_in_process(["-m", *named, "run.name=a,b"]) == 0
    assert folders(tmp_path / "a_sweep") == ["run.name-a", "run.name-b"]
    assert {path.name for path in tmp_path.iterdir()} == {"a_sweep"}


@pytest.mark.slow
def test_a_run_whose_last_checkpoint_is_missing_is_not_finished(
    shards: Path, tmp_path: Path
) -> None:
    overrides = tiny_run(shards, tmp_path, "tiny", **SHORT)
    assert train_in_process(["-m", *overrides, "seed=1,2"]) == 0
    run = tmp_path / "tiny_sweep" / "seed-1"
    io.step_path(run / "checkpoints", 4).unlink()
    with (run / "metrics.csv").open("a") as file:
        file.write("5,1.2e-")  # the end of a process that was killed
    (tmp_path / "tiny_sweep" / "seed-2" / "config.yaml").write_text("")
    rows = sweep.results(tmp_path / "tiny_sweep")
    assert [row["status"] for row in rows] == ["stopped at step 4"] * 2
