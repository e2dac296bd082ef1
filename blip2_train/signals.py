"""SIGTERM, SIGUSR1 and SIGUSR2 end a run; during training they are noted and obeyed between steps.

Saving, or any collective, inside a handler deadlocks as soon as two ranks are interrupted at
different places, so a handler only sets a flag.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

# Time is nearly up, or the machine is wanted: the run is to go on later (SIGUSR2 is submitit's).
REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)
CAUGHT = (*REQUEUE, signal.SIGTERM)


class Stopped(SystemExit):
    """A signal ended the run: exit code 128 + its number, as of a process that a signal ended.

    No `Exception`: what catches those (Hydra, submitit) must not take it for a result.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class _State:
    number = 0  # of the signal, 0: none
    noting = False


_state = _State()


def received() -> int:
    """Number of the signal that was noted, the first one of several; 0: none.

    At its time limit Slurm sends SIGTERM, also to a job that is about to save and requeue.
    """
    return _state.number


def _handle(number: int, _: Any) -> None:
    _state.number = _state.number or number
    if not _state.noting:
        raise Stopped(_state.number)


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Within, these signals raise `Stopped`; the handlers of before come back afterwards.

    Python lets only the main thread do this; in any other one nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _handle) for number in CAUGHT}
    _state.number = 0
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _state.noting = False


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Within, and within `caught`, they are noted for `received` and nothing else happens.

    After an error they stay so until the end of `caught`: a launcher ends all processes once one
    has failed, and each is to say first what it knows.
    """
    _state.noting = True
    yield
    _state.noting = False


def obey_parent_only() -> None:
    """In a loader process: Slurm signals all processes of a job, but this one's parent needs it.

    SIGTERM, with which the parent ends it, is obeyed from the parent alone, where the system says
    who sent it (Linux).
    """
    for number in REQUEUE:
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # also of threads that come later
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
