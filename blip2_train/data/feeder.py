"""Between the loader and the trainer: fetches one batch ahead, agrees on a step's text length."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from blip2_train.data.batch import longest_text, text_bucket
from blip2_train.data.shards import ShardError
from blip2_train.distributed import PendingMaximum, World, agree_on_maximum
from blip2_train.errors import RankError


class Feeder:
    """Micro-batches with `text_length`, to which all ranks trim the text of that step.

    The longest caption of the *global* batch decides, since negatives' texts come from any rank.
    Ranks agree on it while the batch before is being trained on. Where they exchange no texts,
    each batch has its own length and passes as it is.

    Args:
        batches: this rank's micro-batches.
        bucket: lengths are rounded up to a multiple of it; None: nothing is agreed on, and there is
            no `text_length`.
        world: the ranks that share a contrastive batch.

    Attributes:
        wait_seconds: time spent waiting for the loader, in all.

    Raises:
        RankError: a shard is unusable, or reading it failed for `data.retry_seconds`.
    """

    def __init__(self, batches: Iterable[Any], bucket: int | None, world: World) -> None:
        self.batches = batches
        self.bucket = bucket
        self.world = world
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        source = iter(self.batches)
        following = self._fetch(source)
        while following is not None:
            batch, longest = following
            following = self._fetch(source)
            if self.bucket is not None and longest is not None:
                maximum = batch["input_ids"].shape[1]
                length = text_bucket(longest.result(), self.bucket, maximum)
                batch = {**batch, "text_length": length}
            yield batch

    def _fetch(self, source: Iterator[Any]) -> tuple[Any, PendingMaximum | None] | None:
        started = time.perf_counter()
        try:
            batch = next(source, None)
        except (OSError, ShardError) as error:
            # Where a loader worker raised it, the message is a whole traceback.
            reason = str(error).strip().splitlines()[-1]
            raise RankError(f"the data cannot be read: {reason}") from error
        self.wait_seconds += time.perf_counter() - started
        if batch is None:
            return None
        if self.bucket is None:
            return batch, None
        return batch, agree_on_maximum(longest_text(batch), self.world)
