"""Errors of disks and networks that may pass: trying again, with growing pauses, for some time."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds
_random = random.Random()  # pauses only: nothing that is learned from depends on it


def pauses(seconds: float) -> Iterator[float]:
    """Yield pauses that double from one second to half a minute and last `seconds` in all."""
    pause = FIRST_PAUSE
    while seconds > 0:
        yield min(pause, seconds)
        seconds -= pause
        pause = min(2 * pause, LONGEST_PAUSE)


def with_retries(
    attempt: Callable[[], T], seconds: float, what: str, give_up: Callable[[], object] | None = None
) -> T:
    """Return `attempt()`; where it raises OSError, try again for so long.

    Args:
        attempt: what may fail.
        seconds: sum of the pauses; the last attempt comes after it.
        what: is read, for the log.
        give_up: called after each failure; what an attempt left behind is let go of here.

    Raises:
        OSError: of the last attempt.
    """
    for pause in pauses(seconds):
        try:
            return attempt()
        except OSError as error:
            if give_up is not None:
                give_up()
            # Up to half of it more or less: hundreds of ranks would come back all at once.
            pause *= _random.uniform(0.5, 1.5)
            reason = str(error) if what in str(error) else f"{what}: {error}"
            log.warning("%s; trying again in %.1f s", reason, pause)
            time.sleep(pause)
    return attempt()
