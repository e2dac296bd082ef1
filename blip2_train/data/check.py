"""Index tars that others wrote, and check shards against their index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from blip2_train.data.shards import (
    ShardError,
    ShardInfo,
    ShardReader,
    file_sha256,
    read_index,
    scan_tar,
    split_of,
    write_index,
    write_offsets,
)
from blip2_train.errors import UserError


def index_folder(folder: Path, split: str | None) -> tuple[list[ShardInfo], list[str]]:
    """Write the index and offsets of the tars in a folder; the tars stay as they are.

    Args:
        folder: holds the tars.
        split: of all of them; None takes it from `<split>-<number>.tar`, else it is train.

    Returns:
        The shards, and a message for each tar that cannot be read and is not in the index.

    Raises:
        UserError: there is no tar, or none that can be read.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder} holds no .tar file")
    shards, bad = [], []
    for path in tqdm(paths, unit=" shards", disable=None):
        try:
            offsets = scan_tar(path)
        except ShardError as error:
            bad.append(str(error))
            continue
        write_offsets(path, offsets)
        shards.append(
            ShardInfo(
                name=path.name,
                split=split or split_of(path.name) or "train",
                samples=len(offsets),
                bytes=path.stat().st_size,
                sha256=file_sha256(path),
            )
        )
    if not shards:
        raise UserError(f"no tar in {folder} can be read, for example: {bad[0]}")
    write_index(folder, shards)
    return shards, bad


def verify_folder(folder: Path) -> tuple[int, list[str]]:
    """Check size, SHA-256 and offsets of every shard of an index.

    Returns:
        The number of shards in the index, and a message for each thing that is wrong.

    Raises:
        UserError: there is no index.
    """
    shards = read_index(folder)
    tars = sorted(folder.glob("*.tar"))
    bad = [f"{path} is not in the index" for path in tars if path.name not in shards]
    for info in tqdm(shards.values(), unit=" shards", disable=None):
        path = folder / info.name
        reader = ShardReader(path, info)
        try:
            if file_sha256(path) != info.sha256:
                bad.append(f"{path} has another SHA-256 than the index says")
            elif not np.array_equal(scan_tar(path), reader.offsets):
                bad.append(f"the offsets of {path} are not those of its samples")
        except FileNotFoundError:
            bad.append(f"{path} does not exist")
        except ShardError as error:
            bad.append(str(error))
        finally:
            reader.close()
    return len(shards), bad
