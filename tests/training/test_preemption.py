"""Runs that are told to stop: saved between two steps, requeued where Slurm runs, continued."""

import os
import signal
import stat
from pathlib import Path

import pytest
from forked import start_training, train
from tiny import command, tiny_run, train_in_process
from whole_runs import assert_same_end, pids_of, start

from blip2_train import signals
from blip2_train.checkpoint import io
from blip2_train.training import fit
from blip2_train.training.module import StageModule

LONG = {"trainer.max_steps": 40, "validation.every": "null", "checkpoint.every": 1000}


def test_sigterm_saves_and_the_command_goes_on(shards: Path, tmp_path: Path) -> None:
    train(tiny_run(shards, tmp_path, "whole", **LONG))
    overrides = tiny_run(shards, tmp_path, "stopped", **LONG, **{"data.num_workers": 2})
    training = start_training(overrides)
    training.wait_for("step 6/")
    os.killpg(training.pid, signal.SIGTERM)  # Slurm signals all processes of a job, loaders too
    output = training.finish(code=128 + signal.SIGTERM)
    (step,) = io.steps(tmp_path / "stopped" / "checkpoints")
    assert 6 < step < 40 and f"is saved at step {step}" in output
    assert not (tmp_path / "stopped" / "lock.json").exists()
    overrides = tiny_run(shards, tmp_path, "stopped", **LONG)
    assert f"from step {step}" in train(overrides)
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


def test_sigusr1_requeues_once_on_two_processes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    asked = tmp_path / "asked"
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {asked}\nkill $(cat {asked}.pid)\n')
    (tools / "scontrol").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    overrides = tiny_run(shards, tmp_path, "run", **LONG)
    process = start(command(overrides, 2))
    (tmp_path / "asked.pid").write_text(str(process.pid))  # as Slurm ends what it requeues
    assert process.stdout is not None
    lines = []
    for text in process.stdout:
        lines.append(text)
        if "step 6/" in text:  # one rank alone is told
            ranks = [pid for pid in pids_of(f"run.dir={tmp_path}") if pid != process.pid]
            os.kill(max(ranks), signal.SIGUSR1)
            break
    lines += process.stdout.readlines()
    process.stdout.close()
    assert process.wait() != 0
    assert asked.read_text() == "requeue 77\n", "".join(lines)
    (step,) = io.steps(tmp_path / "run" / "checkpoints")
    assert 6 < step < 40


def test_in_start_up_it_ends_at_once(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing to save there is nothing to wait for."""

    def opened(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    monkeypatch.setattr(fit, "open_sources", opened)
    code = train_in_process(tiny_run(shards, tmp_path, "run"))
    assert code == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / "lock.json").exists()


def test_ctrl_c_ends_it_with_a_sentence(shards: Path, tmp_path: Path) -> None:
    training = start_training(tiny_run(shards, tmp_path, "run", **LONG))
    training.wait_for("step 6/")
    os.kill(training.pid, signal.SIGINT)
    output = training.finish(code=130)
    assert "\nstopped; the same command goes on" in output and "Traceback" not in output


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with signals.caught():
        with signals.noted():
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR2)
            assert signals.received() == signal.SIGUSR1
        with pytest.raises(signals.Stopped) as caught:
            os.kill(os.getpid(), signal.SIGUSR2)
        assert caught.value.code == 128 + signal.SIGUSR1
    assert signal.getsignal(signal.SIGTERM) is before


def test_after_an_error_a_signal_does_not_keep_it_from_being_said() -> None:
    with signals.caught():
        with pytest.raises(RuntimeError), signals.noted():
            raise RuntimeError("another process is gone")
        os.kill(os.getpid(), signal.SIGTERM)  # of the launcher, which has seen that too
        assert signals.received() == signal.SIGTERM
    with signals.caught(), pytest.raises(signals.Stopped):
        os.kill(os.getpid(), signal.SIGTERM)


def test_lightning_installs_no_handler_of_its_own(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = StageModule.training_step

    def step(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        seen.append(signal.getsignal(signal.SIGTERM))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(StageModule, "training_step", step)
    changes = {"trainer.max_steps": 2, "validation.every": "null"}
    assert train_in_process(tiny_run(shards, tmp_path, "run", **changes)) == 0
    assert set(seen) == {signals._handle}
