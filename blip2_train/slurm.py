"""What a run asks of Slurm: to be started again."""

import logging
import os
import subprocess
import time
from collections.abc import Mapping

from blip2_train import signals

log = logging.getLogger(__name__)


def requeue(rank: int, environ: Mapping[str, str] = os.environ) -> None:
    """Puts this process's job back into the queue, where it is one of Slurm.

    All ranks call it and only rank 0 asks. The others wait for Slurm to end them: srun would take
    one that left first for a failure, and kill rank 0 before it has asked.

    Args:
        rank: of this process.
        environ: where Slurm says which job this is.
    """
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if rank != 0:
        time.sleep(200)
        return
    with signals.noted():  # another one must not end scontrol
        _ask(job)


def _ask(job: str) -> None:
    for _ in range(3):
        try:
            done = subprocess.run(
                ["scontrol", "requeue", job], capture_output=True, text=True, timeout=60
            )
            problem = done.stderr.strip() if done.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        if not problem:
            log.info("job %s goes back into the queue", job)
            return
        log.warning("scontrol requeue %s: %s", job, problem)
        time.sleep(5)
    log.error("job %s could not be requeued; the same command goes on with the run", job)
