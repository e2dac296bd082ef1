"""From `data.*` of the configuration to the batches of a training and its validation."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

from blip2_train.config import BatchPlan
from blip2_train.data.stream import EvalStream, Source, TrainStream, open_source
from blip2_train.data.transforms import EvalTransform, TrainTransform
from blip2_train.distributed import World


def open_sources(settings: Mapping[str, Any]) -> list[Source]:
    """The training sources; a weight of null is the source's number of samples.

    Raises:
        UserError: one of them is not there.
    """
    sources = []
    for name, source in settings["sources"].items():
        weight = source["weight"]
        opened = open_source(name, source["shards"], source["split"], 1.0)
        if weight is None:
            weight = sum(info.samples for info in opened.shards)
        sources.append(dataclasses.replace(opened, weight=weight))
    return sources


def open_validation(cfg: Mapping[str, Any]) -> Source | None:
    """The validation split, or None where validation is off."""
    if cfg["validation"]["every"] is None:
        return None
    settings = cfg["data"]["validation"]
    return open_source("validation", settings["shards"], settings["split"])


def train_stream(
    cfg: Mapping[str, Any],
    batch: BatchPlan,
    sources: list[Source],
    collate: Any,
    world: World,
    drawn: dict[str, int],
    image_size: int | None,
) -> TrainStream:
    """This rank's micro-batches, from where `drawn` says.

    Args:
        cfg: resolved configuration.
        batch: how the global batch is cut.
        sources: of the data.
        collate: puts a batch together.
        world: the ranks.
        drawn: samples drawn from each source so far.
        image_size: in pixels; None: images are not decoded.
    """
    data = cfg["data"]
    transforms = {
        name: None
        if image_size is None
        else TrainTransform(
            image_size,
            scale=data["crop_scale"],
            flip=data["flip"],
            randaugment=source["randaugment"],
            decode=data["decode"],
        )
        for name, source in data["sources"].items()
    }
    return TrainStream(
        sources,
        transforms,
        collate,
        contrastive_batch=batch.contrastive,
        seed=cfg["seed"],
        shuffle_window=data["shuffle_window"],
        rank=world.rank,
        world=world.size,
        drawn=drawn,
        caption=data["caption"],
        max_words=data["max_words"],
        prompt=data["prompt"],
    )


def train_loader(stream: TrainStream, cfg: Mapping[str, Any], cuda: bool) -> DataLoader:
    """Loader processes around the stream; each builds whole micro-batches."""
    workers = cfg["data"]["num_workers"]
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        pin_memory=cuda,
        persistent_workers=workers > 0,
    )


def validation_images(cfg: Mapping[str, Any], source: Source, image_size: int | None) -> EvalStream:
    """The validation images (`image_size` None: their captions alone)."""
    return EvalStream(
        source,
        None if image_size is None else EvalTransform(image_size),
        max_images=cfg["validation"]["max_images"],
        max_words=cfg["data"]["max_words"],
        prompt=cfg["data"]["prompt"],
    )
