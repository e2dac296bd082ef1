"""What the Lightning modules of all stages share: optimizer, schedule, clipping, skipped steps."""

import abc
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from blip2_train.config import BatchPlan
from blip2_train.data.transforms import flip_images
from blip2_train.distributed import World, current_world
from blip2_train.models.freezing import EvalOnly
from blip2_train.seeding import stable_hash
from blip2_train.training.meter import Level, Meter
from blip2_train.training.optimizer import learning_rate, parameter_groups

READY = "ready"  # key of the event after which a batch that was prepared ahead may be used


class StageModule(pl.LightningModule, abc.ABC):
    """A training; each stage says what its step computes.

    Args:
        model: with its frozen parts frozen.
        meter: sums what `step` gives.
        batch: how the global batch is cut.
        seed: of dropout and of whatever a step draws.
        optimizer: `lr`, `betas`, `eps`, `weight_decay`, `grad_clip` (largest norm or None),
            `layer_decay` (see `parameter_groups`; none where it is missing).
        schedule: arguments of `learning_rate` but `step` and `lr`.
    """

    rehearsal_samples = 2
    usual_tokens = 16  # of a text of a rehearsal
    vocabulary = 0  # words among which a loss chooses; 0: no loss does

    def __init__(
        self,
        model: nn.Module,
        *,
        meter: Meter,
        batch: BatchPlan,
        seed: int,
        optimizer: Mapping[str, Any],
        schedule: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.meter = meter
        self.batch = batch
        self.seed = seed
        self.optimizer = optimizer
        self.schedule = schedule
        # DDP neither broadcasts nor watches what is frozen; it reads this name
        self._ddp_params_and_buffers_to_ignore = [
            f"model.{name}.{own}"
            for name, part in model.named_modules()
            if isinstance(part, EvalOnly)
            for own, value in [*part.named_parameters(), *part.named_buffers()]
            if not value.requires_grad
        ]
        # steps skipped for a non-finite gradient: in all, in a row now, in a row at most
        self.skips = torch.zeros(3, dtype=torch.int64)
        self.is_rehearsing = False

    # -- what a stage fills in -------------------------------------------------------------------

    @abc.abstractmethod
    def step(self, batch: dict[str, Any], step: int, part: int, world: World) -> dict[str, Tensor]:
        """Losses of one micro-batch: `loss` to call backward on, and what the meter sums.

        Args:
            batch: on the device, as `see` leaves it.
            step: optimizer step, from 0.
            part: micro-batch within the step.
            world: the ranks.
        """

    @abc.abstractmethod
    def rehearsal_batch(
        self, samples: int = rehearsal_samples, longest: int | None = None
    ) -> dict[str, Any]:
        """A made-up batch that reaches every parameter that training reaches.

        Args:
            samples: of the batch.
            longest: tokens that a text may have; each has so many. None: as many as is usual.
        """

    @abc.abstractmethod
    def rehearsal_loss(self) -> Tensor:
        """Loss of a tiny made-up batch on this process alone.

        It may leave out frozen parts and the image tower, see `freeze_unreached`.
        """

    @abc.abstractmethod
    def levels(self, contrastive: float) -> dict[str, Level]:
        """What each loss is without learning and at best, with so many samples compared."""

    def image_tokens(self, image: Tensor) -> Tensor | None:
        """Tokens [B, P, Dv] of the image tower, where there is one; with a gradient if it learns.

        Args:
            image: [B, ...], flipped, as the tower takes them.
        """
        return None

    def after_step(self) -> None:
        """Called without gradient after each optimizer step."""

    def before_validation(self, world: World) -> None:
        """Called on all ranks before the model is evaluated."""

    def watched(self) -> dict[str, float]:
        """Further numbers for the log, {name: value}; may wait for the device."""
        return {}

    # -- Lightning -------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one micro-batch (one of `batch.accumulate` in an optimizer step)."""
        batch = self.prepared(batch)
        world, step = current_world(), self.trainer.global_step
        part = batch_idx % self.batch.accumulate
        # seeded by the step: a resumed run needs no stored generator
        torch.manual_seed(stable_hash("dropout", self.seed, step, part, world.rank))
        out = self.step(batch, step, part, world)
        # every step weighs the same, also where a resumed run cuts its batch in another way
        self.meter.add(out, weight=1 / (world.size * self.batch.accumulate))
        return out["loss"]

    def prepared(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch as `step` takes it; one that was prepared ahead is waited for, on the device.

        Args:
            batch: on the device, or from `overlap.Ahead`.
        """
        if READY not in batch:
            return self.see(batch)
        current = torch.cuda.current_stream()
        current.wait_event(batch[READY])
        # their memory is the other stream's to reuse
        apply_to_collection(batch, Tensor, lambda tensor: tensor.record_stream(current))
        return batch

    def see(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with its images flipped, or `image_tokens` in their place; once is enough.

        Args:
            batch: on the device.
        """
        if "image" not in batch:
            return batch
        image = batch["image"]
        if "flip" in batch:
            image = flip_images(image, batch["flip"])
        tokens = self.image_tokens(image)
        found = {"image": image} if tokens is None else {"image_tokens": tokens}
        return {k: v for k, v in batch.items() if k not in ("image", "flip")} | found

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on what is trained, fused on CPU and GPU alike."""
        groups = parameter_groups(
            self.model, self.optimizer["weight_decay"], self.optimizer.get("layer_decay", 1.0)
        )
        return torch.optim.AdamW(
            groups,
            lr=self.optimizer["lr"],
            betas=tuple(self.optimizer["betas"]),
            eps=self.optimizer["eps"],
            fused=True,
        )

    def learning_rate(self, step: int) -> float:
        """Of an optimizer step, counted from 0; groups take their `lr_scale` of it."""
        return learning_rate(step, lr=self.optimizer["lr"], **self.schedule)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any
    ) -> None:
        """Measures the gradient, clips it, and has a non-finite step skipped on the device.

        DDP has averaged the gradients, so all ranks decide alike; the fused optimizer leaves
        weights and its own state alone where `found_inf` is set. Nothing waits for the device.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.optimizer["grad_clip"] is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.optimizer["grad_clip"], norm)
        bad = ~norm.isfinite()
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        skips = self.skips.to(norm.device)
        in_a_row = (skips[1] + 1) * bad
        self.skips = torch.stack([skips[0] + bad, in_a_row, torch.maximum(skips[2], in_a_row)])
        self.grad_norm = norm.detach()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Sets the groups' learning rates before; the stage's `after_step` comes after."""
        rate = self.learning_rate(self.trainer.global_step)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate * group["lr_scale"]
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.after_step()

    @contextlib.contextmanager
    def rehearsing(self) -> Iterator[None]:
        """A pass inside leaves no trace: no gradient, no sums, no running statistics.

        Nothing is recomputed in it either, so that its arithmetic can be counted.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        checkpointed = [
            module
            for module in self.model.modules()
            if getattr(module, "gradient_checkpointing", False) is True
        ]
        for module in checkpointed:
            module.gradient_checkpointing = False
        self.is_rehearsing = True
        yield
        self.is_rehearsing = False
        for module in checkpointed:
            module.gradient_checkpointing = True
        for buffer, before in buffers:
            buffer.copy_(before)
        self.zero_grad(set_to_none=True)
        self.meter.sums = None
