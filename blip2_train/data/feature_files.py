"""The files of `features.py`: one of tokens for each shard, and a table of them.

A file of tokens is safetensors with one tensor, `tokens` [N, P, Dv] as `models.cached_tower.pack`
makes it, and in its header what it belongs to and why some images have none. Rows are read one at a
time (`pread`), so that an error of the disk is one of a read, which may be tried again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from blip2_train.data.atomic import atomic_writer, write_json
from blip2_train.data.shards import ShardError
from blip2_train.data.source import StoredShard
from blip2_train.errors import UserError

PREFIX = "features-"
TABLE = "features.json"
BLANK = "blank"
SUFFIX = ".safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}
MAX_HEADER = 100_000_000  # bytes, as the format allows


@dataclass(frozen=True)
class Table:
    """What a folder of features holds.

    Attributes:
        tower: see `features.tower_identity`.
        transform: what the tower was shown, see `features.TRANSFORM`.
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


def write_table(folder: Path, table: Table) -> None:
    """Write `features.json`."""
    write_json(folder / TABLE, asdict(table))


def read_table(folder: Path) -> Table:
    """Read `features.json`.

    Raises:
        UserError: it cannot be read, is damaged, or of another version.
    """
    path = folder / TABLE
    try:
        table = Table(**json.loads(path.read_bytes()))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete this file alone, and run blip2-prepare features "
            "again: features that are there are found"
        ) from None
    return table


@dataclass(frozen=True)
class Stored:
    """An opened file of features.

    Attributes:
        file: that they are in; to be closed.
        start: where the first row begins.
        shape: N, P and Dv as it is stored.
        dtype: as they are stored.
        tar: SHA-256 of their shard.
        key: of their `Table`.
        sha256: of the tokens' bytes.
        bad: {image of the shard: why it has none}.
    """

    file: BinaryIO
    start: int
    shape: tuple[int, int, int]
    dtype: torch.dtype
    tar: str
    key: str
    sha256: str
    bad: dict[int, str]

    @property
    def row_bytes(self) -> int:
        """Of one image."""
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    def read(self, index: int) -> torch.Tensor:
        """Tokens [P, Dv] of one image, as they are stored.

        Raises:
            OSError: they could not be read, which may pass.
        """
        row = torch.empty(self.shape[1:], dtype=self.dtype)
        memory = memoryview(row.view(torch.uint8).numpy()).cast("B")
        start = self.start + index * self.row_bytes
        if os.preadv(self.file.fileno(), [memory], start) < self.row_bytes:
            raise OSError(f"{self.file.name} ends inside image {index}")
        return row

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def open_file(path: Path, shard: StoredShard | None = None, table: Table | None = None) -> Stored:
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
        file = path.open("rb", buffering=0)
    except FileNotFoundError:
        raise ShardError(f"{path} does not exist; run blip2-prepare features again") from None
    try:
        stored = _parse(file)
        if table is not None and stored.key != table.key:
            raise ShardError(f"{path} is of another tower than {TABLE} beside it; {remedy}")
        of = (stored.tar, stored.shape[0])
        if shard is not None and of != (shard.sha256, shard.samples):
            raise ShardError(f"{path} is of another shard than {shard.location}; {remedy}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        file.close()
        raise ShardError(f"{path} is damaged ({error}); {remedy}") from None
    except BaseException:
        file.close()
        raise
    return stored


def _parse(file: BinaryIO) -> Stored:
    """The header of a safetensors file: its length in 8 bytes, then JSON."""
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise ValueError("no header")
    header = json.loads(file.read(length))
    about = json.loads(header["__metadata__"]["about"])
    bad = {int(index): reason for index, reason in about.pop("bad").items()}
    rows, tokens, width = header["tokens"]["shape"]
    dtype = DTYPES[header["tokens"]["dtype"]]
    stored = Stored(file, 8 + length, (rows, tokens, width), dtype, bad=bad, **about)
    size = os.fstat(file.fileno()).st_size
    if size != stored.start + rows * stored.row_bytes:
        raise ValueError(f"it has {size} bytes, not what its header says")
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

    Raises:
        OSError: the disk is full, or fails.
    """
    tokens = tokens.cpu().contiguous()
    digest = hashlib.sha256(tokens.view(torch.uint8).numpy()).hexdigest()
    about = {"tar": tar, "key": table.key, "sha256": digest, "bad": bad}
    with atomic_writer(path) as file:
        try:
            save_file({"tokens": tokens}, file.name, metadata={"about": json.dumps(about)})
        except SafetensorError as error:  # of the operating system, which it does not name
            raise OSError(f"{path} could not be written: {error}") from error


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
    digest = hashlib.sha256()
    try:
        stored = open_file(path, table=read_table(path.parent))
        for index in range(stored.shape[0]):
            digest.update(stored.read(index).view(torch.uint8).numpy())
        stored.close()
    except (ShardError, UserError, OSError) as error:
        return str(error)
    good = digest.hexdigest() == stored.sha256
    return None if good else f"{path} has other numbers than were written"
