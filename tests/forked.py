"""Processes that are there at once: forked from one that has imported everything.

To import torch and Lightning takes longer than most tests. What such processes do is real, and so
are the collectives between them; only the launcher is missing, for which `tiny.command` is there.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

from faulty_server import free_port

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["blip2_train.train", "blip2_train.training.fit"])


class Training:
    """`blip2-train` with these overrides on so many processes, as torchrun would start them."""

    def __init__(self, overrides: list[str], processes: int = 1) -> None:
        handle, name = tempfile.mkstemp(prefix="blip2-train-", suffix=".log")
        os.close(handle)
        self.log = Path(name)
        # whatever a test has changed since the server was started
        common = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
        if processes > 1:
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        self.ranks = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            process = SERVER.Process(target=_train, args=(overrides, common | own, name))
            process.start()
            self.ranks.append(process)

    def output(self) -> str:
        """What all of them have written so far, stdout and stderr."""
        return self.log.read_text()

    def finish(self, seconds: float = 300) -> str:
        """Waits for the end, without failure, of all of them; what they wrote."""
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        self.kill()
        output = self.output()
        self.log.unlink()
        assert not any(codes) and None not in codes, f"exit codes {codes}\n{output}"
        return output

    def kill_after(self, line: str, folder: Path, seconds: float = 300) -> None:
        """Kills all of them once they have written this, and the folder is there."""
        end = time.monotonic() + seconds
        while not (line in self.output() and folder.is_dir()):
            running = any(process.is_alive() for process in self.ranks)
            assert running and time.monotonic() < end, self.output()
            time.sleep(0.01)
        self.kill()
        self.log.unlink()

    def kill(self) -> None:
        """SIGKILL."""
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()


def train(overrides: list[str], processes: int = 1) -> str:
    """A whole training, or the rest of one; what it wrote."""
    return Training(overrides, processes).finish()


def begin(environ: dict[str, str]) -> None:
    """Makes a forked process what it would be without the server."""
    os.environ.clear()
    os.environ |= environ
    multiprocessing.set_start_method(None, force=True)  # or its loaders would need a server


def _train(overrides: list[str], environ: dict[str, str], log: str) -> None:
    from blip2_train.train import run

    begin(environ)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(run(overrides))
