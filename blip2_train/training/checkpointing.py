"""Saving a run, and going on with it."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from blip2_train import __version__
from blip2_train.checkpoint import io
from blip2_train.distributed import barrier, broadcast_object, current_world
from blip2_train.errors import UserError

log = logging.getLogger(__name__)


@dataclass
class RunState:
    """What a run is beside weights and optimizer: plain values, saved in every checkpoint.

    Attributes:
        step: optimizer steps done.
        drawn: samples drawn from each source.
        config: resolved configuration, as YAML.
        frozen: identity of every frozen part, {part: {name, weights, digest}}.
        data: identity of every source, {source: {samples, digest}}.
        wandb_id: of the W&B run.
        scores: {step: validation score}, higher is better.
        skips: steps skipped for a non-finite gradient: in all, in a row now, in a row at most.
        counted: since the last line of the log (see `Monitor.counted`).
        origin: checkpoint that `resume.from=PATH` started this run from, "" for none.
        world_size: number of processes.
    """

    step: int = 0
    drawn: dict[str, int] = field(default_factory=dict)
    config: str = ""
    frozen: dict[str, dict[str, str]] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    wandb_id: str | None = None
    scores: dict[int, float] = field(default_factory=dict)
    skips: list[int] = field(default_factory=lambda: [0, 0, 0])
    counted: dict[str, Any] = field(default_factory=dict)
    origin: str = ""
    world_size: int = 1

    def go_on_from(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes over what a checkpoint says of the run so far."""
        for name in ("step", "drawn", "wandb_id", "scores", "skips"):
            setattr(self, name, checkpoint[name])
        self.counted = checkpoint.get("counted", {})  # older files have none


def trained_state(model: nn.Module, frozen_prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The model's weights without its frozen parts, which are named and not stored."""
    return {k: v for k, v in model.state_dict().items() if not k.startswith(frozen_prefixes)}


def load_trained(
    model: nn.Module, state: dict[str, Tensor], frozen_prefixes: tuple[str, ...], path: Path
) -> None:
    """Loads what `trained_state` gave, strictly.

    Raises:
        UserError: listing every key that is missing, unexpected or of another shape.
    """
    own = trained_state(model, frozen_prefixes)
    problems = [f"missing {name}" for name in own.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - own.keys()]
    problems += [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        raise UserError(f"checkpoint {path} does not fit the model: {', '.join(sorted(problems))}")
    model.load_state_dict(state, strict=False)


class Checkpointing(pl.Callback):
    """Saves checkpoints by rank 0, keeps those the rules keep, and restores the trainer's side.

    Args:
        folder: of the checkpoints.
        state: of the run; `step` and `drawn` are brought up to date at each save.
        drawn_after: samples drawn from each source after so many micro-batches of this start.
        frozen_prefixes: parts of the model that are not stored.
        paused: stops the speed clock while a checkpoint is written.
        counted: of the monitor, called on all ranks.
        every: optimizer steps between saves.
        keep_last: newest files kept.
        keep_every: files at multiples of it are kept; None: no such rule.
        keep_best: best-scored files kept.
        resume: content of the checkpoint to go on from.
    """

    def __init__(
        self,
        folder: Path,
        state: RunState,
        drawn_after: Callable[[int], dict[str, int]],
        frozen_prefixes: tuple[str, ...],
        paused: Callable[[], contextlib.AbstractContextManager[None]],
        counted: Callable[[pl.LightningModule], dict[str, Any]],
        *,
        every: int,
        keep_last: int,
        keep_every: int | None,
        keep_best: int,
        resume: dict[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.state = state
        self.drawn_after = drawn_after
        self.frozen_prefixes = frozen_prefixes
        self.paused = paused
        self.counted = counted
        self.every = every
        self.keep = {"keep_last": keep_last, "keep_every": keep_every, "keep_best": keep_best}
        self.resume = resume
        self.start_step = state.step
        self.saved_step = state.step
        self.had_folder = folder.is_dir()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restores the optimizer and the step counters (weights were loaded before)."""
        if self.resume is None:
            return
        restore_optimizer(trainer.optimizers[0], self.resume["optimizer"])
        pl_module.skips = torch.tensor(self.state.skips)
        set_step(trainer, self.start_step)
        self.resume = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any
    ) -> None:
        """Saves when a step is due: at multiples of `every`, after a validation, at the end."""
        step = trainer.global_step
        validated = step in self.state.scores
        if step % self.every == 0 or validated or step >= trainer.max_steps:
            self.save_now(trainer, pl_module)

    def save_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Writes the checkpoint of the current step, if there is none yet; whether there is one."""
        if trainer.global_step > self.saved_step:
            with self.paused():
                if not self.save(trainer, pl_module):
                    return False
            self.saved_step = trainer.global_step
        return True

    def save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Writes the checkpoint of the current step, or says why not; all ranks call it."""
        world = current_world()
        state = self.state
        state.step = trainer.global_step
        done = (state.step - self.start_step) * trainer.accumulate_grad_batches
        state.drawn = self.drawn_after(done)
        state.skips = pl_module.skips.tolist()  # type: ignore[operator]
        state.counted = self.counted(pl_module)
        failure = None
        if world.rank == 0:
            if self.had_folder and not self.folder.is_dir():
                log.error("%s has disappeared, with its checkpoints; it is made anew", self.folder)
            content = {
                "format": io.FORMAT,
                "version": __version__,
                **vars(state),
                "model": trained_state(pl_module.model, self.frozen_prefixes),  # type: ignore[arg-type]
                "optimizer": trainer.optimizers[0].state_dict(),
            }
            try:
                io.save(io.step_path(self.folder, state.step), content)
                self.had_folder = True
            except OSError as error:
                failure = f"checkpoint of step {state.step} could not be written: {error}"
            try:
                io.prune(self.folder, scores=state.scores, **self.keep)  # type: ignore[arg-type]
            except OSError as error:
                log.error("old checkpoints could not be deleted: %s", error)
        failure = broadcast_object(failure, world)
        if failure is not None and state.step >= trainer.max_steps:
            raise UserError(
                f"{failure}; make room, and the same command goes on from the one before"
            )
        if failure is not None:
            log.error("%s; older checkpoints are untouched, and the run goes on", failure)
        barrier(world)
        return failure is None


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads moments and step counts; decay, betas and eps stay those of the configuration.

    `load_state_dict` would bring the checkpoint's back, and a permitted change had no effect.
    """
    values = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, value in zip(optimizer.param_groups, values, strict=True):
        group.update(value)


def set_step(trainer: pl.Trainer, step: int) -> None:
    """Tells Lightning that `step` optimizer steps were done.

    Its own restart logic is bypassed: it keeps half-finished loops in the checkpoint, which our
    checkpoints, always written between two steps, do not need.
    """
    loop = trainer.fit_loop.epoch_loop
    batches = step * trainer.accumulate_grad_batches
    total: Any = loop.batch_progress.total
    total.ready = total.started = total.processed = total.completed = batches
    progress = loop.automatic_optimization.optim_progress.optimizer.step.total
    progress.ready = progress.completed = step
    loop._batches_that_stepped = step


def rehearse(trainer: pl.Trainer, pl_module: Any) -> int:
    """One discarded forward and backward on a made-up batch, under DDP as in training.

    DDP orders its gradient buckets after the first backward it sees, and the order decides how
    sums are rounded. Doing it before the first real step makes a resumed run add up in the order
    of the uninterrupted one. The pass is counted, too.

    Returns:
        Floating-point operations of one sample: forward and backward, recomputation left out.
    """
    from torch.utils.flop_counter import FlopCounterMode

    batch = trainer.strategy.batch_to_device(pl_module.rehearsal_batch())
    plain = torch.compiler.set_stance("force_eager")  # the counter sees operations, not kernels
    with pl_module.rehearsing(), plain, FlopCounterMode(display=False) as counter:
        with trainer.precision_plugin.train_step_context():
            loss = trainer.strategy.training_step(batch, 0)
        assert isinstance(loss, Tensor)
        loss.backward()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return counter.get_total_flops() // pl_module.rehearsal_samples
