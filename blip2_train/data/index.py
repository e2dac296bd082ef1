"""The index of a folder of shards, `index.json`: what each shard is, by its file name."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blip2_train.data.atomic import write_json
from blip2_train.errors import UserError

INDEX_NAME = "index.json"


@dataclass(frozen=True)
class ShardInfo:
    """What the index says about one shard."""

    name: str  # file name inside its folder
    split: str
    samples: int
    bytes: int  # size of the tar
    sha256: str  # of the tar, hexadecimal


def read_index(folder: Path) -> dict[str, ShardInfo]:
    """Read `folder/index.json`.

    Returns:
        Shards by file name, in the order of the file.

    Raises:
        UserError: there is no folder, no index, or it is not one.
    """
    path = Path(folder) / INDEX_NAME
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {folder}")
    if path.exists() and not path.is_file():  # opening a FIFO would wait for ever
        raise UserError(f"{path} is not a regular file")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {INDEX_NAME}: if blip2-prepare was interrupted there, run the same "
            f"command again; for tars from elsewhere run `blip2-prepare index {folder}`"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return parse_index(data, str(path))


def parse_index(data: bytes, where: str) -> dict[str, ShardInfo]:
    """The shards of an `index.json`'s content, as `read_index`.

    Args:
        data: of the file.
        where: path or URL, for messages.

    Raises:
        UserError: it is no index.
    """
    try:
        table = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read as JSON: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{where} must hold an object {{file name: shard}}")
    return {name: _shard_info(where, name, entry) for name, entry in table.items()}


def write_index(folder: Path, shards: Iterable[ShardInfo]) -> None:
    """Write `folder/index.json`, sorted by file name, atomically."""
    table: dict[str, dict[str, Any]] = {}
    for shard in sorted(shards, key=lambda shard: shard.name):
        entry = asdict(shard)
        table[entry.pop("name")] = entry
    write_json(Path(folder) / INDEX_NAME, table)


def _shard_info(where: str, name: str, entry: Any) -> ShardInfo:
    """Check one index entry: an index may come from a stranger, names must stay in the folder."""
    fields: dict[str, type] = {"split": str, "samples": int, "bytes": int, "sha256": str}
    if not is_plain_name(name):
        raise UserError(f"{where}: {name[:300]!r} is not a plain file name")
    if not isinstance(entry, Mapping):
        raise UserError(
            f"{where}: the entry of {name!r} must be an object with {', '.join(fields)}"
        )
    for field, kind in fields.items():
        value = entry.get(field)
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            raise UserError(f"{where}: {field!r} of {name!r} is {value!r}, not a {kind.__name__}")
    if entry["samples"] > entry["bytes"] // tarfile.BLOCKSIZE:  # memory would go by this number
        raise UserError(
            f"{where}: {name!r} cannot have {entry['samples']} samples in {entry['bytes']} bytes"
        )
    return ShardInfo(name, **{field: entry[field] for field in fields})


def is_plain_name(name: str) -> bool:
    """Whether a name stays in its folder, and on its line of a message."""
    good = Path(name).name == name and name not in ("", ".", "..")
    return good and len(name) < 256 and not re.search(r"[\x00-\x1f\x7f]", name)


def split_of(name: str) -> str | None:
    """The split that a shard's file name says (`val-000012.tar` -> `val`), or None."""
    match = re.fullmatch(r"([A-Za-z]\w*)[-_]\d+\.tar", name)
    return match[1] if match else None
