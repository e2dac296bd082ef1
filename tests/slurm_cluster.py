"""A real Slurm of two nodes on this machine."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "shared" / "slurm-local"


class Cluster:
    """Two nodes, n1 and n2, of four processors each."""

    def __init__(self, tool: Path, state: Path) -> None:
        self.tool, self.state = tool, state
        # the environment of this Python first: jobs call `blip2-train`
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path}

    def start(self) -> None:
        """Starts it, or a node that has crashed."""
        script = 'set -e; settings=$("$@"); eval "$settings"; echo "$SLURM_CONF"; echo "$PATH"'
        words = ["bash", "-c", script, "bash", str(self.tool), "start"]
        done = subprocess.run(
            [*words, "--state", str(self.state), "--nodes", "2"],
            env=self.env, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"no Slurm: {done.stderr.strip().splitlines()[-1]}")
        self.env["SLURM_CONF"], path = done.stdout.splitlines()
        if not self.env["PATH"].startswith(str(self.state)):
            self.env["PATH"] = path

    def crash(self, node: str) -> None:
        """Kills a node and all that runs on it."""
        subprocess.run(
            [str(self.tool), "crash", "--state", str(self.state), node], check=True, timeout=60
        )

    def stop(self) -> None:
        """Ends all jobs and daemons."""
        subprocess.run([str(self.tool), "stop", "--state", str(self.state)], timeout=100)

    def call(self, *words: str) -> str:
        """Output of one of Slurm's commands."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def state_of(self, job: str) -> str:
        """As squeue says: PENDING, RUNNING, ...; "" when it is over."""
        return self.call("squeue", "--noheader", "--jobs", job, "--states=all", "--format=%T")

    def wait(self, job: str, seconds: float = 240) -> None:
        """Until it is over."""
        end = time.monotonic() + seconds
        while self.state_of(job) in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"):
            if time.monotonic() > end:
                raise AssertionError(f"job {job} is still {self.state_of(job)}")
            time.sleep(0.3)
