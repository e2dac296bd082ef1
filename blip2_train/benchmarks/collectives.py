"""Bytes between ranks in a step of stage 1: what is measured here, and what the reference needs.

Each world is so many gloo processes on this machine that run the real objective, forward and
backward, on random features; its own functions count what they send and receive. Independently of
them the kernel's counters say what went over the loopback device.

The reference (LAVIS) gathers every image map on every rank, with gradient: (n - 1) B P D numbers
arrive in the forward pass, and the backward pass sums the gradients of all n B maps over all ranks.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from rich.console import Console
from rich.table import Table
from torch import nn

from blip2_train import distributed
from blip2_train.benchmarks.machine import processor, versions
from blip2_train.data.batch import lm_targets, text_tokens
from blip2_train.distributed import World, barrier, gather_objects, ring_sum_bytes, traffic
from blip2_train.models.qformer import QFormer
from blip2_train.models.stage1 import Blip2Stage1
from blip2_train.training.objectives import LossConfig, draw_uniform, stage1_step

VOCABULARY, TEXT, QUERIES = 100, 20, 32
ELEMENT = 2  # bytes of a number of the tower's output: bfloat16
PAPER = {"ranks": 16, "batch": 105, "tokens": 257, "width": 1408}  # ViT-g, batch 1680


def run(
    worlds: Sequence[int], batch: int, tokens: int, width: int, steps: int
) -> list[dict[str, Any]]:
    """Measure and print a table.

    Args:
        worlds: numbers of processes.
        batch: samples of each rank.
        tokens: of a sample's image map.
        width: of a token.
        steps: contrastive batches that are measured.

    Returns:
        One record per world, and one for the paper's run, computed.
    """
    records = [_measure(size, batch, tokens, width, steps) for size in worlds]
    paper = _reference(*PAPER.values())
    bound = PAPER["batch"] * PAPER["tokens"] * PAPER["width"] * ELEMENT
    records.append(
        {
            "name": "collectives, the paper's run, computed",
            "shapes": PAPER,
            "ours": {"image_rows_received_at_most": bound},
            "baseline": paper,
        }
    )
    Console(width=None if sys.stdout.isatty() else 160).print(_table(records))
    return records


def _measure(size: int, batch: int, tokens: int, width: int, steps: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    torch.multiprocessing.spawn(
        _rank, (size, port, batch, tokens, width, steps, results), nprocs=size
    )
    ranks = results.get()
    whole = batch * tokens * width * ELEMENT
    received = [rank["rows received"] for rank in ranks]
    return {
        "name": f"collectives, {size} ranks",
        "device": processor(),
        "versions": versions("torch"),
        "shapes": {
            "ranks": size, "batch": batch, "tokens": tokens, "width": width, "steps": steps,
        },
        "ours": {
            "image_rows_received": max(received),
            "image_rows_received_mean": sum(received) / size,
            "image_rows_sent": max(rank["rows sent"] for rank in ranks),
            "gathered_received": max(rank["gathered received"] for rank in ranks),
            "summed_received": max(rank["summed received"] for rank in ranks),
            "all_ranks": sum(rank["received"] for rank in ranks),
            "all_ranks_loopback": ranks[0]["loopback"],
        },
        "baseline": _reference(size, batch, tokens, width),
        "batch_bytes": whole,
        "share_of_batch": max(received) / whole,
    }  # fmt: skip


def _reference(ranks: int, batch: int, tokens: int, width: int) -> dict[str, float]:
    own = batch * tokens * width * ELEMENT
    return {
        "forward_received": (ranks - 1) * own,
        "backward_received": ring_sum_bytes(ranks * own, ranks),
    }


def _rank(
    rank: int, size: int, port: int, batch: int, tokens: int, width: int, steps: int, results: Any
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    world = distributed.start(rank, rank, size, "localhost", port, cuda=False, timeout=600)
    torch.manual_seed(0)
    qformer = QFormer(
        vocab_size=VOCABULARY, vision_width=width, hidden_size=32, num_layers=2, num_heads=2,
        intermediate_size=32, num_query_tokens=QUERIES, max_positions=TEXT, dropout=0.0,
    )  # fmt: skip
    model = Blip2Stage1(nn.Identity(), qformer, dec_token_id=VOCABULARY - 1, end_token_id=3)  # type: ignore[arg-type]
    totals = {"rows received": 0.0, "rows sent": 0.0, "gathered received": 0.0}
    totals |= {"summed received": 0.0, "received": 0.0, "loopback": 0.0}
    for step in range(steps):
        embeds, text = _random_batch(batch, tokens, width, seed=step * size + rank)
        _step(model, embeds, text, step, world)  # before the clock: buffers, connections
        barrier(world)
        time.sleep(0.1)  # until the kernel has counted the barrier
        before, wire = _counters(), _loopback()
        _step(model, embeds, text, step, world)
        after = _counters()
        barrier(world)
        totals["loopback"] += (_loopback() - wire) / steps
        for name, value in after.items():
            totals[name] += (value - before[name]) / steps
    ranks = gather_objects(totals, world)
    if rank == 0:
        results.put(ranks)
    distributed.stop()


def _random_batch(batch: int, tokens: int, width: int, seed: int) -> tuple[torch.Tensor, dict]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY - 1, (batch, TEXT), generator=generator)
    mask = torch.ones_like(ids)
    embeds = torch.randn(batch, tokens, width, generator=generator).bfloat16()
    image_id = seed * batch + torch.arange(batch)
    text = {"input_ids": ids, "attention_mask": mask, "image_id": image_id}
    index = {"text_index": text_tokens(mask), "lm_index": lm_targets(mask)}
    return embeds, text | index | {"text_length": TEXT}


def _step(model: Any, embeds: torch.Tensor, text: dict, step: int, world: World) -> None:
    config = LossConfig({"itc": 1.0, "itm": 1.0, "lm": 1.0})
    uniform = draw_uniform(0, step, 0, len(embeds), world)
    with torch.autocast("cpu", torch.bfloat16):
        out = stage1_step(model, embeds, text, config, uniform=uniform, world=world)
    out["loss"].backward()


def _counters() -> dict[str, float]:
    return {
        "rows received": traffic.received["rows"],
        "rows sent": traffic.sent["rows"],
        "gathered received": traffic.received["gathered"],
        "summed received": traffic.received["summed"],
        "received": traffic.received.total(),
    }


def _loopback() -> float:
    """Bytes that the loopback device has carried; NaN where the system does not say."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return float("nan")
    for line in lines:
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return float(numbers.split()[0])
    return float("nan")


def _table(records: list[dict[str, Any]]) -> Table:
    table = Table(
        title="megabytes (1e6) per contrastive batch that the rank with most receives",
        title_justify="left",
    )
    for name in ("", "batch of maps", "ours: image rows", "sent", "gathered", "summed",
                 "all ranks", "on the wire", "reference: forward", "backward"):  # fmt: skip
        table.add_column(name, justify="right" if name else "left")
    for record in records:
        ours, theirs = record["ours"], record["baseline"]
        shapes = record["shapes"]
        label = f"{shapes['ranks']} x {shapes['batch']}, {shapes['tokens']} x {shapes['width']}"
        whole = shapes["batch"] * shapes["tokens"] * shapes["width"] * ELEMENT
        rows = ours.get("image_rows_received")
        cells = [
            f"{whole / 1e6:.1f}",
            f"{rows / 1e6:.2f}" if rows is not None else f"at most {whole / 1e6:.1f}",
        ]
        for name in ("image_rows_sent", "gathered_received", "summed_received", "all_ranks",
                     "all_ranks_loopback"):  # fmt: skip
            cells.append(f"{ours[name] / 1e6:.2f}" if name in ours else "")
        for name in ("forward_received", "backward_received"):
            cells.append(f"{theirs[name] / 1e6:.1f}")
        table.add_row(label, *cells)
    return table
