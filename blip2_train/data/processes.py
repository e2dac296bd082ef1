"""Worker processes for work on many shards: a few tasks at a time, ended with their parent."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.connection import wait as wait_for_exit
from typing import Any, TypeVar

Result = TypeVar("Result")


def run_tasks(
    task: Callable[..., Result],
    arguments: Sequence[tuple[Any, ...]],
    workers: int,
    finished: Callable[[int, Result], None],
) -> None:
    """Call `task(*arguments[i])` for each i in worker processes, at most one per worker at a time.

    Args:
        task: a function of a module; it and its arguments must pickle.
        arguments: of each call.
        workers: number of processes.
        finished: called here with i and the result of call i, in the order in which they end.

    Raises:
        BrokenProcessPool: a worker was killed.
        Exception: whatever `task` or `finished` raises; the other workers are stopped.
    """
    if not arguments:
        return
    # Not fork: the caller may have threads (progress bars), and macOS has no safe fork at all.
    context = multiprocessing.get_context("spawn")
    waiting = iter(enumerate(arguments))
    running: dict[Future[Result], int] = {}
    with ProcessPoolExecutor(
        min(workers, len(arguments)), mp_context=context, initializer=_start_worker
    ) as pool:
        try:
            for number, given in itertools.islice(waiting, workers):
                running[pool.submit(task, *given)] = number
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    finished(running.pop(future), future.result())
                    for number, given in itertools.islice(waiting, 1):
                        running[pool.submit(task, *given)] = number
        except BaseException:  # Ctrl-C too: half a task is worth nothing, do not wait for it
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and die with it: an orphan would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # PIL's remarks on odd files name no file, and what is wrong with one is in the report.
    warnings.filterwarnings("ignore", module="PIL")
    parent = multiprocessing.parent_process()
    if parent is not None:
        watch = [parent.sentinel]
        threading.Thread(target=lambda: (wait_for_exit(watch), os._exit(1)), daemon=True).start()
