"""Between the loader and the trainer: agrees on the text length of a step, one batch ahead."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from blip2_train.data.batch import ImageTextBatch, longest_text, text_bucket
from blip2_train.distributed import PendingMaximum, World, agree_on_maximum


class Feeder:
    """Micro-batches with `text_length`, to which all ranks trim the text of that step.

    The longest caption of the *global* batch decides, since negatives' texts come from any rank.
    Ranks agree on it while the batch before is being trained on.

    Args:
        batches: this rank's micro-batches.
        bucket: lengths are rounded up to a multiple of it.
        world: the ranks that share a contrastive batch.

    Attributes:
        wait_seconds: time spent waiting for the loader, in all.
    """

    def __init__(self, batches: Iterable[ImageTextBatch], bucket: int, world: World) -> None:
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
            maximum = batch["input_ids"].shape[1]
            length = text_bucket(longest.result(), self.bucket, maximum)
            yield {**batch, "text_length": length}

    def _fetch(
        self, source: Iterator[ImageTextBatch]
    ) -> tuple[ImageTextBatch, PendingMaximum] | None:
        started = time.perf_counter()
        batch = next(source, None)
        self.wait_seconds += time.perf_counter() - started
        if batch is None:
            return None
        return batch, agree_on_maximum(longest_text(batch), self.world)
