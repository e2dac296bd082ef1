"""Tokens of the frozen tower, kept beside the shards they were computed from.

    FOLDER/features-<id>/                     <id>: hash of the tower and of what it was shown
        features.json                         both, and every file
        blank.safetensors                     of the image that says nothing
        <split>-000000.tar.safetensors        of a shard's images, in stored order

The tars stay: captions are read from them. What is in a file, feature_files.py says.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from blip2_train.data.feature_files import (
    BLANK,
    PREFIX,
    SUFFIX,
    TABLE,
    Stored,
    Table,
    open_file,
    read_table,
)
from blip2_train.data.images import BadImage
from blip2_train.data.remote import is_remote
from blip2_train.data.retries import with_retries
from blip2_train.data.shards import ShardError, file_sha256
from blip2_train.data.source import RETRY_SECONDS, Source, StoredShard
from blip2_train.errors import UserError

# What the tower is shown: `EvalTransform`. Another transform is another cache.
TRANSFORM = "whole image, bicubic (PIL)"
MAX_OPEN_FILES = 256


def tower_identity(vision: Mapping[str, Any]) -> dict[str, Any]:
    """All that features depend on; a file of weights counts by its content, not its place.

    Args:
        vision: group of the resolved configuration.

    Raises:
        UserError: there is no such file.
    """
    weights = vision["weights"]
    if weights not in ("pretrained", "random"):
        if not Path(weights).is_file():
            raise UserError(f"vision.weights={weights} is no file; give a file of timm weights")
        weights = f"sha256:{file_sha256(Path(weights))}"
    # as it was before there were these keys, so that features of then are found
    same = {"_target_": vision.get("_target_"), "precision": "native"}
    same |= {"trainable": False, "gradient_checkpointing": False}
    depends = {key: value for key, value in vision.items() if same.get(key) != value}
    return {**depends, "weights": weights}


def features_folder(folder: str | Path, tower: Mapping[str, Any]) -> Path:
    """Where the features of a tower are, beside the shards in `folder`."""
    text = json.dumps([tower, TRANSFORM], sort_keys=True)
    return Path(folder) / f"{PREFIX}{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def open_features(
    vision: Mapping[str, Any], sources: Iterable[Source], retry_seconds: float = RETRY_SECONDS
) -> CachedFeatures:
    """The features of all images of some sources, of the tower that the configuration names.

    Args:
        vision: group of the resolved configuration.
        sources: of training and validation.
        retry_seconds: for how long reading is tried again.

    Raises:
        UserError: some are missing, of another tower, or of shards as they no longer are.
    """
    tower = tower_identity(vision)
    found: dict[str, Table] = {}
    for source in sources:
        for folder in sorted({shard.folder for shard in source.shards}):
            if folder not in found:
                found[folder] = _table_of(source.name, folder, tower)
            shards = [shard for shard in source.shards if shard.folder == folder and shard.samples]
            _check_files(features_folder(folder, tower), found[folder], shards)
    tables = {folder: replace(table, files={}) for folder, table in found.items()}
    first, *others = tables
    for folder in others:
        if differing := _differences(asdict(tables[first]), asdict(tables[folder])):
            raise UserError(
                f"the cached features beside {first} and {folder} differ in {differing}; compute "
                "one of them again (blip2-prepare features)"
            )
    place = features_folder(first, tower)
    try:
        stored = open_file(place / f"{BLANK}{SUFFIX}", table=tables[first])
        blank = stored.read(0)[None]
        stored.close()
    except (ShardError, OSError) as error:
        raise UserError(str(error)) from None
    return CachedFeatures(place.name, tables[first], blank, retry_seconds)


def _table_of(name: str, folder: str, tower: Mapping[str, Any]) -> Table:
    """The table beside the shards of a source."""
    remedy = f"run blip2-prepare features {folder} experiment=... with the settings of this run"
    setting = f"data.features=cached: data.sources.{name}"
    if is_remote(folder):
        raise UserError(f"{setting}: {folder} is behind a URL; features are read from files alone")
    place = features_folder(folder, tower)
    if (place / TABLE).is_file():
        return read_table(place)
    others = [path.parent for path in sorted(Path(folder).glob(f"{PREFIX}*/{TABLE}"))]
    if place.is_dir():
        raise UserError(f"{setting}: {place} was begun and is not finished; {remedy}")
    if not others:
        raise UserError(f"{setting}: there are no features beside the shards in {folder}; {remedy}")
    expected = {"tower": tower, "transform": TRANSFORM}
    there = "; ".join(
        f"{path.name} differs in {_differences(expected, asdict(read_table(path)))}"
        for path in others
    )
    raise UserError(
        f"{setting}: the features beside the shards in {folder} are of another tower or "
        f"transform ({there}); {remedy}"
    )


def _differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The settings in which two tables differ, of those that `wanted` has."""
    names = []
    for key, value in wanted.items():
        if isinstance(value, Mapping):
            for inner in sorted({*value, *found[key]}):
                if value.get(inner) != found[key].get(inner):
                    names.append(f"vision.{inner}")
        elif value != found[key]:
            names.append(key)
    return ", ".join(names)


def _check_files(place: Path, table: Table, shards: list[StoredShard]) -> None:
    """Refuse files that are missing or not of the table's size; costs one directory listing."""
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(place) if entry.is_file()}
    for shard in shards:
        entry = table.files.get(shard.name)
        path = place / f"{shard.name}{SUFFIX}"
        size = sizes.get(path.name)
        if entry is None:
            found = "has no features"
        elif entry["tar"] != shard.sha256:
            found = "is not as it was when they were computed"
        elif size is None:
            found = f"has lost them: {path} does not exist"
        elif size != entry["bytes"]:
            found = f"has damaged ones: {path} has {size} bytes, not {entry['bytes']}"
        else:
            continue
        raise UserError(
            f"data.features=cached: shard {shard.name} of {shard.folder} {found}; run "
            f"blip2-prepare features {shard.folder} experiment=... again"
        )


class CachedFeatures:
    """Tokens by (shard, index); files that were used last stay open.

    Reads are positioned, so that a fork may share them; pickling carries only what it was made of.

    Args:
        name: of the folder beside the shards.
        table: what is in it.
        blank: tokens [1, P, Dv] of the image that says nothing, as they are stored.
        retry_seconds: for how long reading is tried again.
    """

    def __init__(
        self, name: str, table: Table, blank: torch.Tensor, retry_seconds: float = RETRY_SECONDS
    ) -> None:
        self.name, self.table, self.blank = name, table, blank
        self.retry_seconds = retry_seconds
        self._open: OrderedDict[Path, Stored] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedFeatures, (self.name, self.table, self.blank, self.retry_seconds)

    def read(self, shard: StoredShard, index: int) -> torch.Tensor:
        """Tokens of one image as they are stored, [P, Dv] or [P, Dv + 4].

        Raises:
            BadImage: the image could not be decoded when they were computed.
            OSError: the file could not be read in any attempt.
            ShardError: the file is not what it should be.
        """
        path = Path(shard.folder, self.name, shard.name + SUFFIX)

        def attempt() -> torch.Tensor:
            stored = self._file(path, shard)
            if (reason := stored.bad.get(index)) is not None:
                raise BadImage(reason)
            return stored.read(index)

        # A stale handle of a network file system never recovers: open the file anew.
        return with_retries(
            attempt, self.retry_seconds, str(path), give_up=lambda: self._close(path)
        )

    def _file(self, path: Path, shard: StoredShard) -> Stored:
        if path not in self._open:
            while len(self._open) >= MAX_OPEN_FILES:
                self._close(next(iter(self._open)))
            self._open[path] = open_file(path, shard, self.table)
        self._open.move_to_end(path)
        return self._open[path]

    def _close(self, path: Path) -> None:
        if path in self._open:
            self._open.pop(path).close()
