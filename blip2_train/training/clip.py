"""Stage 0, `clip`: an image tower of one's own, by contrast with a text transformer."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip2_train import losses
from blip2_train.checkpoint.initial import init_from
from blip2_train.config import BatchPlan
from blip2_train.data.stream import EvalStream
from blip2_train.distributed import World, broadcast_tensors, current_world, gather_objects
from blip2_train.evaluation.retrieval import chunks, describe_recalls, mean_r1
from blip2_train.evaluation.stage1 import PAIRS_AT_ONCE, Features, first_captions, retrieve
from blip2_train.models.clip import Clip
from blip2_train.training.build import (
    instantiate_group,
    made_up_text,
    seed_weights,
)
from blip2_train.training.contrast import TEMP_RANGE, clip_step
from blip2_train.training.meter import Level, Meter, describe_losses
from blip2_train.training.module import StageModule
from blip2_train.training.objectives import ItcConfig
from blip2_train.training.stage import BertTextStage
from blip2_train.training.validation import Evaluator, Findings

log = logging.getLogger(__name__)


class ClipModule(StageModule):
    """The step of `clip`.

    Args:
        model: image and text encoder.
        loss: smoothing, and which side learns.
        common: see `StageModule`.
    """

    def __init__(self, model: Clip, *, loss: ItcConfig, **common: Any) -> None:
        super().__init__(model, meter=Meter(("loss_itc",)), **common)
        self.loss = loss

    def step(self, batch: dict[str, Any], step: int, part: int, world: World) -> dict[str, Tensor]:
        """Loss of one contrastive batch."""
        return clip_step(self.model, batch, self.loss, world=world)

    def after_step(self) -> None:
        """Keeps the temperature in its range."""
        self.model.temp.clamp_(*TEMP_RANGE)

    def before_validation(self, world: World) -> None:
        """Batch norms of all ranks get rank 0's running statistics, which checkpoints hold."""
        broadcast_tensors(list(self.model.buffers()), world)

    def watched(self) -> dict[str, float]:
        """The temperature."""
        return {"temp": self.model.temp.item()}

    def levels(self, contrastive: float) -> dict[str, Level]:
        """Chance and floor of the loss."""
        return {"loss_itc": Level(*losses.choice_levels(contrastive, self.loss.smoothing))}

    def rehearsal_batch(self, samples: int = 2, longest: int | None = None) -> dict[str, Any]:
        """Noisy images (equal ones would have no variance to norm) with random text."""
        size = self.model.image_encoder.image_size
        generator = torch.Generator().manual_seed(0)
        shape = (samples, 3, size, size)
        image = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        words, length = self.model.text_encoder.vocab_size, longest or self.usual_tokens
        return {"image": image, **made_up_text(words, samples, length, current_world().rank)}

    def rehearsal_loss(self) -> Tensor:
        """Loss of that batch."""
        return clip_step(self.model, self.rehearsal_batch(), self.loss)["loss"]


class ClipStage(BertTextStage):
    """The parts of `clip`."""

    product = "tower.safetensors"

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__(cfg)
        self.loss = ItcConfig(**cfg["loss"])

    def build_model(self, *, shapes_only: bool = False, device: torch.device | None = None) -> Clip:
        """Tower and text transformer."""
        words = self.word_pieces(shapes_only=shapes_only)
        settings = dict(self.cfg["image_encoder"])
        if shapes_only:
            settings["weights"] = "random"
        image = instantiate_group("image_encoder", settings)
        seed_weights(self.cfg["seed"])
        text = instantiate_group(
            "text_encoder",
            self.cfg["text_encoder"],
            vocab_size=words + 1,
            end_token_id=3 if shapes_only else self.tokenizer.sep_token_id,
        )
        return Clip(image, text, **self.cfg["model"])

    def initialise(self, model: Clip) -> None:
        """From `init_from`, or at random."""
        if self.cfg["init_from"] is not None:
            account = init_from(model, Path(self.cfg["init_from"]), ())
            log.info("init_from=%s: %s", self.cfg["init_from"], account)

    def build_module(self, model: Clip, batch: BatchPlan) -> ClipModule:
        """The Lightning module."""
        return ClipModule(model, loss=self.loss, **self.common(batch))

    def image_size(self, model: Clip) -> int:
        """Of the tower."""
        return model.image_encoder.image_size

    def build_evaluator(self, module: StageModule, images: EvalStream) -> Evaluator:
        """Loss and retrieval."""
        return ClipEvaluator(module, self.loss)

    def export(self, model: Clip, path: Path) -> None:
        """The tower, as a file for `vision.weights`."""
        model.save_tower(path)
        log.info(
            "the tower is in %s: vision.name=%s vision.weights=%s",
            path, self.cfg["image_encoder"]["name"], path,
        )  # fmt: skip


class ClipEvaluator(Evaluator):
    """Loss within whole batches, retrieval over the whole set.

    Args:
        module: being trained.
        loss: smoothing.
    """

    def __init__(self, module: StageModule, loss: ItcConfig) -> None:
        self.module = module
        self.loss = loss

    def start(self) -> None:
        """Forgets the validation before."""
        self.meter = Meter(("loss_itc",))
        self.features: list[Features] = []
        self.comparisons = 0.0  # sum over images of ln(images in its batch)

    def add(self, number: int, batch: dict[str, Any]) -> None:
        """Takes in one batch."""
        model: Clip = self.module.model
        count = len(batch["keys"])
        out = clip_step(model, {"image": batch["image"], **first_captions(batch)}, self.loss)
        self.meter.add(out, weight=count)
        self.comparisons += count * math.log(count)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        texts = [
            model.encode_text(ids[part], mask[part])
            for part in chunks(len(batch["text"]), PAIRS_AT_ONCE)
        ]
        self.features.append(
            Features(
                number,
                out["image_feat"][:, None].cpu(),
                torch.cat(texts).cpu(),
                ids.cpu(),
                mask.cpu(),
                batch["caption_image"].cpu(),
                batch["items"],
                batch["text"],
            )
        )

    def finish(self, world: World) -> Findings:
        """Sums up."""
        metrics = self.meter.read(world, self.module.device)
        found = retrieve(None, self.features, {}, rerank_k=0, world=world)
        metrics |= found.metrics
        compared = math.exp(sum(gather_objects(self.comparisons, world)) / len(found.items))
        lines = [
            describe_losses(metrics, self.module.levels(compared)),
            describe_recalls(metrics, len(found.items)),
        ]
        return Findings(metrics, mean_r1(metrics), lines)
