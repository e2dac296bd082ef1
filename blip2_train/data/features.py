"""Tokens of the frozen tower, kept beside the shards they were computed from.

    FOLDER/features-<id>/                     <id>: hash of the tower and of what it was shown
        features.json                         both, and every file
        blank.safetensors                     of the image that says nothing
        <split>-000000.tar.safetensors        of a shard's images, in stored order

`tokens` of a file are what `models.cached_tower.pack` makes of them; the reasons why an image has
none are in its header. The tars stay: captions are read from them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from blip2_train.data.atomic import atomic_writer, write_json
from blip2_train.data.images import BadImage
from blip2_train.data.remote import is_remote
from blip2_train.data.retries import with_retries
from blip2_train.data.shards import ShardError, file_sha256
from blip2_train.data.source import RETRY_SECONDS, Source, StoredShard
from blip2_train.errors import UserError

PREFIX = "features-"
TABLE = "features.json"
BLANK = "blank"
SUFFIX = ".safetensors"
# What the tower is shown: `EvalTransform`. Another transform is another cache.
TRANSFORM = "whole image, bicubic (PIL)"
MAX_OPEN_FILES = 256


@dataclass(frozen=True)
class Table:
    """What a folder of features holds.

    Attributes:
        tower: see `tower_identity`.
        transform: what the tower was shown, `TRANSFORM`.
        digest: SHA-256 of the tower's weights.
        store: how numbers are kept, see `models.cached_tower.pack`.
        dtype: of the features that the tower gave.
        image_size: side in pixels.
        tokens: of an image.
        width: of a token.
        files: {shard: {"tar": SHA-256 of the shard, "bytes": of the file}}.
    """

    tower: dict[str, Any]
    transform: str
    digest: str
    store: str
    dtype: str
    image_size: int
    tokens: int
    width: int
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Hash of all but the files: what each of these says it belongs to."""
        text = json.dumps(asdict(replace(self, files={})), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Stored:
    """An opened file of features.

    Attributes:
        tokens: [N, P, Dv] (see `pack`), mapped: rows are read when they are used.
        tar: SHA-256 of their shard.
        key: of their `Table`.
        sha256: of the tokens' bytes.
        bad: {image of the shard: why it has none}.
    """

    tokens: torch.Tensor
    tar: str
    key: str
    sha256: str
    bad: dict[int, str]


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
    # as it was before there was another precision, so that features of then are found
    same = {"_target_": vision.get("_target_"), "precision": "native"}
    depends = {key: value for key, value in vision.items() if same.get(key) != value}
    return {**depends, "weights": weights}


def features_folder(folder: str | Path, tower: Mapping[str, Any]) -> Path:
    """Where the features of a tower are, beside the shards in `folder`."""
    text = json.dumps([tower, TRANSFORM], sort_keys=True)
    return Path(folder) / f"{PREFIX}{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def write_table(folder: Path, table: Table) -> None:
    """Write `features.json`."""
    write_json(folder / TABLE, asdict(table))


def read_table(folder: Path) -> Table:
    """Read `features.json`.

    Raises:
        UserError: it is damaged, or of another version.
    """
    try:
        table = Table(**json.loads((folder / TABLE).read_bytes()))
        assert isinstance(table.files, dict) and isinstance(table.tower, dict)
    except (OSError, ValueError, TypeError, AssertionError, RecursionError) as error:
        raise UserError(
            f"{folder / TABLE} cannot be read ({error}); delete {folder} and run blip2-prepare "
            "features again"
        ) from None
    return table


def open_features(
    vision: Mapping[str, Any], sources: Iterable[Source], retry_seconds: float = RETRY_SECONDS
) -> CachedFeatures:
    """The features of all images of some sources, of the tower that the configuration names.

    Args:
        vision: group of the resolved configuration.
        sources: of training and validation.
        retry_seconds: for how long opening a file is tried again.

    Raises:
        UserError: some are missing, of another tower, or of shards as they no longer are.
    """
    tower = tower_identity(vision)
    found: dict[str, Table] = {}
    for source in sources:
        for shard in source.shards:
            if shard.folder not in found:
                found[shard.folder] = _table_of(source.name, shard.folder, tower)
            _check_file(found[shard.folder], shard, tower)
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
        blank = read_file(place / f"{BLANK}{SUFFIX}").tokens.clone()
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


def _check_file(table: Table, shard: StoredShard, tower: Mapping[str, Any]) -> None:
    if not shard.samples:
        return
    entry = table.files.get(shard.name)
    path = features_folder(shard.folder, tower) / f"{shard.name}{SUFFIX}"
    if entry is None:
        found = "has no features"
    elif entry["tar"] != shard.sha256:
        found = "is not as it was when they were computed"
    elif not path.is_file():
        found = f"has lost them: {path} does not exist"
    elif path.stat().st_size != entry["bytes"]:
        found = f"has damaged ones: {path} has {path.stat().st_size} bytes, not {entry['bytes']}"
    else:
        return
    raise UserError(
        f"data.features=cached: shard {shard.name} of {shard.folder} {found}; run blip2-prepare "
        f"features {shard.folder} experiment=... again"
    )


class CachedFeatures:
    """Tokens by (shard, index); files that were used last stay open.

    Every loader process opens its own: pickling and forking carry only what it was made of.

    Args:
        name: of the folder beside the shards.
        table: what is in it.
        blank: tokens [1, P, Dv] of the image that says nothing, as they are stored.
        retry_seconds: for how long opening a file is tried again.
    """

    def __init__(
        self, name: str, table: Table, blank: torch.Tensor, retry_seconds: float = RETRY_SECONDS
    ) -> None:
        self.name, self.table, self.blank = name, table, blank
        self.retry_seconds = retry_seconds
        self._open: OrderedDict[Path, Stored] = OrderedDict()
        self._process = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedFeatures, (self.name, self.table, self.blank, self.retry_seconds)

    def read(self, shard: StoredShard, index: int) -> torch.Tensor:
        """Tokens of one image as they are stored, [P, Dv] or [P, Dv + 4].

        Raises:
            BadImage: the image could not be decoded when they were computed.
            ShardError: the file is not what it should be.
        """
        stored = self._file(shard)
        if (reason := stored.bad.get(index)) is not None:
            raise BadImage(reason)
        return stored.tokens[index]

    def _file(self, shard: StoredShard) -> Stored:
        if self._process != os.getpid():  # a fork: what is mapped in one process stays its own
            self._open, self._process = OrderedDict(), os.getpid()
        path = Path(shard.folder, self.name, shard.name + SUFFIX)
        if path not in self._open:
            while len(self._open) >= MAX_OPEN_FILES:
                self._open.popitem(last=False)
            self._open[path] = with_retries(
                lambda: read_file(path, shard, self.table), self.retry_seconds, str(path)
            )
        self._open.move_to_end(path)
        return self._open[path]


def read_file(path: Path, shard: StoredShard | None = None, table: Table | None = None) -> Stored:
    """Open a file of features.

    Args:
        path: of the file.
        shard: whose features it should hold.
        table: that it should belong to.

    Raises:
        ShardError: it is missing, damaged, of another shard or of another tower.
        OSError: it could not be read, which may pass.
    """
    remedy = "delete it and run blip2-prepare features again"
    try:
        file = safe_open(str(path), framework="pt")
        about = json.loads(file.metadata()["about"])
        bad = {int(index): reason for index, reason in about.pop("bad").items()}
        # not `get_slice`, which reads thirty times as slowly
        stored = Stored(file.get_tensor("tokens"), bad=bad, **about)
    except (FileNotFoundError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} cannot be read ({error}); {remedy}") from None
    if table is not None and stored.key != table.key:
        raise ShardError(f"{path} is of another tower than {TABLE} beside it; {remedy}")
    of = (stored.tar, len(stored.tokens))
    if shard is not None and of != (shard.sha256, shard.samples):
        raise ShardError(f"{path} is of another shard than {shard.location}; {remedy}")
    return stored


def write_file(
    path: Path, tokens: torch.Tensor, table: Table, tar: str, bad: Mapping[int, str]
) -> None:
    """Write a file of features, whole or not at all.

    Args:
        path: of the file.
        tokens: [N, P, Dv] as `pack` gives them, on any device.
        table: that it belongs to.
        tar: SHA-256 of the shard.
        bad: {image: why it has none}.
    """
    tokens = tokens.cpu().contiguous()
    about = {"tar": tar, "key": table.key, "sha256": _sha256(tokens), "bad": bad}
    with atomic_writer(path) as file:
        save_file({"tokens": tokens}, file.name, metadata={"about": json.dumps(about)})


def listed_files(folder: Path) -> list[Path]:
    """Every file of features beside the shards in a folder.

    Raises:
        UserError: a table cannot be read.
    """
    places = [path.parent for path in sorted(folder.glob(f"{PREFIX}*/{TABLE}"))]
    return [
        place / f"{name}{SUFFIX}"
        for place in places
        for name in [BLANK, *sorted(read_table(place).files)]
    ]


def damage(path: Path) -> str | None:
    """What is wrong with a file of features, if anything; reads all of it."""
    try:
        stored = read_file(path, table=read_table(path.parent))
        good = _sha256(stored.tokens) == stored.sha256
    except (ShardError, UserError, OSError) as error:
        return str(error)
    return None if good else f"{path} has other numbers than were written"


def _sha256(tokens: torch.Tensor) -> str:
    return hashlib.sha256(tokens.view(torch.uint8).numpy()).hexdigest()
