"""Index tars that others wrote, and check shards against their index; both in several processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from blip2_train.data.atomic import write_json
from blip2_train.data.index import ShardInfo, is_plain_name, read_index, split_of, write_index
from blip2_train.data.processes import run_tasks
from blip2_train.data.shards import (
    ShardError,
    ShardReader,
    file_sha256,
    offsets_path,
    scan_tar,
    write_offsets,
)
from blip2_train.errors import UserError

# Beside the tars: what is known of each, so that an interrupted `index` goes on where it was.
STATE_FOLDER = ".index"

Result = TypeVar("Result")


def index_folder(
    folder: Path, split: str | None, workers: int = 1
) -> tuple[list[ShardInfo], list[str]]:
    """Write the index and offsets of the tars in a folder; the tars stay as they are.

    What is found out about a tar is kept in `folder/.index/`: the same call after an interruption,
    or after more tars were added, reads only tars that are new or whose size or time of change is
    another.

    Args:
        folder: holds the tars.
        split: of all of them; None takes it from `<split>-<number>.tar`, else it is train.
        workers: number of processes.

    Returns:
        The shards, and a message for each tar that cannot be read and is not in the index.

    Raises:
        UserError: there is no tar, none that can be read, or a worker process was killed.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder} holds no .tar file")
    (folder / STATE_FOLDER).mkdir(exist_ok=True)
    splits = [split or split_of(path.name) or "train" for path in paths]
    found = _in_processes(_index_one, list(zip(paths, splits, strict=True)), workers)
    bad = [result for result in found if isinstance(result, str)]
    shards = [result for result in found if isinstance(result, ShardInfo)]
    if not shards:
        raise UserError(f"no tar in {folder} can be read, for example: {bad[0]}")
    write_index(folder, shards)
    return shards, bad


def verify_folder(folder: Path, workers: int = 1) -> tuple[int, list[str]]:
    """Check size, SHA-256 and offsets of every shard of an index.

    Args:
        folder: holds the tars and the index.
        workers: number of processes.

    Returns:
        The number of shards in the index, and a message for each thing that is wrong.

    Raises:
        UserError: there is no folder or no index, or a worker process was killed.
    """
    shards = read_index(folder)
    tars = sorted(folder.glob("*.tar"))
    bad = [f"{path} is not in the index" for path in tars if path.name not in shards]
    found = _in_processes(_verify_one, [(folder, info) for info in shards.values()], workers)
    return len(shards), bad + [message for message in found if message is not None]


def verify_features(folder: Path, workers: int = 1) -> tuple[int, list[str]]:
    """Check the files of `blip2-prepare features` beside the shards.

    Args:
        folder: holds the tars.
        workers: number of processes.

    Returns:
        The number of files, and a message for each that is damaged.

    Raises:
        UserError: a table of them cannot be read, or a worker process was killed.
    """
    from blip2_train.data.feature_files import (  # torch: seconds in each process
        damage,
        listed_files,
    )

    files = listed_files(folder)
    found = _in_processes(damage, [(path,) for path in files], workers)
    return len(files), [message for message in found if message is not None]


def _in_processes(
    task: Callable[..., Result], arguments: Sequence[tuple[Any, ...]], workers: int
) -> list[Result]:
    """`[task(*given) for given in arguments]` with a progress bar; one worker is this process."""
    found: dict[int, Result] = {}
    with tqdm(total=len(arguments), unit=" shards", disable=None) as progress:

        def finished(number: int, result: Result) -> None:
            found[number] = result
            progress.update()

        try:
            if workers == 1:
                for number, given in enumerate(arguments):
                    finished(number, task(*given))
            else:
                run_tasks(task, arguments, workers, finished)
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory?); run the same command again, with "
                "fewer --workers"
            ) from None
    return [found[number] for number in range(len(arguments))]


def _index_one(path: Path, split: str) -> ShardInfo | str:
    """What the index says of a tar, or why it cannot be read; its offsets are beside it then."""
    if not path.is_file():  # opening a FIFO would wait for ever
        return f"{path} is not a regular file"
    if not is_plain_name(path.name):
        return f"{str(path)!r} is not a plain file name"
    stat = path.stat()
    entry = path.parent / STATE_FOLDER / f"{path.name}.json"
    state = {"bytes": stat.st_size, "changed_ns": stat.st_mtime_ns}
    known = _known(entry, state) if offsets_path(path).exists() else None
    if known is None:
        try:
            offsets = scan_tar(path)
        except ShardError as error:
            return str(error)
        write_offsets(path, offsets)
        known = {**state, "samples": len(offsets), "sha256": file_sha256(path)}
        write_json(entry, known)
    return ShardInfo(path.name, split, known["samples"], known["bytes"], known["sha256"])


def _known(entry: Path, state: dict[str, int]) -> dict[str, Any] | None:
    """What an earlier run found out, None if there is nothing or the tar is in another state."""
    try:
        known = json.loads(entry.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    complete = isinstance(known, dict) and known.keys() == {*state, "samples", "sha256"}
    return known if complete and known.items() >= state.items() else None


def _verify_one(folder: Path, info: ShardInfo) -> str | None:
    """What is wrong with a shard, if anything."""
    path = folder / info.name
    if path.exists() and not path.is_file():
        return f"{path} is not a regular file"
    reader = ShardReader(path, info)
    try:
        if file_sha256(path) != info.sha256:
            return f"{path} has another SHA-256 than the index says"
        if not np.array_equal(scan_tar(path), reader.offsets):
            return f"the offsets of {path} are not those of its samples"
    except FileNotFoundError:
        return f"{path} does not exist"
    except ShardError as error:
        return str(error)
    finally:
        reader.close()
    return None
