"""A run that makes no step any more: every rank says where it stands, and ends."""

import os
import socket
import sys
import threading
import time
import traceback
from typing import Any

import pytorch_lightning as pl

from blip2_train.distributed import current_world

EXIT_CODE = 3  # as of any trouble from outside: the same command goes on


class Watchdog(pl.Callback):
    """Ends the process when nothing has moved for too long.

    One rank that hangs holds up all others in their next collective, so all ranks end, each with
    the stacks of its threads; the odd one out is the culprit.

    Args:
        seconds: without a step, or a batch of a validation, after which the process ends.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.step = 0
        self.idle = 0.0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Something has moved."""
        self.idle = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begins to watch."""
        self.step = trainer.global_step
        self.thread.start()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Notes that the step before is over, with all that came after it."""
        self.step = trainer.global_step
        self.beat()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stops watching."""
        self.ended.set()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Stops watching: the run is ending."""
        self.ended.set()

    def _watch(self) -> None:
        tick = min(1.0, self.seconds / 10)
        before = time.monotonic()
        while not self.ended.wait(tick):
            now = time.monotonic()
            # a process that was stopped and set going again (SIGSTOP, a suspended job) did not hang
            self.idle += min(now - before, 2 * tick)
            before = now
            if self.idle > self.seconds:
                os.write(sys.__stderr__.fileno(), self.describe().encode())  # type: ignore[union-attr]
                os._exit(EXIT_CODE)

    def describe(self) -> str:
        """Who hangs where: rank, machine, step and the stacks of all threads but this one's."""
        rank, size = current_world().rank, current_world().size
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        text = (
            f"[rank {rank}] error: step {self.step + 1} has made no progress for "
            f"{self.seconds:.0f} s (trainer.hang_seconds); rank {rank} of {size}, process "
            f"{os.getpid()} on {socket.gethostname()}, ends; the same command goes on from the "
            "last checkpoint\n"
        )
        for ident, frame in sys._current_frames().items():
            if ident == threading.get_ident():
                continue
            text += f"[rank {rank}] thread {names.get(ident, ident)}:\n"
            text += "".join(traceback.format_stack(frame))
        return text
