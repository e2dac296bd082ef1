"""`blip2-prepare features`: the frozen tower's tokens of every image, written beside the shards.

Shard by shard, so that the same command goes on where it was killed; several processes (torchrun)
take turns at the shards.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from blip2_train.config import Launch
from blip2_train.data.feature_files import (
    BLANK,
    SUFFIX,
    TABLE,
    Table,
    open_file,
    read_table,
    write_file,
    write_table,
)
from blip2_train.data.features import TRANSFORM, features_folder, tower_identity
from blip2_train.data.images import BadImage, load_rgb
from blip2_train.data.index import read_index
from blip2_train.data.pool import Reading, ShardPool
from blip2_train.data.shards import ShardError
from blip2_train.data.source import StoredShard
from blip2_train.data.tar import SampleError
from blip2_train.data.transforms import EvalTransform
from blip2_train.errors import UserError
from blip2_train.models.cached_tower import pack, unpack
from blip2_train.models.vision import VisionTower
from blip2_train.training.build import instantiate_group
from blip2_train.training.compiling import compile_blocks
from blip2_train.training.feeding import start_loader_process
from blip2_train.training.float8 import start_tower

Place = tuple[int, int, int]  # shard, its first image, past the last


@dataclass(frozen=True)
class Outcome:
    """What was done.

    Attributes:
        folder: of the features.
        table: what is in it.
        images: of all shards.
        unusable: of these.
        bytes: of all files.
        cosine: mean over the tokens of one batch between stored and computed features; None where
            nothing was left to compute.
    """

    folder: Path
    table: Table
    images: int
    unusable: int
    bytes: int
    cosine: float | None

    def __str__(self) -> str:
        table = self.table
        text = (
            f"{self.folder}: {self.images:,} images ({self.unusable:,} unusable) of "
            f"{len(table.files):,} shards, {table.tokens} tokens of {table.width} in "
            f"{table.store}, {self.bytes / 1e9:.2f} GB"
        )
        if self.cosine is None:
            return text
        return f"{text}; cosine with what was computed {self.cosine:.5f}"


def write_features(
    folder: Path,
    vision: Mapping[str, Any],
    *,
    splits: list[str],
    store: str | None,
    batch: int,
    device: torch.device,
    workers: int,
    launch: Launch,
    compiled: bool,
) -> Outcome:
    """Computes what is not there yet.

    Args:
        folder: of the shards.
        vision: group of the resolved configuration.
        splits: whose images; empty: all.
        store: of `models.cached_tower.STORES`; None: the tower's own dtype.
        batch: images that the tower sees at a time.
        device: that computes.
        workers: processes that decode.
        launch: how this process was started.
        compiled: compile the tower's blocks.

    Raises:
        UserError: shards or the tower cannot be read, the tower is to be trained, or there are
            features in another `store`.
    """
    if vision.get("trainable", False):
        raise UserError(
            "vision.trainable=true: the features of a tower that is trained change with every "
            "step; set vision.trainable=false"
        )
    shards = _shards(folder, splits)
    identity = tower_identity(vision)
    place = features_folder(folder, identity)
    tower: VisionTower = instantiate_group("vision", vision)
    table = Table(
        tower=identity,
        transform=TRANSFORM,
        digest=tower.digest(),
        store=store or str(tower.dtype).removeprefix("torch."),
        dtype=str(tower.dtype).removeprefix("torch."),
        image_size=tower.image_size,
        tokens=tower.num_tokens,
        width=tower.width,
    )
    if (place / TABLE).exists() and (known := read_table(place)).store != table.store:
        raise UserError(
            f"{place} holds these features as {known.store}; delete that folder, or take "
            f"--store {known.store}"
        )
    place.mkdir(exist_ok=True)
    tower.to(device)
    start_tower(tower, device)
    if compiled:
        compile_blocks(tower)
    if launch.rank == 0:
        write_file(place / f"{BLANK}{SUFFIX}", pack(tower.blank(), table.store), table, "", {})
    # Not the other way round: processes that look at different times find other shards finished.
    own = shards[launch.rank :: launch.world_size]
    todo = [shard for shard in own if _finished(place, shard, table) is None]
    cosine = _compute(place, tower, table, todo, batch=batch, device=device, workers=workers)
    return _sum_up(place, table, folder, cosine)


def _shards(folder: Path, splits: list[str]) -> list[StoredShard]:
    index = read_index(folder)
    there = sorted({info.split for info in index.values()})
    if unknown := sorted(set(splits) - set(there)):
        raise UserError(f"--split {' '.join(unknown)}: the splits of {folder} are {there}")
    return [
        StoredShard(**vars(info), folder=str(folder))
        for _, info in sorted(index.items())
        if info.samples and (not splits or info.split in splits)
    ]


class ShardImages(Dataset[list[Tensor | str]]):
    """Batches of all images of some shards, as the tower is to see them, or why one cannot be used.

    Args:
        shards: to read.
        image_size: side in pixels.
        batch: images at a time, never of two shards.
    """

    def __init__(self, shards: list[StoredShard], image_size: int, batch: int) -> None:
        self.shards = shards
        self.transform = EvalTransform(image_size)
        self.pool = ShardPool(Reading(need_captions=False))  # there may be questions
        self.places: list[Place] = [
            (number, start, min(start + batch, shard.samples))
            for number, shard in enumerate(shards)
            for start in range(0, shard.samples, batch)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> list[Tensor | str]:
        shard, start, end = self.places[number]
        return [self._image(self.shards[shard], index) for index in range(start, end)]

    def _image(self, shard: StoredShard, index: int) -> Tensor | str:
        try:
            return self.transform(load_rgb(self.pool.read(shard, index).image))
        except BadImage as error:
            return str(error)
        except SampleError as error:
            return error.reason


def _compute(
    place: Path,
    tower: VisionTower,
    table: Table,
    shards: list[StoredShard],
    *,
    batch: int,
    device: torch.device,
    workers: int,
) -> float | None:
    """Writes the files of some shards; returns how close what is stored comes, see `Outcome`."""
    images = ShardImages(shards, tower.image_size, batch)
    loader = DataLoader(
        images,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_loader_process,
    )
    cosine = None
    pending: Future[None] | None = None
    with (
        tqdm(total=sum(s.samples for s in shards), unit=" images", disable=None) as progress,
        ThreadPoolExecutor(1) as writer,  # a file is written while the next one is computed
    ):
        found = _encoded(tower, zip(images.places, loader, strict=True), device)
        for number, shard in enumerate(shards):
            stored: Tensor | None = None
            bad: dict[int, str] = {}
            end = 0
            while end < shard.samples:
                start, tokens, unusable = _next(found, number)
                packed = pack(tokens, table.store)
                if cosine is None:
                    cosine = _cosine(packed, tokens)
                if stored is None:
                    stored = torch.empty(shard.samples, *packed.shape[1:], dtype=packed.dtype)
                end = start + len(packed)
                stored[start:end] = packed  # from the device
                bad |= unusable
                progress.update(len(packed))
            assert stored is not None
            if pending is not None:
                pending.result()
            path = place / f"{shard.name}{SUFFIX}"
            pending = writer.submit(write_file, path, stored, table, shard.sha256, bad)
        if pending is not None:
            pending.result()
    return cosine


def _encoded(
    tower: VisionTower, batches: Iterator[tuple[Place, list[Tensor | str]]], device: torch.device
) -> Iterator[tuple[Place, Tensor, dict[int, str]]]:
    """Where images are, tokens [n, P, Dv] on the device (zeros where there are none), why not."""
    for (shard, start, end), images in batches:
        bad = {start + row: why for row, why in enumerate(images) if isinstance(why, str)}
        blank = torch.zeros(3, tower.image_size, tower.image_size, dtype=torch.uint8)
        pixels = torch.stack([blank if isinstance(image, str) else image for image in images])
        tokens = tower(pixels.to(device, non_blocking=True))
        for index in bad:
            tokens[index - start] = 0
        yield (shard, start, end), tokens, bad


def _next(
    found: Iterator[tuple[Place, Tensor, dict[int, str]]], number: int
) -> tuple[int, Tensor, dict[int, str]]:
    """The next batch, which is of this shard."""
    try:
        (shard, start, _), tokens, bad = next(found)
    except (OSError, ShardError) as error:
        # where a loader process raised it, the message is a whole traceback
        raise UserError(str(error).strip().splitlines()[-1]) from error
    assert shard == number
    return start, tokens, bad


def _cosine(packed: Tensor, tokens: Tensor) -> float:
    used = tokens.flatten(1).any(dim=1)
    if not used.any():
        return 1.0
    kept, computed = unpack(packed[used], torch.float32), tokens[used].float()
    return torch.cosine_similarity(kept, computed, dim=-1).mean().item()


def _finished(place: Path, shard: StoredShard, table: Table) -> int | None:
    """Images of a finished file that have no features; None: it is not there, or of something else.

    Whether its numbers are still those that were written, `blip2-prepare verify` says.
    """
    try:
        stored = open_file(place / f"{shard.name}{SUFFIX}", shard, table)
    except ShardError:
        return None
    stored.close()
    return len(stored.bad)


def _sum_up(place: Path, table: Table, folder: Path, cosine: float | None) -> Outcome:
    """Writes the table of all files that are there."""
    shards = _shards(folder, [])
    while True:
        found = [(s, bad) for s in shards if (bad := _finished(place, s, table)) is not None]
        files: dict[str, dict[str, Any]] = {
            shard.name: {
                "tar": shard.sha256,
                "bytes": (place / f"{shard.name}{SUFFIX}").stat().st_size,
            }
            for shard, _ in found
        }
        if files == table.files:
            break
        # looked at again after: another process may have finished a file in between
        table = replace(table, files=files)
        write_table(place, table)
    return Outcome(
        place,
        table,
        sum(shard.samples for shard, _ in found),
        sum(bad for _, bad in found),
        sum(entry["bytes"] for entry in files.values()),
        cosine,
    )
