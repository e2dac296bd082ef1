"""A sweep whose runs are jobs of Slurm, each on two processes; stopped in the middle, continued."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from slurm_cluster import Cluster
from tiny import tiny_run

from blip2_train.checkpoint import io


def test_four_configurations(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    overrides = tiny_run(
        shards, tmp_path, "tiny",
        **{"validation.every": "null", "trainer.max_steps": 12, "checkpoint.every": 2},
    )  # fmt: skip
    words = [
        sys.executable, "-m", "blip2_train.train", "-m", "hydra/launcher=slurm", *overrides,
        "optimizer.lr=1e-3,2e-3", "seed=1,2", "hydra.launcher.tasks_per_node=2",
        "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=2",
        "hydra.launcher.timeout_min=60",
    ]  # fmt: skip
    sweep = tmp_path / "tiny_sweep"
    first = subprocess.Popen(
        [*words, "hydra.launcher.array_parallelism=1"], env=cluster.env, cwd=tmp_path, text=True,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        # ignored if a shell started us with &
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    end = time.monotonic() + 150
    while not any(io.steps(path) for path in sweep.glob("*/checkpoints")):
        assert time.monotonic() < end and first.poll() is None, first.communicate()[0]
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGINT)
    output, _ = first.communicate(timeout=60)
    assert "the same command goes on with the sweep" in output
    cluster.call("scancel", "--user=root")

    done = subprocess.run(
        [*words, "hydra.launcher.array_parallelism=2"],
        env=cluster.env,
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = sorted(path.name for path in sweep.iterdir() if path.is_dir() and path.name[0] != ".")
    rates = ("0.001", "0.002")
    assert runs == [f"optimizer.lr-{rate}-seed-{seed}" for rate in rates for seed in (1, 2)]
    with (sweep / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == runs
    assert {row["status"] for row in rows} == {"finished"}
    assert [(row["optimizer.lr"], row["seed"]) for row in rows] == [
        ("0.001", "1"), ("0.001", "2"), ("0.002", "1"), ("0.002", "2"),
    ]  # fmt: skip
    for run in runs:
        assert max(io.steps(sweep / run / "checkpoints")) == 12
