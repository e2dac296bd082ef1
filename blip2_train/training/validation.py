"""Validation in the middle of training: losses, matching accuracy, retrieval, pictures."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from blip2_train.data.batch import EvalSample
from blip2_train.data.stream import EvalStream
from blip2_train.distributed import World, current_world, gather_objects
from blip2_train.evaluation.retrieval import mean_r1
from blip2_train.evaluation.samples import Row, draw_sheet
from blip2_train.evaluation.stage1 import (
    Features,
    Retrieval,
    encode,
    first_captions,
    own_batches,
    retrieve,
)
from blip2_train.training.checkpointing import Checkpointing
from blip2_train.training.meter import Meter, chance_levels, describe_losses, floors
from blip2_train.training.monitor import Monitor
from blip2_train.training.objectives import draw_uniform, stage1_step
from blip2_train.training.run_log import SkippedLog

log = logging.getLogger(__name__)


class Validation(pl.Callback):
    """Evaluates every `every` optimizer steps and at the end; scores checkpoints.

    Args:
        images: the validation split.
        collate: puts an evaluation batch together.
        tokenizer: turns generated ids into words.
        monitor: whose clock stands still meanwhile.
        checkpointing: gets the score of the step.
        skipped: where unusable samples are written down (rank 0).
        folder: of the pictures.
        settings: `every`, `batch_size`, `rerank_k`, `samples` of the configuration.
        num_workers: loader processes.
        seed: draws the negatives, the same at every validation.
    """

    def __init__(
        self,
        images: EvalStream,
        collate: Any,
        tokenizer: Any,
        monitor: Monitor,
        checkpointing: Checkpointing,
        skipped: SkippedLog | None,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        num_workers: int,
        seed: int,
    ) -> None:
        self.images = images
        self.collate = collate
        self.tokenizer = tokenizer
        self.monitor = monitor
        self.checkpointing = checkpointing
        self.skipped_log = skipped
        self.folder = folder
        self.settings = settings
        self.num_workers = num_workers
        self.seed = seed
        self.last_step = checkpointing.start_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        """Validates when a step is due."""
        step = trainer.global_step
        due = step % self.settings["every"] == 0 or step >= trainer.max_steps
        if due and step > self.last_step:
            self.last_step = step
            with self.monitor.paused():
                self.validate(trainer, pl_module, step)

    @torch.no_grad()
    def validate(self, trainer: pl.Trainer, pl_module: Any, step: int) -> None:
        """Runs a whole validation; all ranks call it."""
        world = current_world()
        model, loss = pl_module.model, pl_module.loss
        model.eval()
        meter = Meter(loss)
        features: list[Features] = []
        rerank_k = self.settings["rerank_k"] if loss.weights["itm"] else 0
        tokens: dict[int, Tensor] = {}  # needed where matching re-ranks
        comparisons = 0.0  # sum over images of ln(images in its batch)
        skipped: list[Any] = []
        with trainer.precision_plugin.val_step_context():
            for number, batch in self._batches(world):
                skipped += batch["skipped"]
                if not batch["keys"]:
                    continue
                batch = trainer.strategy.batch_to_device(batch)
                image_embeds = model.vision(batch["image"])
                pairs = first_captions(batch)
                count = len(batch["keys"])
                uniform = draw_uniform(self.seed, 0, number, count, World())
                out = stage1_step(model, image_embeds, pairs, loss, uniform=uniform)
                meter.add(out, weight=count)
                comparisons += count * math.log(count)
                features.append(encode(model, image_embeds, batch, number))
                if rerank_k:
                    tokens[number] = image_embeds
            metrics = meter.read(world, pl_module.device)
            found = retrieve(model, features, tokens, rerank_k=rerank_k, world=world)
            metrics |= found.metrics
            rows = self._rows(trainer, model, found) if trainer.is_global_zero else []
        model.train()
        skipped = [line for part in gather_objects(skipped, world) for line in part]
        compared = math.exp(sum(gather_objects(comparisons, world)) / len(found.items))
        if self.skipped_log is not None:
            self.skipped_log.add(step, skipped)
        self.checkpointing.state.scores[step] = mean_r1(metrics)
        self._report(
            trainer, pl_module, step, metrics, compared, len(found.items), len(skipped), rows
        )

    def _batches(self, world: World) -> Any:
        size = self.settings["batch_size"]
        numbers = range(-(-len(self.images) // size))[world.rank :: world.size]
        loader = DataLoader(
            self.images,
            batch_sampler=own_batches(len(self.images), size, world),
            collate_fn=self.collate,
            num_workers=self.num_workers,
        )
        return zip(numbers, loader, strict=True)

    def _report(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        step: int,
        metrics: dict[str, float],
        compared: float,
        images: int,
        skipped: int,
        rows: list[Row],
    ) -> None:
        if not trainer.is_global_zero:
            return
        classes = pl_module.model.qformer.word_embeddings.num_embeddings
        line = describe_losses(
            metrics,
            chance_levels(pl_module.loss, compared, classes),
            floors(pl_module.loss, round(compared), classes),
        )
        recall = "  ".join(
            f"{direction} R@1/5/10 " + "/".join(f"{metrics[f'{key}_r{k}']:.1f}" for k in (1, 5, 10))
            for direction, key in (
                ("i2t", "i2t"),
                ("t2i", "t2i"),
                ("re-ranked i2t", "itm_i2t"),
                ("re-ranked t2i", "itm_t2i"),
            )
            if f"{key}_r1" in metrics
        )
        log.info("validation at step %d on %d images (%d skipped): %s", step, images, skipped, line)
        log.info("  %s  (chance R@1 %.2f)", recall, 100 / images)
        for logger in trainer.loggers:
            logger.log_metrics({f"val/{k}": v for k, v in metrics.items()}, step)
        if not rows:
            return
        path = self.folder / f"step-{step:08d}.png"
        draw_sheet(rows, f"step {step}: what the model says of and finds for held-out images", path)
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("val/samples", [str(path)], step=step)

    def _rows(self, trainer: pl.Trainer, model: Any, found: Retrieval) -> list[Row]:
        """Captions and retrieved neighbours of some images, evenly spread over the set."""
        count = min(self.settings["samples"], len(found.items))
        if not count:
            return []
        position = {item: i for i, item in enumerate(found.items)}
        chosen = [i * len(self.images) // count for i in range(count)]
        items = [item for i in chosen if isinstance(item := self.images[i], EvalSample)]
        images = trainer.strategy.batch_to_device(torch.stack([item.image for item in items]))
        tokens = model.vision(images)
        words = self.tokenizer.batch_decode(
            model.generate(model.qformer.project_image(tokens)), skip_special_tokens=True
        )
        rows = []
        for item, caption in zip(items, words, strict=True):
            image = position[item.item]
            own = (found.caption_image == image).nonzero().squeeze(1)
            texts = found.sims[image].topk(min(3, len(found.text))).indices.tolist()
            query = int(own[0])
            best = found.sims[:, query].topk(min(3, len(found.items))).indices.tolist()
            rows.append(
                Row(
                    to_pil(item.image),
                    caption,
                    item.captions,
                    [(found.text[t], int(found.caption_image[t]) == image) for t in texts],
                    found.text[query],
                    [(self._picture(found.items[i]), i == image) for i in best],
                )
            )
        return rows

    def _picture(self, item_number: int) -> Image.Image:
        item = self.images[item_number]
        assert isinstance(item, EvalSample)
        return to_pil(item.image)


def to_pil(image: Tensor) -> Image.Image:
    """uint8 [3, S, S] -> picture."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
