"""One job of two nodes with two tasks each, through everything that happens to jobs.

`launch/slurm.sbatch` starts it; it is preempted with one rank slowed twenty times
(`--preemptions 10` for more), loses a rank to `kill -9`, reaches its time limit, and loses its
batch node and its other node. After each of these it goes on where it was, and in the end it is,
bit for bit, the undisturbed run. The tests are the stations of this one job, in order.
"""

import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from forked import train
from slurm_cluster import Cluster
from tiny import tiny_run
from whole_runs import assert_same_end, pids_of

from blip2_train.checkpoint import io

SBATCH = Path(__file__).resolve().parents[2] / "launch" / "slurm.sbatch"
PATIENCE = 150.0  # seconds; what hangs is not waited for any longer


class Job:
    """A job and its log."""

    def __init__(self, cluster: Cluster, folder: Path, overrides: list[str]) -> None:
        self.cluster, self.folder = cluster, folder
        self.log = folder / "job.log"
        options = "--nodes=2 --ntasks-per-node=2 --cpus-per-task=2 --gpus-per-node=0 --time=60"
        self.id = cluster.call(
            "sbatch", "--parsable", *options.split(), "--signal=USR1@25", f"--output={self.log}",
            f"--chdir={folder}", str(SBATCH), *overrides,
        )  # fmt: skip
        self.read = 0  # of the log

    def expect(self, pattern: str) -> str:
        """Waits for a line of the log after the one that was expected last; its group."""
        end = time.monotonic() + PATIENCE
        while True:
            text = self.log.read_text()[self.read :] if self.log.exists() else ""
            if found := re.search(pattern, text):
                self.read += found.end()
                return found[1] if found.groups() else found[0]
            if time.monotonic() > end:
                state = self.cluster.call("scontrol", "show", "job", self.id)
                raise AssertionError(f"no {pattern!r} in\n{text[-4000:]}\n{state}")
            time.sleep(0.1)

    def ranks(self) -> dict[int, int]:
        """{rank: process}, as seen from outside of the nodes."""
        found = {}
        for pid in pids_of(f"run.dir={self.folder}"):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                rank = [w.partition(b"=")[2] for w in words if w.startswith(b"SLURM_PROCID=")]
                if rank and Path(f"/proc/{pid}/comm").read_text() == "blip2-train\n":
                    found[int(rank[0])] = pid
        return found

    @contextmanager
    def slowed(self, rank: int) -> Iterator[None]:
        """One rank runs for a twentieth of the time."""
        ended = threading.Event()
        pid = self.ranks()[rank]

        def slow() -> None:
            with suppress(ProcessLookupError):
                while not ended.is_set():
                    os.kill(pid, signal.SIGSTOP)
                    time.sleep(0.19)
                    os.kill(pid, signal.SIGCONT)
                    time.sleep(0.01)

        thread = threading.Thread(target=slow)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@pytest.fixture(scope="module")
def steps(request: pytest.FixtureRequest) -> int:
    return 60 + 10 * request.config.getoption("--preemptions")


def overrides(shards: Path, runs: Path, name: str, steps: int) -> list[str]:
    return tiny_run(
        shards, runs, name,
        **{
            "trainer.max_steps": steps, "trainer.log_every": 1, "validation.every": "null",
            "checkpoint.every": 2, "qformer.dropout": 0.1,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def job(
    cluster: Cluster, shards: Path, tmp_path_factory: pytest.TempPathFactory, steps: int
) -> Job:
    folder = tmp_path_factory.mktemp("job")
    return Job(cluster, folder, overrides(shards, folder, "run", steps))


def test_preempted(job: Job, request: pytest.FixtureRequest) -> None:
    for number in range(request.config.getoption("--preemptions")):
        job.expect(r"step (\d+)/")
        rank = random.randrange(4)
        with job.slowed(rank):
            time.sleep(random.uniform(0, 2))
            job.cluster.call("scancel", "--signal=USR1", job.id)
            saved = job.expect(r"is saved at step (\d+)")
        resumed = job.expect(r"continuing \S+ from step (\d+)")
        assert resumed == saved, f"preemption {number}, rank {rank} slowed"


def test_kill_9_of_a_rank(job: Job) -> None:
    at = int(job.expect(r"step (\d+)/"))
    os.kill(job.ranks()[random.randrange(4)], signal.SIGKILL)
    assert int(job.expect(r"continuing \S+ from step (\d+)")) >= at - 2
    (failures,) = job.folder.glob("*.failures")
    assert len(failures.read_text().splitlines()) == 1


def test_time_limit(job: Job) -> None:
    job.expect(r"step (\d+)/")
    passed = job.cluster.call("squeue", "--noheader", "--jobs", job.id, "--format=%M")
    seconds = sum(int(n) * 60**i for i, n in enumerate(reversed(passed.split(":"))))
    minutes = (seconds + 60) // 60 + 1  # Slurm looks every 30 s whether a signal is due
    job.cluster.call("scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes}")
    with job.slowed(3):
        saved = job.expect(r"SIGUSR1: saving step (\d+)")
    job.cluster.call("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    assert job.expect(r"continuing \S+ from step (\d+)") == saved


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_crash_of_a_node(job: Job, node: str) -> None:
    """The batch script runs on n1.

    This Slurm (22.05) may end the tasks on a node that has come back once more, when it repeats
    what it could not tell the node before: the run is saved and goes on all the same.
    """
    at = int(job.expect(r"step (\d+)/"))
    job.cluster.crash(node)
    end = time.monotonic() + PATIENCE
    while job.cluster.state_of(job.id) == "RUNNING":
        assert time.monotonic() < end, "Slurm has not noticed"
        time.sleep(0.3)
    job.cluster.start()
    assert int(job.expect(r"continuing \S+ from step (\d+)")) >= at - 2


def test_in_the_end_it_is_the_undisturbed_run(job: Job, shards: Path, steps: int) -> None:
    job.expect(rf"is finished at step {steps}")
    job.cluster.wait(job.id)
    train(overrides(shards, job.folder, "whole", steps), 4)
    assert_same_end(job.folder / "run", job.folder / "whole")
    assert io.newest_valid(job.folder / "run" / "checkpoints") is not None


def test_a_mistake_is_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, ["experiment=stage1_flickr8k_tiny", "sede=1"])
    job.expect("did you mean seed")
    cluster.wait(job.id)
    assert "ExitCode=2:0" in cluster.call("scontrol", "show", "job", job.id)
    assert not list(tmp_path.glob("*.failures"))
    assert "Restarts=0" in cluster.call("scontrol", "show", "job", job.id)


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    """In start-up all ranks end at once, so nothing but Slurm keeps the script from going on."""
    job = Job(cluster, tmp_path, overrides(shards, tmp_path, "run", 100))
    end = time.monotonic() + PATIENCE
    while len(job.ranks()) < 4:
        assert time.monotonic() < end, cluster.state_of(job.id)
        time.sleep(0.1)
    cluster.call("scancel", job.id)
    cluster.wait(job.id)
    said = cluster.call("scontrol", "show", "job", job.id)
    assert "JobState=CANCELLED" in said and "Restarts=0" in said
