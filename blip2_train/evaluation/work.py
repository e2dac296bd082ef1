"""Work that is shared among ranks, and that survives being killed.

What was computed lies in `parts/`, a file per batch. Whoever starts again, on any number of ranks,
computes the missing ones alone.
"""

import hashlib
import json
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from blip2_train import signals
from blip2_train.checkpoint import io
from blip2_train.data.atomic import TEMP_SUFFIX
from blip2_train.data.shards import ShardError
from blip2_train.distributed import (
    World,
    barrier,
    gather_objects,
    on_rank_zero,
)
from blip2_train.errors import RankError, UserError

log = logging.getLogger(__name__)

PATIENCE = 90.0  # seconds; network file systems remember for up to 60 what is not there


class Work:
    """Maps functions over batches, see `map`.

    Args:
        folder: of the parts, the same one for all ranks.
        identity: plain values that the results depend on: checkpoint, data, settings. Parts of
            another identity are computed anew.
        world: the ranks.
        num_workers: loader processes of each rank.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        world: World | None = None,
        *,
        num_workers: int = 0,
    ) -> None:
        self.folder = folder
        self.identity = dict(identity)
        self.world = world or World()
        self.num_workers = num_workers
        self._names: set[str] = set()

    def map(
        self,
        name: str,
        items: Sequence[Any] | Any,
        batch_size: int,
        function: Callable[[list[Any]], Any],
    ) -> list[Any]:
        """Computes `function` of each batch that is not yet on the disk; all ranks call it.

        The missing batches are dealt out evenly. What a batch is made of depends neither on the
        ranks nor on what was there, so whatever `function` makes of it should not either.

        Args:
            name: of this step, unique within the work.
            items: with a length and numbered items; loader processes read them.
            batch_size: items of a batch; the last one may have fewer.
            function: gets the items of a batch, without gradients; what it returns holds tensors
                and plain values only.

        Returns:
            The result of each batch in order, the same on every rank.

        Raises:
            UserError: on every rank, where one of them met it or cannot write its parts; RankError,
                where one of them cannot read its items.
            Stopped: on every rank, where one of them has noted a signal.
        """
        assert name not in self._names, f"two steps are called {name}"
        self._names.add(name)
        count = len(items)
        numbers = range(-(-count // batch_size))
        mark = self._mark(name, count, batch_size)
        missing = on_rank_zero(
            (lambda: self._missing(name, numbers, mark)) if self.world.rank == 0 else None,
            self.world,
        )
        if missing and len(missing) < len(numbers):
            log.info(
                "%s: %d of %d parts were there", name, len(numbers) - len(missing), len(numbers)
            )
        own = missing[self.world.rank :: self.world.size]
        problem: UserError | None = None
        written: dict[int, str] = {}
        batches = [range(n * batch_size, min((n + 1) * batch_size, count)) for n in own]
        shown = tqdm(
            zip(own, self._read(items, batches), strict=True),
            desc=name,
            total=len(own),
            unit="batch",
            disable=None if self.world.rank == 0 else True,  # None: shown on a terminal
        )
        try:
            with torch.no_grad():
                for number, batch in shown:
                    if signals.received():
                        break
                    self._save(name, number, mark, function(batch))
                    written[number] = io.identity(self._path(name, number))
        except UserError as error:
            problem = error
        stopped = 0
        everyones = gather_objects((problem, written, signals.received()), self.world)
        for rank, (found, parts, number) in enumerate(everyones):
            stopped = stopped or number
            if found is not None:
                raise type(found)(str(found) if rank == 0 else f"{found} (so says rank {rank})")
            for part, wanted in parts.items():
                io.wait_for(self._path(name, part), wanted, PATIENCE)
        if stopped:
            raise signals.Stopped(stopped)
        results = [self._result(self._path(name, number), mark) for number in numbers]
        barrier(self.world)
        return results

    def close(self) -> None:
        """Deletes all parts, on rank 0: the work is done and its outcome is written."""
        barrier(self.world)
        if self.world.rank == 0 and self.folder.is_dir():
            for path in (*self.folder.glob("*.pt"), *self.folder.glob(f".*{TEMP_SUFFIX}")):
                path.unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _mark(self, name: str, count: int, batch_size: int) -> str:
        """Tells parts that may be taken from those of other work."""
        content = [self.identity, name, count, batch_size]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def _missing(self, name: str, numbers: range, mark: str) -> list[int]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be made: {error}; give another out=") from error
        for left in self.folder.glob(f".*{TEMP_SUFFIX}"):  # of a process that was killed
            left.unlink(missing_ok=True)
        return [n for n in numbers if self._load(self._path(name, n), mark) is None]

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}-{number:06d}.pt"

    def _read(self, items: Any, batches: list[range]) -> Iterator[list[Any]]:
        """The items of each batch, read by loader processes.

        Raises:
            RankError: the data cannot be read.
        """
        loader = iter(
            DataLoader(
                items,
                batch_sampler=[list(batch) for batch in batches],
                collate_fn=_as_it_is,
                num_workers=min(self.num_workers, len(batches)),
                worker_init_fn=_start_loader_process,
            )
        )
        for _ in batches:
            try:
                batch = next(loader)
            except (OSError, ShardError) as error:
                # where a loader process raised it, the message is a whole traceback
                reason = str(error).strip().splitlines()[-1]
                raise RankError(f"the data cannot be read: {reason}") from error
            yield batch

    def _save(self, name: str, number: int, mark: str, result: Any) -> None:
        path = self._path(name, number)
        try:
            io.save(path, {"mark": mark, "result": result})
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error}; make room, or give another out="
            ) from error

    def _result(self, path: Path, mark: str) -> Any:
        loaded = self._load(path, mark)
        if loaded is None:
            raise UserError(
                f"{path} has disappeared or was written anew; give the same command again, once "
                " nothing else works in that folder"
            )
        return loaded[0]

    def _load(self, path: Path, mark: str) -> tuple[Any] | None:
        """What a part holds, as a tuple of one; None where it is missing, damaged or another's."""
        if not path.is_file() or io.damage(path) is not None:
            return None
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, OSError, RuntimeError):
            return None
        if not isinstance(content, dict) or content.get("mark") != mark:
            return None
        return (content["result"],)


def _as_it_is(items: list[Any]) -> list[Any]:
    return items


def _start_loader_process(_: int) -> None:
    """Leaves signals to the process that evaluates."""
    signals.obey_parent_only()
