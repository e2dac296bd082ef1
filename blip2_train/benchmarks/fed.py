"""Steps in a row as a training takes them: how long they wait for data, and what overlap gives.

Batches come from memory, pinned where there is a GPU, or through the loader from the shards of the
configuration, be they pictures or cached features.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from rich.table import Table
from torch import Tensor

from blip2_train.config import plan_batch
from blip2_train.data.feeder import Feeder
from blip2_train.distributed import World
from blip2_train.training.feeding import (
    cached_features,
    open_sources,
    train_loader,
    train_stream,
)
from blip2_train.training.overlap import Ahead, to_device

if TYPE_CHECKING:
    from blip2_train.benchmarks.step import StepBench

WARM_UP = 2  # steps that are not measured, at least
WINDOWS = 3  # of each, in turn, where batches come from memory
PREFETCHED = 2  # batches that a loader process has ready, torch's default
DIFFERENT = 4  # batches in memory, used in turn


def check_data(bench: StepBench) -> None:
    """Refuses a configuration whose data cannot be read.

    Raises:
        UserError: it names what is missing.
    """
    sources = open_sources(bench.cfg["data"])
    cached_features(bench.cfg, sources, None)
    bench.stage.tokenizers()


def steps_in_a_row(bench: StepBench, steps: int, *, loader: bool) -> dict[str, Any]:
    """Measures our step without a pause, with the tower a batch ahead and without, in turn.

    Args:
        bench: of a stage.
        steps: that are measured; more where loader processes must first be used up.
        loader: feed them from the configuration's data.

    Returns:
        `from`, and of "plain" and "overlap" the fastest window's `samples_per_second` and
        `data_wait_share`.
    """
    found: dict[str, list[dict[str, float]]] = {"plain": [], "overlap": []}
    # what loader processes have ready at the start says nothing of how fast they are
    ahead = PREFETCHED * bench.cfg["data"]["num_workers"] if loader else 0
    warm_up, steps = max(WARM_UP, ahead + 2), max(steps, 3 * ahead)
    windows_each = 1 if loader else WINDOWS
    steps = -(-steps // windows_each)
    for _ in range(windows_each):
        for name, windows in found.items():
            batches = _loaded(bench) if loader else _in_memory(bench)
            feeder = Feeder(batches, bench.stage.text_bucket, World())
            windows.append(_measure(bench, feeder, warm_up, steps, overlap=name == "overlap"))

    def best(windows: list[dict[str, float]]) -> dict[str, float]:
        return max(windows, key=lambda window: window["samples_per_second"])

    return {
        "from": "loader" if loader else "memory",
        **{name: best(windows) for name, windows in found.items()},
    }


def _measure(
    bench: StepBench, feeder: Feeder, warm_up: int, steps: int, *, overlap: bool
) -> dict[str, float]:
    module = bench.stage.build_module(bench.model, plan_batch(bench.batch, 1, 1)).to(bench.device)
    optimizer = bench.optimizers["ours"]
    batches = iter(Ahead(feeder, module) if overlap else feeder)
    following = next(batches)
    started = waited = 0.0
    for number in range(warm_up + steps):
        if number == warm_up:
            _wait_for(bench.device)
            started, waited = time.perf_counter(), feeder.wait_seconds
        batch, following = following, next(batches)  # as Lightning: the next one before the step
        if not overlap:
            batch = to_device(batch, bench.device)
        with bench.autocast():
            loss = module.step(module.prepared(batch), number, 0, World())["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    _wait_for(bench.device)
    seconds = time.perf_counter() - started
    return {
        "samples_per_second": steps * bench.batch / seconds,
        "data_wait_share": (feeder.wait_seconds - waited) / seconds,
    }


def _in_memory(bench: StepBench) -> Iterator[dict[str, Any]]:
    """The same few made-up batches again and again."""
    batches = []
    for seed in range(DIFFERENT):
        batch = apply_to_collection(bench.made_up(bench.batch, seed), Tensor, Tensor.cpu)
        pinned = bench.device.type == "cuda"
        batches.append(apply_to_collection(batch, Tensor, Tensor.pin_memory) if pinned else batch)
    return itertools.cycle(batches)


def _loaded(bench: StepBench) -> Any:
    """Batches of the configuration's data, see `training.feeding`."""
    sources = open_sources(bench.cfg["data"])
    stream = train_stream(
        bench.cfg,
        plan_batch(bench.batch, 1, 1),
        sources,
        bench.stage.collate(),
        World(),
        {},
        bench.stage.image_size(bench.model),
        cached_features(bench.cfg, sources, None),
    )
    return train_loader(stream, bench.cfg, bench.device.type == "cuda")


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fed_table(found: dict[str, Any]) -> Table:
    """What `steps_in_a_row` found, to look at."""
    out = Table(title=f"ours, steps in a row, fed from {found['from']}", title_justify="left")
    for column in ("", "samples per second", "waits for data"):
        out.add_column(column, justify="right" if column else "left")
    for name in ("plain", "overlap"):
        side = found[name]
        rate, waits = f"{side['samples_per_second']:.1f}", f"{side['data_wait_share']:.1%}"
        out.add_row(f"trainer.overlap={str(name == 'overlap').lower()}", rate, waits)
    return out
