"""Commands that are there at once: forked from a process that has imported everything.

To import torch and Lightning takes longer than most tests. What such processes do is real, and so
are the collectives between them; only the start is missing, for which there is `tiny.command`.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from faulty_server import free_port

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["blip2_train.train", "blip2_train.training.fit"])


class Forked:
    """A command on so many processes, as torchrun would start them.

    Args:
        main: of the module; returns the exit code.
        arguments: given to it.
        processes: number of ranks.
    """

    def __init__(
        self, main: Callable[[list[str]], int], arguments: list[str], processes: int = 1
    ) -> None:
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
            process = SERVER.Process(target=_run, args=(main, arguments, common | own, name))
            process.start()
            self.ranks.append(process)
        self.pid: Any = self.ranks[0].pid

    def output(self) -> str:
        """What all of them have written so far, stdout and stderr."""
        return self.log.read_text()

    def wait_for(self, line: str, seconds: float = 200) -> None:
        """Returns once they have written this."""
        end = time.monotonic() + seconds
        while line not in self.output():
            assert self.is_alive() and time.monotonic() < end, self.output()
            time.sleep(0.01)

    def is_alive(self) -> bool:
        """Whether any of them runs."""
        return any(process.is_alive() for process in self.ranks)

    def finish(self, code: int = 0, seconds: float = 300) -> str:
        """Waits until all of them end with this exit code; what they wrote."""
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        output = self.kill()
        assert codes == [code] * len(codes), f"exit codes {codes}\n{output}"
        return output

    def kill(self) -> str:
        """SIGKILL for all of them and their children; what they wrote."""
        for process in self.ranks:
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
        for process in self.ranks:
            process.join()
        output = self.output()
        self.log.unlink()
        return output


def start_training(overrides: list[str], processes: int = 1) -> Forked:
    """`blip2-train` with these overrides."""
    from blip2_train.train import run

    return Forked(run, overrides, processes)


def train(overrides: list[str], processes: int = 1) -> str:
    """A whole training, or the rest of one; what it wrote."""
    return start_training(overrides, processes).finish()


def begin(environ: dict[str, str]) -> None:
    """Makes a forked process what it would be without the server."""
    os.environ.clear()
    os.environ |= environ
    multiprocessing.set_start_method(None, force=True)  # or its loaders would need a server


def _run(
    main: Callable[[list[str]], int], arguments: list[str], environ: dict[str, str], log: str
) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if a shell started us with &
    begin(environ)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(main(arguments))
