"""Samples by (shard, index): shards kept open, errors tried again, files fetched ahead."""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from blip2_train.data.remote import Cache, MissingFile, WrongSize, default_cache_dir, is_remote
from blip2_train.data.retries import with_retries
from blip2_train.data.shards import OFFSETS_SUFFIX, ShardError, ShardReader, offsets_bytes
from blip2_train.data.source import RETRY_SECONDS, StoredShard
from blip2_train.data.tar import RawSample

log = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 256
GIGABYTE = 10**9


@dataclass(frozen=True)
class Reading:
    """How shards are read, whatever is read of them.

    Attributes:
        cache: where remote shards are fetched to.
        retry_seconds: for how long an I/O error is tried again before it ends the run.
        on_bad_shard: "error", or "skip": the samples of a shard that cannot be read are replaced.
        max_open_shards: per process.
        need_captions: an image without captions cannot be used.
    """

    cache: Cache = field(default_factory=lambda: Cache(default_cache_dir(), 100 * GIGABYTE))
    retry_seconds: float = RETRY_SECONDS
    on_bad_shard: Literal["error", "skip"] = "error"
    max_open_shards: int = MAX_OPEN_SHARDS
    need_captions: bool = True


class ShardPool:
    """Reads samples and keeps the shards that were used last open."""

    def __init__(self, reading: Reading) -> None:
        """Open nothing yet: every loader worker opens its own files."""
        self._reading = reading
        self._readers: OrderedDict[str, ShardReader] = OrderedDict()
        self._unusable: dict[str, str] = {}  # not tried again for each of their samples
        self._ahead: _Ahead | None = None

    def read(self, info: StoredShard, index: int) -> RawSample:
        """Read one sample; I/O errors are tried again, never taken for a bad sample.

        Raises:
            OSError: it failed in every attempt.
            ShardError: the shard is unusable.
            SampleError: this sample alone is.
        """
        if info.location in self._unusable:
            raise ShardError(self._unusable[info.location])
        try:
            return with_retries(
                lambda: self._reader(info).read(index),
                self._reading.retry_seconds,
                info.location,
                # A stale handle of a network file system never recovers: open the file anew.
                give_up=lambda: self._close(info.location),
            )
        except WrongSize as error:  # in every attempt, so it was not cut on its way
            self._unusable[info.location] = str(error)
            raise ShardError(str(error)) from None

    def fetch_ahead(self, shards: Iterable[StoredShard]) -> None:
        """Begin to fetch the remote ones among shards that are needed soon; returns at once."""
        remote = [shard for shard in shards if is_remote(shard.folder)]
        if remote:
            if self._ahead is None:
                self._ahead = _Ahead(self._reading.cache)
            self._ahead.add(remote)

    def _reader(self, info: StoredShard) -> ShardReader:
        location = info.location
        if location not in self._readers:
            while len(self._readers) >= self._reading.max_open_shards:
                self._close(next(iter(self._readers)))
            cache = self._reading.cache if is_remote(info.folder) else None
            needed = self._reading.need_captions
            self._readers[location] = ShardReader(location, info, cache, needed)
        self._readers.move_to_end(location)
        return self._readers[location]

    def _close(self, location: str) -> None:
        self._readers.pop(location).close()


class _Ahead:
    """A thread that fetches shards, in the order in which they were asked for.

    Every process of a machine asks for the same ones: what another is at is left to it.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._queue: queue.Queue[StoredShard] = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, shards: Iterable[StoredShard]) -> None:
        for shard in shards:
            self._queue.put(shard)

    def _run(self) -> None:
        while True:
            shard = self._queue.get()
            try:
                location, version = shard.location, shard.sha256
                length = offsets_bytes(shard.samples)
                self._cache.fetch_ahead(location + OFFSETS_SUFFIX, version, length)
                self._cache.fetch_ahead(location, version, shard.bytes)
            except (OSError, MissingFile) as error:
                # Reading it will try again, and says what is wrong if that fails too.
                log.debug("%s was not fetched ahead: %s", shard.location, error)
            except Exception:
                log.exception("%s was not fetched ahead", shard.location)
