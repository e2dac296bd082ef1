"""What stage 1 is validated by: its losses, matching, retrieval, grounding, captions."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from blip2_train.data.stream import EvalStream
from blip2_train.distributed import World, gather_objects
from blip2_train.evaluation.grounding import (
    Grounding,
    describe_grounding,
    stage1_grounding,
)
from blip2_train.evaluation.retrieval import describe_recalls, mean_r1
from blip2_train.evaluation.samples import Row
from blip2_train.evaluation.stage1 import Features, Retrieval, encode, first_captions, retrieve
from blip2_train.training.meter import Meter, describe_losses
from blip2_train.training.module import StageModule
from blip2_train.training.objectives import LossConfig, draw_uniform, stage1_step
from blip2_train.training.validation import Evaluator, Findings, chosen_samples


class Stage1Evaluator(Evaluator):
    """Losses within whole batches, retrieval over the whole set, re-ranking by matching.

    Args:
        module: being trained.
        loss: the objectives.
        images: the validation split.
        tokenizer: turns generated ids into words.
        settings: `rerank_k`, `samples` of the configuration.
        seed: draws the negatives, the same at every validation.
    """

    def __init__(
        self,
        module: StageModule,
        loss: LossConfig,
        images: EvalStream,
        tokenizer: Any,
        settings: Mapping[str, Any],
        seed: int,
    ) -> None:
        self.module = module
        self.loss = loss
        self.images = images
        self.tokenizer = tokenizer
        self.samples = settings["samples"]
        self.rerank_k = settings["rerank_k"] if loss.weights["itm"] else 0
        self.seed = seed

    def start(self) -> None:
        """Forgets the validation before."""
        self.meter = Meter(self.loss.parts)
        self.grounding = Grounding()
        self.features: list[Features] = []
        self.tokens: dict[int, Tensor] = {}  # needed where matching re-ranks
        self.comparisons = 0.0  # sum over images of ln(images in its batch)
        self.negatives: dict[int, tuple[int, str]] = {}  # image -> the image and text drawn for it
        self.blank = self.module.model.vision.blank() if self.loss.weights["lm"] else None

    def add(self, number: int, batch: dict[str, Any]) -> None:
        """Takes in one batch."""
        model = self.module.model
        image_embeds = model.vision(batch["image"])
        pairs = first_captions(batch)
        count = len(batch["keys"])
        uniform = draw_uniform(self.seed, 0, number, count, World())
        out = stage1_step(model, image_embeds, pairs, self.loss, uniform=uniform)
        self.meter.add(out, weight=count)
        if "itm" in self.loss.on:
            self._note_negatives(batch, out)
        if self.blank is not None:
            self.grounding.add(*stage1_grounding(model, image_embeds, self.blank, pairs))
        self.comparisons += count * math.log(count)
        self.features.append(encode(model, image_embeds, batch, number))
        if self.rerank_k:
            self.tokens[number] = image_embeds

    def finish(self, world: World) -> Findings:
        """Sums up."""
        model = self.module.model
        metrics = self.meter.read(world, self.module.device)
        found = retrieve(model, self.features, self.tokens, rerank_k=self.rerank_k, world=world)
        metrics |= found.metrics
        compared = math.exp(sum(gather_objects(self.comparisons, world)) / len(found.items))
        lines = [
            describe_losses(metrics, self.module.levels(compared)),
            describe_recalls(metrics, len(found.items)),
        ]
        if self.blank is not None:
            grounding = self.grounding.read(world)
            metrics |= grounding
            lines.append(describe_grounding(grounding))
        for part in gather_objects(self.negatives, world):
            self.negatives |= part
        rows = self._rows(found) if world.rank == 0 else []
        title = "what the model says of and finds for held-out images"
        return Findings(metrics, mean_r1(metrics), lines, rows, title)

    def _note_negatives(self, batch: dict[str, Any], out: Mapping[str, Tensor]) -> None:
        """Remembers what matching was shown beside the true pairs."""
        first = torch.searchsorted(batch["caption_image"].cpu(), torch.arange(len(batch["keys"])))
        drawn = zip(out["neg_image_idx"].tolist(), out["neg_text_idx"].tolist(), strict=True)
        for item, (image, text) in zip(batch["items"], drawn, strict=True):
            self.negatives[item] = batch["items"][image], batch["text"][int(first[text])]

    @torch.no_grad()
    def captions(self, images: Tensor) -> list[str]:
        """What the model says of images, as batches hold them, greedily."""
        model = self.module.model
        tokens = model.vision(images.to(self.module.device))
        longest = min(30, model.qformer.position_embeddings.num_embeddings + 1)
        ids = model.generate(model.qformer.project_image(tokens), max_length=longest)
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _rows(self, found: Retrieval) -> list[Row]:
        """Captions, retrieved neighbours and matching's negatives of some images."""
        items = chosen_samples(self.images, self.samples) if self.samples else []
        if not items:
            return []
        position = {item: i for i, item in enumerate(found.items)}
        words = self.captions(torch.stack([item.image for item in items]))
        rows = []
        for item, caption in zip(items, words, strict=True):
            image = position[item.item]
            own = (found.caption_image == image).nonzero().squeeze(1)
            texts = found.sims[image].topk(min(3, len(found.text))).indices.tolist()
            query = int(own[0])
            best = found.sims[:, query].topk(min(3, len(found.items))).indices.tolist()
            rows.append(
                Row(
                    self.images.picture(item.item),
                    {"says": caption},
                    item.captions,
                    [(found.text[t], int(found.caption_image[t]) == image) for t in texts],
                    found.text[query],
                    [(self.images.picture(found.items[i]), i == image) for i in best],
                    *self._negative(item.item),
                )
            )
        return rows

    def _negative(self, item: int) -> tuple[Image.Image | None, str]:
        if item not in self.negatives:
            return None, ""
        image, text = self.negatives[item]
        return self.images.picture(image), text
