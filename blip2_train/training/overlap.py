"""`trainer.overlap`: the frozen tower sees the next batch while this one is being trained on.

Lightning asks for a batch one step before it trains on it. Its copies to the GPU and the tower's
forward pass then go to a stream of their own, and fill what the Q-Former's many small kernels,
forward, backward and optimizer, leave of the device. On a CPU the same is computed, in turn.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from blip2_train.training.module import READY, StageModule


class Ahead:
    """Batches on the device, with `image_tokens` of the frozen tower in place of their images.

    Args:
        batches: of this rank, on the host.
        module: whose tower it is; already on its device when batches are asked for.
    """

    def __init__(self, batches: Iterable[dict[str, Any]], module: StageModule) -> None:
        self.batches = batches
        self.module = module

    def __iter__(self) -> Iterator[dict[str, Any]]:
        device = self.module.device
        if device.type != "cuda":
            yield from (self._seen(batch, device) for batch in self.batches)
            return
        stream = torch.cuda.Stream(device)
        for batch in self.batches:
            # after all that was asked of the device before this step, so that the tower is never
            # further ahead than a batch; that step itself is asked for only afterwards
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                seen = self._seen(batch, device)
                ready = torch.cuda.Event()
                ready.record(stream)
            yield {**seen, READY: ready}

    def _seen(self, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
        return self.module.see(to_device(batch, device))


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch whose tensors are on their way to the device; from pinned memory, nobody waits."""
    move = functools.partial(Tensor.to, device=device, non_blocking=True)
    moved: dict[str, Any] = apply_to_collection(batch, Tensor, move)
    return moved
