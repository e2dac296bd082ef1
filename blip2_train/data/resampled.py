"""Tars that cannot be indexed (`data.mode=stream`): an ordinary resampled WebDataset pipeline.

Shards are drawn with replacement, read front to back and mixed in a buffer. Which samples a step
sees depends on the ranks, the workers and where the run was resumed; what is kept is the share of
each source, and that nothing of a stranger's tar is trusted.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import webdataset
from torch.utils.data import get_worker_info

from blip2_train.data.batch import Sample, Skipped
from blip2_train.data.images import BadImage
from blip2_train.data.order import PartedOrder
from blip2_train.data.remote import MissingFile, is_remote
from blip2_train.data.retries import with_retries
from blip2_train.data.shards import ShardError
from blip2_train.data.source import Source, StoredShard, UnindexedSource
from blip2_train.data.stream import Batch, TrainStream, Usable, usable
from blip2_train.data.tar import RawSample, SampleError, tar_samples
from blip2_train.seeding import stable_hash

BUFFER = 1000  # encoded samples that are mixed, per source and worker
MAX_BAD_IN_A_ROW = 1000


class ResampledStream(TrainStream[Batch]):
    """The same as `TrainStream`, of sources from `open_unindexed`; see this module on what differs.

    An unusable sample is replaced by the next one that comes.
    """

    def epochs_after(self, micro_batches: int) -> dict[str, float]:
        """Return nothing: how many samples there are is not known."""
        return {}

    def __iter__(self) -> Iterator[Batch]:
        self._pipelines = {
            name: iter(self._pipeline(source))
            for name, source in self._sources.items()
            if isinstance(source, UnindexedSource)
        }
        yield from super().__iter__()

    def _order_all(
        self, sources: Sequence[Source], seed: int, shuffle_window: int, locality: int
    ) -> dict[str, PartedOrder]:
        return {}

    def _draw(self, name: str, part: int, n: int, skipped: list[Skipped]) -> Sample:
        source = self._sources[name]
        for _ in range(MAX_BAD_IN_A_ROW):
            url, found = next(self._pipelines[name])
            shard = StoredShard(url.rsplit("/", 1)[-1], "", 0, 0, "", folder="")
            sample = usable(found, self._max_words) if isinstance(found, RawSample) else found
            if isinstance(sample, Usable):
                try:
                    # In the place of the epoch, which there is none of: a number of its own.
                    return self._augment(source, shard, 0, n, sample)
                except BadImage as error:
                    sample = SampleError(sample.key, str(error))
            where = f"{name}/{shard.name}"
            skipped.append({"shard": where, "key": sample.key, "reason": sample.reason})
        raise ShardError(
            f"data.sources.{name}: {MAX_BAD_IN_A_ROW} samples in a row cannot be used, the last "
            f"one because of: {skipped[-1]['reason']}"
        )

    def _pipeline(self, source: UnindexedSource) -> webdataset.DataPipeline:
        """An endless iterable of (URL, sample or what is wrong with it)."""
        info = get_worker_info()
        worker = info.id if info is not None else 0
        drawn = sum(self.drawn.values())
        seed = stable_hash(self._seed, source.name, drawn, self._rank, worker)
        return webdataset.DataPipeline(
            webdataset.ResampledShards(
                list(source.urls), seed=seed, worker_seed=lambda: 0, deterministic=True
            ),
            self._samples,
            webdataset.shuffle(BUFFER, rng=random.Random(seed)),
        )

    def _samples(
        self, shards: Iterator[dict[str, Any]]
    ) -> Iterator[tuple[str, RawSample | SampleError]]:
        for shard in shards:
            url = shard["url"]
            try:
                with self._opened(url) as file:
                    for sample in tar_samples(file):
                        yield url, sample
            except (OSError, GeneratorExit):
                raise
            except Exception as error:  # see tar_samples
                if self._reading.on_bad_shard == "error":
                    raise ShardError(f"{url}: {error}") from error
                yield url, SampleError("", f"bad shard: {error}")

    @contextlib.contextmanager
    def _opened(self, url: str) -> Iterator[BinaryIO]:
        """A tar as a real file: a remote one from the cache, a command's output on the disk."""
        opener = self._run if url.startswith("pipe:") else self._open
        with with_retries(lambda: opener(url), self._reading.retry_seconds, url) as file:
            yield file

    def _open(self, url: str) -> BinaryIO:
        try:
            return self._reading.cache.open(url) if is_remote(url) else open(url, "rb")
        except (FileNotFoundError, MissingFile):
            raise ShardError("it does not exist") from None

    def _run(self, url: str) -> BinaryIO:
        """The output of a command that the user allowed."""
        output = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
        status = subprocess.run(url.removeprefix("pipe:"), shell=True, stdout=output).returncode
        if status:
            output.close()
            raise OSError(f"the command ended with status {status}")
        return output
