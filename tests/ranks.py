"""Runs a function on several real gloo processes and gives back what each returned."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import forked
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Numbers of ranks, and of loader workers on each, that nothing may depend on.
LAYOUTS = [(1, 0), (1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (4, 1), (8, 2)]


def run_ranks(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """`function(*args)` on `size` processes of one group; what each returned, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        everything = (function, size, folder, args, dict(os.environ))
        method = forked.SERVER.get_start_method()
        mp.start_processes(_entry, args=everything, nprocs=size, start_method=method)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]


def _entry(
    rank: int,
    function: Callable[..., Any],
    size: int,
    folder: str,
    args: tuple,
    environ: dict[str, str],
) -> None:
    forked.begin(environ | {"GLOO_SOCKET_IFNAME": "lo"})
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=120),
    )
    try:
        torch.save(function(*args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
