"""Write planned shards in several processes, restartable at any moment.

Beside the shards `OUT/.prepare/` remembers the plan and, shard by shard, what came of it. A shard
whose entry is there is finished; anything else is written again, to the same bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blip2_train.data.atomic import TEMP_SUFFIX, write_json
from blip2_train.data.images import BadImage
from blip2_train.data.index import ShardInfo
from blip2_train.data.plan import Item, PlannedShard, questions_of
from blip2_train.data.processes import run_tasks
from blip2_train.data.shards import offsets_path, write_shard
from blip2_train.data.tar import SampleError, raw_sample
from blip2_train.errors import UserError

STATE_FOLDER = ".prepare"
REPORT_NAME = "report.json"

Make = Callable[[Item], tuple[bytes, dict[str, Any]]]


@dataclass(frozen=True)
class Written:
    """What came of one planned shard."""

    shard: ShardInfo | None  # None: no sample was left, so there is no tar
    captions: int
    skipped: list[tuple[str, str]]  # (file, reason)
    questions: int = 0


@contextlib.contextmanager
def claimed(folder: Path, fingerprint: str, command: str) -> Iterator[None]:
    """Hold an output folder for one run; it must be empty or hold the same plan.

    Args:
        folder: made if it does not exist.
        fingerprint: of the plan, see `plan_shards`.
        command: what a later, different command is told about this one.

    Raises:
        UserError: the folder holds anything else, or another process is writing there.
    """
    import fcntl

    claim_error = f"{folder} holds other data: choose another --out, or empty that folder"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    state = folder / STATE_FOLDER
    plan = state / "plan.json"
    # A run that found no image leaves its report only, and data/<name>/ has its recipe.
    names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    if not plan.exists() and names - {REPORT_NAME, STATE_FOLDER, "README.md"}:
        raise UserError(claim_error)
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back if the process is killed
        except BlockingIOError:
            raise UserError(f"another blip2-prepare is writing to {folder}") from None
        if plan.exists():
            known = json.loads(plan.read_bytes())
            if known["fingerprint"] != fingerprint:
                raise UserError(f"{claim_error} (it was made by: {known['command']})")
        yield


def write_shards(
    folder: Path,
    shards: list[PlannedShard],
    make: Make,
    *,
    fingerprint: str,
    command: str,
    workers: int,
    done: Callable[[int], None],
) -> list[Written]:
    """Write the shards that are not finished yet; `folder` is claimed.

    Args:
        folder: the output folder.
        shards: all planned shards.
        make: gives the JPEG and metadata of an item, or raises `BadImage`; picklable.
        fingerprint: of the plan.
        command: for the message of a later run.
        workers: number of processes.
        done: called with the number of records whenever a shard is finished.

    Returns:
        What came of each shard, in the order of `shards`.

    Raises:
        UserError: a worker process was killed, or the disk failed; finished shards stay.
    """
    state = folder / STATE_FOLDER
    for leftover in [*folder.glob(f".*{TEMP_SUFFIX}"), *state.glob(f".*{TEMP_SUFFIX}")]:
        leftover.unlink(missing_ok=True)
    write_json(state / "plan.json", {"fingerprint": fingerprint, "command": command})
    written: dict[str, Written] = {}
    for shard in shards:
        result = _finished(folder, shard.name)
        if result is not None:
            written[shard.name] = result
            done(len(shard.items))

    def finished(shard: PlannedShard, result: Written) -> None:
        write_json(_entry_path(folder, shard.name), asdict(result))
        written[shard.name] = result
        done(len(shard.items))

    def left() -> list[PlannedShard]:
        return [shard for shard in shards if shard.name not in written]

    try:
        _run(folder, left(), make, workers, finished)
    except BrokenProcessPool:
        # All workers fall with one, so it is not known which shard it was. One at a time tells,
        # and needs less memory.
        print("a worker process was killed; going on with one worker", flush=True)
        for shard in left():
            _run_alone(folder, shard, make, finished)
    except OSError as error:
        raise UserError(f"{error}; run the same command again to go on") from error
    return [written[shard.name] for shard in shards]


def _run(
    folder: Path,
    shards: list[PlannedShard],
    make: Make,
    workers: int,
    finished: Callable[[PlannedShard, Written], None],
) -> None:
    """Write `shards`, at most one per worker at a time."""
    arguments = [(folder, shard, make) for shard in shards]
    run_tasks(_write, arguments, workers, lambda number, result: finished(shards[number], result))


def _run_alone(
    folder: Path,
    shard: PlannedShard,
    make: Make,
    finished: Callable[[PlannedShard, Written], None],
) -> None:
    try:
        _run(folder, [shard], make, 1, finished)
    except BrokenProcessPool:
        raise UserError(
            f"the process that was writing {shard.name} was killed (out of memory?); finished "
            "shards are kept, run the same command again to go on"
        ) from None


def _write(folder: Path, planned: PlannedShard, make: Make) -> Written:
    """Write one shard; runs in a worker process."""
    skipped: list[tuple[str, str]] = []
    captions = questions = 0

    def samples() -> Iterator[dict[str, Any]]:
        nonlocal captions, questions
        for item in planned.items:
            try:
                if item.skip is not None:
                    raise BadImage(item.skip)
                jpeg, meta = make(item)
                sample = {"jpg": jpeg, "json": json.dumps(meta).encode("ascii")}
                # nothing is written that would not be read
                raw_sample(item.key, sample, need_captions=bool(item.captions))
            except BadImage as error:
                skipped.append((item.file, str(error)))
            except SampleError as error:
                skipped.append((item.file, error.reason))
            else:
                captions += len(item.captions)
                questions += len(questions_of(item))
                yield {"__key__": item.key, **sample}

    stream = samples()
    first = next(stream, None)
    shard = None
    if first is not None:
        shard = write_shard(folder / planned.name, itertools.chain([first], stream))
    return Written(shard, captions, skipped, questions)


def _entry_path(folder: Path, name: str) -> Path:
    return folder / STATE_FOLDER / f"{name}.json"


def _finished(folder: Path, name: str) -> Written | None:
    """What an earlier run wrote for shard `name`, None if it is not all there."""
    try:
        entry = json.loads(_entry_path(folder, name).read_bytes())
    except FileNotFoundError:
        return None
    shard = None if entry["shard"] is None else ShardInfo(**entry["shard"])
    if shard is not None:
        path = folder / name
        if not offsets_path(path).exists() or not path.exists():
            return None
        if path.stat().st_size != shard.bytes:
            return None
    skipped = [(file, reason) for file, reason in entry["skipped"]]
    return Written(shard, entry["captions"], skipped, entry.get("questions", 0))
