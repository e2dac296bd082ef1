"""A run that is told to stop: the ranks agree on it between two steps and save together."""

import logging
import signal
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from blip2_train import signals
from blip2_train.distributed import PendingMaximum, agree_on_maximum, current_world
from blip2_train.errors import UserError
from blip2_train.training.lock import RunLock

log = logging.getLogger(__name__)

LOCK_LOST = 1000  # above the number of any signal


class Preemption(pl.Callback):
    """Ends the training after a step that all ranks agree on; stands last among the callbacks.

    What each rank has noted at the end of a step is read by all at the end of the next one, so
    that nobody waits for the answer.

    Args:
        save: writes a checkpoint of the current step, called on all ranks; whether it could.
        lock: of the run's folder; rank 0 alone has it.

    Attributes:
        stopped: number of the signal that ended the training, 0: none did.
        saved: whether there is a checkpoint of the step after which it ended.
    """

    def __init__(self, save: Callable[[pl.Trainer, Any], bool], lock: RunLock | None) -> None:
        self.save = save
        self.lock = lock
        self.asked: PendingMaximum | None = None
        self.stopped = 0
        self.saved = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads what was asked a step ago, then asks again."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        found = self.asked.result() if self.asked is not None else 0
        self.asked = None
        if found == LOCK_LOST:
            raise UserError(
                "another process has taken the run's folder over (see lock.json there); this one "
                "stops without saving"
            )
        if found:
            name = signal.Signals(found).name
            log.warning("%s: saving step %d, then stopping", name, trainer.global_step)
            self.saved = self.save(trainer, pl_module)
            self.stopped = found
            trainer.should_stop = True
            return
        own = LOCK_LOST if self.lock is not None and self.lock.lost else signals.received()
        self.asked = agree_on_maximum(own, current_world())

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Leaves no collective under way."""
        if self.asked is not None:
            self.asked.result()


def leave_signals_alone(trainer: pl.Trainer) -> None:
    """Keeps Lightning (2.6) from handling signals, which is done in `signals`.

    Its SIGTERM handler broadcasts wherever the rank happens to be, and before each batch every
    rank reads a flag from the device, so that the host would wait for the device in every step.
    """
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    if hasattr(trainer, "_signal_connector"):
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
