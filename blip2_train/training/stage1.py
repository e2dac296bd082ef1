"""The Lightning module of stage 1."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from blip2_train.config import BatchPlan
from blip2_train.distributed import World, current_world
from blip2_train.models.stage1 import Blip2Stage1
from blip2_train.seeding import stable_hash
from blip2_train.training.meter import Meter
from blip2_train.training.objectives import LossConfig, draw_uniform, stage1_step
from blip2_train.training.optimizer import learning_rate, parameter_groups

TEMP_RANGE = (0.001, 0.5)


class Stage1Module(pl.LightningModule):
    """Stage-1 training: frozen tower -> Q-Former -> ITC, ITM and captioning.

    Args:
        model: with its frozen parts frozen.
        loss: the objectives.
        batch: how the global batch is cut.
        seed: of negatives and dropout.
        optimizer: `lr`, `betas`, `eps`, `weight_decay`, `grad_clip` (largest norm or None).
        schedule: arguments of `learning_rate` but `step` and `lr`.
    """

    def __init__(
        self,
        model: Blip2Stage1,
        *,
        loss: LossConfig,
        batch: BatchPlan,
        seed: int,
        optimizer: Mapping[str, Any],
        schedule: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.batch = batch
        self.seed = seed
        self.optimizer = optimizer
        self.schedule = schedule
        self.meter = Meter(loss)
        # DDP neither broadcasts nor watches what is frozen; it reads this name
        frozen = [*model.vision.named_parameters(), *model.vision.named_buffers()]
        self._ddp_params_and_buffers_to_ignore = [f"model.vision.{name}" for name, _ in frozen]
        # steps skipped for a non-finite gradient: in all, in a row now, in a row at most
        self.skips = torch.zeros(3, dtype=torch.int64)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one contrastive batch (one of `batch.accumulate` in an optimizer step)."""
        world, step = current_world(), self.trainer.global_step
        part = batch_idx % self.batch.accumulate
        # seeded by the step: a resumed run needs no stored generator
        torch.manual_seed(stable_hash("dropout", self.seed, step, part, world.rank))
        image_embeds = self.model.vision(batch["image"])
        samples = len(batch["image_id"])
        uniform = draw_uniform(self.seed, step, part, samples, world)
        out = stage1_step(self.model, image_embeds, batch, self.loss, uniform=uniform, world=world)
        self.meter.add(out)
        return out["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on what is trained, fused on CPU and GPU alike."""
        groups = parameter_groups(self.model, self.optimizer["weight_decay"])
        return torch.optim.AdamW(
            groups,
            lr=self.optimizer["lr"],
            betas=tuple(self.optimizer["betas"]),
            eps=self.optimizer["eps"],
            fused=True,
        )

    def learning_rate(self, step: int) -> float:
        """Of an optimizer step, counted from 0."""
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
        """Sets the step's learning rate before, and keeps the temperature in its range after."""
        rate = self.learning_rate(self.trainer.global_step)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.model.temp.clamp_(*TEMP_RANGE)

    def rehearsal_batch(self, image_tokens: bool = True) -> dict[str, Any]:
        """A made-up batch of two samples that reaches every parameter that training reaches.

        Args:
            image_tokens: with images; otherwise the text side alone.
        """
        length = 16
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 100, (2, length), generator=generator)
        ids %= self.model.qformer.word_embeddings.num_embeddings
        rank = current_world().rank
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "image_id": torch.arange(2) + 2 * rank,
            "lm_index": torch.cat([torch.arange(length - 1), torch.arange(length - 1) + length]),
            "text_length": length,
        }
        if image_tokens:
            size = self.model.vision.image_size
            batch["image"] = torch.zeros(2, 3, size, size, dtype=torch.uint8)
        return batch

    def rehearsal_loss(self) -> Tensor:
        """Loss of a tiny made-up batch on this process alone, from made-up image tokens."""
        parameter = next(self.model.qformer.parameters())
        tokens = torch.randn(2, 3, self.model.vision.width).to(parameter)
        batch = self.rehearsal_batch(image_tokens=False)
        uniform = torch.full((2, 2), 0.5, dtype=torch.float64)
        return stage1_step(self.model, tokens, batch, self.loss, uniform=uniform, world=World())[
            "loss"
        ]
