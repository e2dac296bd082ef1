"""Speed, health and progress of a run, every few steps."""

import contextlib
import json
import logging
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from tqdm import tqdm

from blip2_train.data.feeder import Feeder
from blip2_train.distributed import current_world, gather_objects, ring_sum_bytes, traffic
from blip2_train.errors import UserError
from blip2_train.models.linear import product
from blip2_train.training.checkpointing import rehearse
from blip2_train.training.meter import describe_losses
from blip2_train.training.run_log import SkippedLog

log = logging.getLogger(__name__)


class Monitor(pl.Callback):
    """Logs a line and a row of metrics every `log_every` steps; stops a run that went wrong.

    Args:
        feeder: knows how long training waited for data.
        skipped: where unusable samples are written down (rank 0).
        epochs_after: epochs of each source after so many micro-batches of this start.
        counted: of `counted()` when the run was saved; empty: nothing yet.
        start_step: optimizer steps done before this start.
        log_every: optimizer steps between lines.
        max_consecutive_skips: non-finite steps in a row after which the run stops.
        max_skip_fraction: share of undecodable samples above which the run stops.
    """

    def __init__(
        self,
        feeder: Feeder,
        skipped: SkippedLog | None,
        epochs_after: Callable[[int], dict[str, float]],
        counted: Mapping[str, Any],
        *,
        start_step: int,
        log_every: int,
        max_consecutive_skips: int,
        max_skip_fraction: float,
    ) -> None:
        self.feeder = feeder
        self.skipped_log = skipped
        self.epochs_after = epochs_after
        self.start_step = start_step
        self.log_every = log_every
        self.max_consecutive_skips = max_consecutive_skips
        self.max_skip_fraction = max_skip_fraction
        self.keys: deque[list[str]] = deque(maxlen=log_every + max_consecutive_skips)  # per step
        self.step_keys: list[str] = []
        self.skipped: list[Any] = []  # of this rank since the last line
        self.totals = {"used": 0, "skipped": 0}  # over all ranks, up to the last line
        self.saved = counted
        self.last_step = start_step
        self.bar: tqdm | None = None

    # -- time ------------------------------------------------------------------------------------

    def restart_clock(self) -> None:
        """Begins a new measuring window."""
        self.window_start = time.perf_counter()
        self.window_wait = self.feeder.wait_seconds
        self.window_received = Counter(traffic.received)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time and traffic inside count for no step (validation, saving)."""
        started, exchanged = time.perf_counter(), Counter(traffic.received)
        yield
        self.window_start += time.perf_counter() - started
        self.window_received += traffic.received - exchanged

    # -- what a checkpoint keeps -----------------------------------------------------------------

    def counted(self, pl_module: Any) -> dict[str, Any]:
        """What the next line is made of, so that a run killed before it writes the same line.

        All ranks call it; it waits for the device.

        Returns:
            `sums` of every rank's meter, `skipped` samples that are not in skipped.jsonl yet,
            `totals` up to the last line.
        """
        world = current_world()
        sums = pl_module.meter.sums
        own = {"sums": None if sums is None else sums.tolist(), "skipped": self.skipped}
        ranks = gather_objects(own, world)
        return {
            "sums": [rank["sums"] for rank in ranks if rank["sums"] is not None],
            "skipped": [line for rank in ranks for line in rank["skipped"]],
            "totals": dict(self.totals),
        }

    def _restore(self, pl_module: Any) -> None:
        if not self.saved:
            return
        world = current_world()
        own = self.saved["sums"][world.rank :: world.size]  # there may be other ranks now
        if own:
            sums = torch.tensor(own, dtype=torch.float64, device=pl_module.device)
            pl_module.meter.sums = sums.sum(dim=0)
        self.skipped = list(self.saved["skipped"]) if world.rank == 0 else []
        self.totals = dict(self.saved["totals"])

    # -- hooks -----------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Rehearses a step, measures the device's ceiling and opens the progress bar."""
        self.flops_per_sample = rehearse(trainer, pl_module)
        self._restore(pl_module)
        self.ceiling = matmul_ceiling(pl_module.device, trainer.precision)
        self.levels = pl_module.levels(pl_module.batch.contrastive)
        self.samples_per_step = pl_module.batch.size
        if trainer.is_global_zero and sys.stderr.isatty():
            self.bar = tqdm(total=trainer.max_steps, initial=self.last_step, unit="step")
        self.restart_clock()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch; at the end of a logging window reports it."""
        self.step_keys += batch["keys"]
        self.skipped += batch["skipped"]
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        self.keys.append(self.step_keys)
        self.step_keys = []
        step = trainer.global_step
        if self.bar is not None:
            self.bar.update(1)
        if step % self.log_every == 0 or step >= trainer.max_steps:
            self.report(trainer, pl_module, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()

    # -- a line of the log -----------------------------------------------------------------------

    def report(self, trainer: pl.Trainer, pl_module: Any, step: int) -> None:
        """Reads the device once, logs, and stops the run where it must not go on."""
        world = current_world()
        metrics = {
            f"train/{k}": v for k, v in pl_module.meter.read(world, pl_module.device).items()
        }
        elapsed = time.perf_counter() - self.window_start
        steps = step - self.last_step
        batch = pl_module.batch
        rate = steps * batch.size / elapsed
        in_all, _, in_a_row = pl_module.skips.tolist()
        micro_batches = (step - self.start_step) * trainer.accumulate_grad_batches
        epochs = {f"epochs/{k}": v for k, v in self.epochs_after(micro_batches).items()}
        memory = _peak_memory_gb(pl_module.device)
        watched = pl_module.watched()
        metrics |= {
            "samples_per_second": rate,
            "samples_per_second_per_device": rate / world.size,
            "data_wait_share": (self.feeder.wait_seconds - self.window_wait) / elapsed,
            "lr": pl_module.learning_rate(step - 1),
            "gradient_norm": float(pl_module.grad_norm),
            **watched,
            **epochs,
            "skipped_steps": in_all,
            "peak_memory_gb": max(gather_objects(memory, world)),
            "model_flops_utilisation": rate / world.size * self.flops_per_sample / self.ceiling,
        }
        metrics |= self._received(pl_module, steps) | self._count_skipped(step, steps * batch.size)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)
        self._print(trainer, step, metrics, watched)
        self.last_step = step
        self.restart_clock()
        self._stop_if_broken(in_a_row)

    def _received(self, pl_module: Any, steps: int) -> dict[str, float]:
        """Megabytes (1e6) that a rank has received per step, of the rank that got most."""
        world = current_world()
        if world.size == 1:
            return {}
        own = {kind: n / steps for kind, n in (traffic.received - self.window_received).items()}
        gradients = sum(p.nbytes for p in pl_module.parameters() if p.requires_grad)
        own["gradients"] = ring_sum_bytes(gradients, world.size)  # DDP's, once per step
        ranks = gather_objects(own, world)
        kinds = sorted({kind for rank in ranks for kind in rank})
        return {
            f"received_mb/{kind}": max(rank.get(kind, 0) for rank in ranks) / 1e6 for kind in kinds
        }

    def _count_skipped(self, step: int, used: int) -> dict[str, int]:
        everything = [
            line for part in gather_objects(self.skipped, current_world()) for line in part
        ]
        self.skipped = []
        if self.skipped_log is not None:
            self.skipped_log.add(step, everything)
        self.totals["used"] += used
        self.totals["skipped"] += len(everything)
        return {"skipped_samples": self.totals["skipped"]}

    def _print(
        self,
        trainer: pl.Trainer,
        step: int,
        metrics: dict[str, float],
        watched: dict[str, float],
    ) -> None:
        if not trainer.is_global_zero:
            return
        more = "".join(f"{name} {value:.4f}  " for name, value in watched.items())
        train = {k.removeprefix("train/"): v for k, v in metrics.items() if k.startswith("train/")}
        epochs = {
            k.removeprefix("epochs/"): v for k, v in metrics.items() if k.startswith("epochs/")
        }
        line = (
            f"step {step}/{trainer.max_steps}  loss {train['loss']:.4f}  "
            f"{describe_losses(train, self.levels)}  lr {metrics['lr']:.2e}  "
            f"grad {metrics['gradient_norm']:.2f}  {more}"
            f"{metrics['samples_per_second']:.1f} samples/s  "
            f"data wait {metrics['data_wait_share']:.0%}  "
            f"mfu {metrics['model_flops_utilisation']:.1%}  "
            f"mem {metrics['peak_memory_gb']:.1f} GB  "
            f"epochs {', '.join(f'{name} {done:.2f}' for name, done in epochs.items())}"
        )
        if trainer.max_steps > step:
            seconds = (trainer.max_steps - step) * self.samples_per_step
            seconds /= metrics["samples_per_second"]
            line += f"  left {timedelta(seconds=round(seconds))}"
        if metrics["skipped_steps"]:
            line += f"  skipped steps {metrics['skipped_steps']}"
        if metrics["skipped_samples"]:
            line += f"  skipped samples {metrics['skipped_samples']}"
        if self.bar is not None:
            with self.bar.external_write_mode():
                log.info(line)
        else:
            log.info(line)

    def _stop_if_broken(self, skips_in_a_row: int) -> None:
        if skips_in_a_row >= self.max_consecutive_skips:
            own = [key for keys in list(self.keys)[-skips_in_a_row:] for key in keys]
            guilty = [key for part in gather_objects(own, current_world()) for key in part]
            raise UserError(
                f"the gradient was not finite in the last {skips_in_a_row} steps "
                f"(trainer.max_consecutive_skips={self.max_consecutive_skips}); lower "
                f"optimizer.lr, or look at these samples: {json.dumps(guilty[:64])}"
            )
        seen = self.totals["used"] + self.totals["skipped"]
        fraction = self.totals["skipped"] / seen if seen else 0.0
        # a handful of samples says nothing about the share
        if self.totals["skipped"] >= 10 and fraction > self.max_skip_fraction:
            raise UserError(
                f"{self.totals['skipped']} of {seen} samples could not be used, more than "
                f"data.max_skip_fraction={self.max_skip_fraction}; skipped.jsonl in the run "
                "folder names them"
            )


def matmul_ceiling(device: torch.device, precision: str) -> float:
    """What this device really multiplies per second, in the precision of training, FLOP/s.

    Utilisation is given against this and not against a data sheet, so that it means the same on
    any device. Takes well under a second.
    """
    size = 8192 if device.type == "cuda" else 1024
    dtype = {"bf16-mixed": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)

    def once() -> float:
        started = time.perf_counter()
        product(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    return 2 * size**3 / min(once() for _ in range(5))


def _peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far: of the device's allocator, or of this process on a CPU, 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
