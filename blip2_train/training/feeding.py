"""From `data.*` of the configuration to the batches of a training and its validation."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from blip2_train import signals
from blip2_train.config import BatchPlan, Launch
from blip2_train.data.features import CachedFeatures, open_features
from blip2_train.data.pool import GIGABYTE, Reading
from blip2_train.data.remote import Cache, default_cache_dir
from blip2_train.data.resampled import ResampledStream
from blip2_train.data.source import Source, open_source, open_unindexed
from blip2_train.data.stream import EvalStream, TrainStream
from blip2_train.data.transforms import EvalTransform, TrainTransform
from blip2_train.distributed import World
from blip2_train.errors import UserError

log = logging.getLogger(__name__)


def open_sources(settings: Mapping[str, Any]) -> list[Source]:
    """The training sources; a weight of null is the source's number of samples.

    Args:
        settings: `data` of the configuration.

    Raises:
        UserError: one of them is not there, or cannot be read as configured.
    """
    if settings["mode"] == "stream":
        log.warning(
            "data.mode=stream: shards are drawn with replacement, and what a step sees depends on "
            "devices and workers; a resumed run does not go on with the same samples"
        )
        return [
            open_unindexed(
                name, source["shards"], source["weight"] or 1.0, allow_pipe=settings["allow_pipe"]
            )
            for name, source in settings["sources"].items()
        ]
    sources = []
    for name, source in settings["sources"].items():
        weight = source["weight"]
        opened = open_source(
            name,
            source["shards"],
            source["split"],
            bad_shards=settings["on_bad_shard"] == "skip",
            retry_seconds=settings["retry_seconds"],
        )
        sources.append(
            dataclasses.replace(opened, weight=opened.samples if weight is None else weight)
        )
    _check_cache(settings, sources)
    return sources


def _check_cache(settings: Mapping[str, Any], sources: list[Source]) -> None:
    """Refuse a cache that cannot hold what is read at a time and what is fetched ahead."""
    largest = [max(shard.bytes for shard in source.shards) for source in sources if source.remote]
    if not largest:
        return
    reading(settings).cache.prepare()
    # Up to two windows of at most 2 * shuffle_window - 1 shards.
    needed = 4 * settings["shuffle_window"] * sum(largest) / GIGABYTE
    if needed > settings["cache_gb"]:
        raise UserError(
            f"data.cache_gb={settings['cache_gb']:g} cannot hold the shards that are read at a "
            f"time, {needed:.1f} GB; raise it or lower data.shuffle_window"
        )


def reading(settings: Mapping[str, Any]) -> Reading:
    """How shards are read.

    Args:
        settings: `data` of the configuration.
    """
    folder = settings["cache_dir"]
    return Reading(
        Cache(
            Path(folder) if folder is not None else default_cache_dir(),
            int(settings["cache_gb"] * GIGABYTE),
        ),
        settings["retry_seconds"],
        settings["on_bad_shard"],
    )


def open_validation(cfg: Mapping[str, Any]) -> Source | None:
    """The validation split, or None where validation is off."""
    if cfg["validation"]["every"] is None:
        return None
    settings, data = cfg["data"]["validation"], cfg["data"]
    return open_source(
        "validation",
        settings["shards"],
        settings["split"],
        bad_shards=data["on_bad_shard"] == "skip",
        retry_seconds=data["retry_seconds"],
        key="data.validation.shards",
    )


def cached_features(
    cfg: Mapping[str, Any], sources: list[Source], held_out: Source | None
) -> CachedFeatures | None:
    """The tower's features of all images that a training reads; None: it computes them.

    Raises:
        UserError: they are not there, or of another tower.
    """
    if cfg["data"]["features"] == "computed":
        return None
    everything = [*sources, *([held_out] if held_out is not None else [])]
    found = open_features(cfg["vision"], everything, cfg["data"]["retry_seconds"])
    log.info(
        "features of the image tower come from the cache %s: %s, %d tokens of %d",
        found.name, found.table.store, found.table.tokens, found.table.width,
    )  # fmt: skip
    return found


def check_locality(locality: int, contrastive: int, launch: Launch) -> None:
    """Refuse parts of the order that do not lie evenly on batches and machines.

    Raises:
        UserError: the machines do not divide `data.locality` (1 is one part for all), or it does
            not divide a contrastive batch.
    """
    if contrastive % locality:
        raise UserError(
            f"the contrastive batch of {contrastive} samples (see batch.accumulate) is not "
            f"divisible by data.locality={locality}; change one of them"
        )
    nodes = launch.world_size // launch.local_world_size
    if locality > 1 and locality % nodes:
        raise UserError(
            f"data.locality={locality} is not divisible by {nodes} machines; it cannot change in a "
            "run, so choose a multiple of all numbers of machines that it may run on"
        )


def train_stream(
    cfg: Mapping[str, Any],
    batch: BatchPlan,
    sources: list[Source],
    collate: Any,
    world: World,
    drawn: dict[str, int],
    image_size: int | None,
    features: CachedFeatures | None = None,
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
        features: of the frozen tower, in place of images.
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
    kind = ResampledStream if data["mode"] == "stream" else TrainStream
    return kind(
        sources,
        transforms,
        collate,
        contrastive_batch=batch.contrastive,
        seed=cfg["seed"],
        shuffle_window=data["shuffle_window"],
        rank=world.rank,
        world=world.size,
        drawn=drawn,
        locality=data["locality"],
        text=data.get("text", "captions"),  # a key of stage 2
        caption=data["caption"],
        max_words=data["max_words"],
        prompt=data["prompt"],
        reading=reading(data),
        features=features,
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
        worker_init_fn=start_loader_process,
    )


def start_loader_process(_: int) -> None:
    """Leaves signals to the process that trains."""
    signals.obey_parent_only()


def validation_images(
    cfg: Mapping[str, Any],
    source: Source,
    image_size: int | None,
    features: CachedFeatures | None = None,
) -> EvalStream:
    """The validation images, or their features (`image_size` None: their captions alone)."""
    asks = cfg["data"].get("text") == "questions"
    return EvalStream(
        source,
        None if image_size is None else EvalTransform(image_size),
        max_images=cfg["validation"]["max_images"],
        max_words=cfg["data"]["max_words"],
        prompt="" if asks else cfg["data"]["prompt"],
        reading=dataclasses.replace(reading(cfg["data"]), need_captions=not asks),
        features=features,
        extra=("questions",) if asks else (),
    )
