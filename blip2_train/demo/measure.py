"""What the models of the demo know of scenes that they have never seen."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip2_train.data.batch import EvalSample, tokenise
from blip2_train.data.source import open_source
from blip2_train.data.stream import EvalStream
from blip2_train.data.synthetic import World, unseen_pairs
from blip2_train.data.transforms import EvalTransform
from blip2_train.demo.plan import SIZE, WITHOUT
from blip2_train.evaluation.attention import attention_maps
from blip2_train.evaluation.retrieval import chunks
from blip2_train.evaluation.samples import Row
from blip2_train.evaluation.scenes import (
    Score,
    best_possible_loss,
    caption_accuracy,
    choice_accuracy,
    foil_accuracy,
    read_captions,
)
from blip2_train.losses import max_similarity
from blip2_train.models.qformer import ImageKV
from blip2_train.training.loading import evaluate, load_run
from blip2_train.training.stage import BertTextStage

RERANKED = 16  # best by contrast, ranked again by matching
BATCH = 64  # images that losses compare, as in training
AT_ONCE = 256  # (image, text) pairs of one matching pass
SEED = 0  # of the foils


class Images(EvalStream):
    """A split with one caption per image, the first: one of the five, drawn when it was written."""

    def __getitem__(self, item: int) -> EvalSample:
        """The image and its caption."""
        found = super().__getitem__(item)
        assert isinstance(found, EvalSample), "rendered scenes can all be decoded"
        return EvalSample(found.image, found.captions[:1], found.image_id, found.key, found.item)


@dataclass
class Measured:
    """One split.

    Attributes:
        images: of the split.
        numbers: {what: {name: value}}; accuracies and recalls in percent, losses in nats per token.
        captions: {run: what it says of each image}.
        rows: of stage 1, some images with retrieved ones and matching's negatives.
        attention: [Q, P] of the same images, where each query looks in the last layer.
    """

    images: Images
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    captions: dict[str, list[str]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)

    @cached_property
    def pixels(self) -> Tensor:
        """uint8 [N, 3, S, S] of all images."""
        return torch.stack([self.images[i].image for i in range(len(self.images))])

    @cached_property
    def texts(self) -> list[str]:
        """The caption of each image."""
        return [self.images[i].captions[0] for i in range(len(self.images))]


def measure(
    out: Path,
    shards: Path,
    world: World,
    splits: tuple[str, ...],
    seed: int,
    done: Callable[[], None],
) -> dict[str, Measured]:
    """Evaluates all runs of a demo on some splits.

    Args:
        out: folder of the runs.
        shards: of the scenes.
        world: of the scenes.
        splits: to measure on.
        seed: of the demo.
        done: called after each run and split.
    """
    found = {
        split: Measured(Images(open_source("synthetic", shards, split), EvalTransform(SIZE)))
        for split in splits
    }
    for run, evaluation in (
        ("clip", _tower),
        ("stage1", _stage1),
        ("stage2", _stage2),
        (WITHOUT, _stage2),
    ):
        samples = {"samples": 8 if run == "stage1" else 0}
        changes = samples | ({"rerank_k": RERANKED} if run == "stage1" else {})
        stage, model = load_run(out / run, changes)
        for measured in found.values():
            with torch.no_grad():
                evaluation(run, stage, model, world, measured)
            done()
    for measured in found.values():
        for run in measured.captions:
            measured.numbers[f"{run}_unseen"] = _of_unseen_pairs(run, world, seed, measured)
    return found


def _of_unseen_pairs(run: str, world: World, seed: int, measured: Measured) -> dict[str, float]:
    """Caption accuracy of the attributes of `world.unseen` where their pair is an unseen one."""
    numbers: dict[str, float] = {}
    said = list(zip(read_captions(world, measured.texts), measured.captions[run], strict=True))
    for (a, b), pairs in unseen_pairs(world, seed).items():
        new = [
            (truth, text)
            for truth, text in said
            if (world.value(truth.scene, a), world.value(truth.scene, b)) in pairs
        ]
        if new:
            right = caption_accuracy(world, *zip(*new, strict=True))
            numbers |= {a: right[a], b: right[b]}
    return numbers


def _tower(run: str, stage: Any, model: Any, world: World, measured: Measured) -> None:
    images = measured.pixels
    features = torch.cat([model.encode_image(images[part]) for part in chunks(len(images), BATCH)])

    def score(captions: list[list[str]]) -> Tensor:
        texts = _in_parts(captions, stage, model.encode_text)
        return torch.einsum("nke,ne->nk", texts, features)

    truths = read_captions(world, measured.texts)
    measured.numbers["tower_choice"] = choice_accuracy(world, truths, score)
    found, _ = evaluate(stage, model, measured.images, batch_size=BATCH)
    measured.numbers["tower"] = found.metrics


def _stage1(run: str, stage: Any, model: Any, world: World, measured: Measured) -> None:
    images = measured.pixels
    parts = [model.vision(images[part]) for part in chunks(len(images), BATCH)]
    image: ImageKV = model.qformer.project_image(torch.cat(parts))
    features = model.encode_image(image).image_feats  # [N, Q, E]

    def contrast(captions: list[list[str]]) -> Tensor:
        texts = _in_parts(captions, stage, lambda ids, mask: model.encode_text(ids, mask)[1])
        pairs = zip(features, texts, strict=True)
        return torch.cat([max_similarity(f[None], t) for f, t in pairs])

    truths = read_captions(world, measured.texts)
    numbers = measured.numbers
    numbers["itc_choice"] = choice_accuracy(world, truths, contrast)
    numbers["itc_foil"] = foil_accuracy(world, truths, contrast, SEED)
    numbers["itm_foil"] = foil_accuracy(world, truths, _matching(stage, model, image), SEED)
    found, evaluator = evaluate(stage, model, measured.images, batch_size=BATCH)
    numbers["stage1"] = found.metrics
    measured.rows = found.rows
    shown = [i * len(images) // len(found.rows) for i in range(len(found.rows))]
    some = [(key[shown], value[shown]) for key, value in image]
    measured.attention = list(attention_maps(model.qformer, some)[-1])
    _speak(run, evaluator, images, world, truths, measured)


def _matching(stage: BertTextStage, model: Any, image: ImageKV) -> Score:
    """Scores of matching."""

    def score(captions: list[list[str]]) -> Tensor:
        rows = torch.arange(len(captions)).repeat_interleave(len(captions[0]))
        ids, mask = _tokens([text for row in captions for text in row], stage)
        logits = []
        for part in chunks(len(rows), AT_ONCE):
            shown = [(key[rows[part]], value[rows[part]]) for key, value in image]
            logits.append(model.match([(shown, 1)], ids[part], mask[part])[:, 1])
        return torch.cat(logits).view(len(captions), -1)

    return score


def _stage2(run: str, stage: Any, model: Any, world: World, measured: Measured) -> None:
    images = measured.pixels
    found, evaluator = evaluate(stage, model, measured.images, batch_size=BATCH)
    tokens = [len(ids) for ids in stage.text.words(measured.texts)]
    edges = 1 + len(stage.text.start)  # an end, and a start where the model has one
    mean = sum(tokens) / len(tokens) + edges
    measured.numbers[run] = found.metrics | best_possible_loss(world, mean)
    _speak(run, evaluator, images, world, read_captions(world, measured.texts), measured)


def _speak(
    run: str, evaluator: Any, images: Tensor, world: World, truths: list[Any], measured: Measured
) -> None:
    said = [text for part in images.split(BATCH) for text in evaluator.captions(part)]
    measured.captions[run] = said
    measured.numbers[f"{run}_captions"] = caption_accuracy(world, truths, said)


def _tokens(texts: list[str], stage: BertTextStage) -> tuple[Tensor, Tensor]:
    ids, mask = tokenise(texts, stage.tokenizer, stage.cfg["text"]["max_tokens"])
    longest = int(mask.sum(dim=1).max())
    return ids[:, :longest], mask[:, :longest]


def _in_parts(
    captions: list[list[str]], stage: BertTextStage, encode: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Text features [N, k, E] of k captions of each of N images."""
    ids, mask = _tokens([text for row in captions for text in row], stage)
    features = [encode(ids[part], mask[part]) for part in chunks(len(ids), 1024)]
    return torch.cat(features).view(len(captions), len(captions[0]), -1)
