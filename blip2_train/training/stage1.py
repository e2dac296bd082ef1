"""Stage 1: image tower -> Q-Former -> contrast, matching, captioning (BLIP-2, section 3.2)."""

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from blip2_train import losses
from blip2_train.checkpoint.initial import init_from
from blip2_train.config import BatchPlan
from blip2_train.data.stream import EvalStream
from blip2_train.distributed import World, current_world
from blip2_train.models.stage1 import Blip2Stage1
from blip2_train.training.build import (
    build_vision,
    frozen_tower,
    initialise_qformer,
    instantiate_group,
    log_account,
    made_up_text,
    seed_weights,
)
from blip2_train.training.float8 import start_tower
from blip2_train.training.meter import Level, Meter
from blip2_train.training.module import StageModule
from blip2_train.training.objectives import (
    ItcConfig,
    LmConfig,
    LossConfig,
    draw_uniform,
    stage1_step,
)
from blip2_train.training.stage import BertTextStage
from blip2_train.training.validation_stage1 import Stage1Evaluator

log = logging.getLogger(__name__)

TEMP_RANGE = (0.001, 0.5)


class Stage1Module(StageModule):
    """The step of stage 1.

    Args:
        model: with its frozen parts frozen.
        loss: the objectives.
        common: see `StageModule`.
    """

    def __init__(self, model: Blip2Stage1, *, loss: LossConfig, **common: Any) -> None:
        super().__init__(model, meter=Meter(loss.parts), **common)
        self.loss = loss
        self.vocabulary = model.qformer.word_embeddings.num_embeddings

    def step(self, batch: dict[str, Any], step: int, part: int, world: World) -> dict[str, Tensor]:
        """Losses of one contrastive batch."""
        parts = self.batch.parts if "tokens" in batch else 1  # a rehearsal is too small
        uniform = draw_uniform(self.seed, step, part, len(batch["image_id"]), world)
        return stage1_step(
            self.model,
            batch["image_tokens"],
            batch,
            self.loss,
            uniform=uniform,
            world=world,
            parts=parts,
        )

    def image_tokens(self, image: Tensor) -> Tensor:
        """In as many parts as activations are held in.

        Of a tower that is trained nothing is kept but the tokens, as everywhere with
        `loss.itc.cache`: in the backward pass each part is computed once more.
        """
        tower = self.model.vision
        if tower.trainable and self.batch.parts > 1 and not self.is_rehearsing:
            tower = functools.partial(checkpoint, tower, use_reentrant=False)
        tokens = [tower(part) for part in image.chunk(self.batch.parts)]
        return torch.cat(tokens) if len(tokens) > 1 else tokens[0]  # cat would copy it

    def after_step(self) -> None:
        """Keeps the temperature in its range."""
        self.model.temp.clamp_(*TEMP_RANGE)

    def watched(self) -> dict[str, float]:
        """The temperature."""
        return {"temp": self.model.temp.item()}

    def levels(self, contrastive: float) -> dict[str, Level]:
        """Chance and floor of each loss."""
        known = {
            "loss_itc": losses.choice_levels(contrastive, self.loss.itc.smoothing),
            "loss_itm": (losses.itm_prior(), 0.0),
            "loss_lm": losses.choice_levels(self.vocabulary, self.loss.lm.smoothing),
        }
        return {name: Level(*known[name]) for name in self.loss.parts}

    def rehearsal_batch(self, samples: int = 2, longest: int | None = None) -> dict[str, Any]:
        """Blank images with random text."""
        length = longest or self.usual_tokens
        text = made_up_text(self.vocabulary, samples, length, current_world().rank)
        return {"image": self.model.vision.made_up(samples), **text}

    def rehearsal_loss(self) -> Tensor:
        """Loss from made-up image tokens."""
        parameter = next(self.model.qformer.parameters())
        tokens = torch.randn(2, 3, self.model.vision.width).to(parameter)
        uniform = torch.full((2, 2), 0.5, dtype=torch.float64)
        return stage1_step(
            self.model, tokens, made_up_text(self.vocabulary), self.loss, uniform=uniform
        )["loss"]


class Stage1(BertTextStage):
    """The parts of stage 1."""

    frozen_prefixes = ("vision.",)

    def build_model(
        self, *, shapes_only: bool = False, device: torch.device | None = None
    ) -> Blip2Stage1:
        """Image tower, Q-Former and heads."""
        words = self.word_pieces(shapes_only=shapes_only)
        vision = build_vision(self.cfg, self.features, shapes_only=shapes_only)
        settings = {k: v for k, v in self.cfg["qformer"].items() if k != "init"}
        seed_weights(self.cfg["seed"])
        qformer = instantiate_group(
            "qformer", settings, vocab_size=words + 1, vision_width=vision.width
        )
        return Blip2Stage1(
            vision,
            qformer,
            dec_token_id=words,
            end_token_id=0 if shapes_only else self.tokenizer.sep_token_id,
            **self.cfg["model"],
        )

    def initialise(self, model: Blip2Stage1) -> None:
        """From `init_from`, or as `qformer.init` says."""
        if self.cfg["init_from"] is not None:
            account = init_from(model, Path(self.cfg["init_from"]), self.frozen_prefixes)
            log_account(self.cfg["init_from"], account)
        else:
            initialise_qformer(model.qformer, self.cfg["qformer"]["init"])

    def frozen_parts(self, model: Blip2Stage1) -> dict[str, dict[str, str]]:
        """The image tower, where it is frozen."""
        return frozen_tower(model.vision)

    def start_frozen(self, model: Blip2Stage1, device: torch.device) -> None:
        """The image tower, where it computes in float8."""
        start_tower(model.vision, device)

    def build_module(self, model: Blip2Stage1, batch: BatchPlan) -> Stage1Module:
        """The Lightning module."""
        return Stage1Module(model, loss=self._loss(), **self.common(batch))

    def build_evaluator(self, module: StageModule, images: EvalStream) -> Stage1Evaluator:
        """Losses, retrieval, grounding."""
        return Stage1Evaluator(
            module,
            self._loss(),
            images,
            self.tokenizer,
            self.cfg["validation"],
            self.cfg["seed"],
        )

    def _loss(self) -> LossConfig:
        settings = self.cfg["loss"]
        return LossConfig(
            weights=settings["weights"],
            normalise=settings["normalise"],
            itc=ItcConfig(settings["itc"]["smoothing"], settings["itc"]["gradient"]),
            lm=LmConfig(**settings["lm"]),
        )
