"""Bytes between ranks: counted as they are sent, measured by a benchmark, logged by runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import train
from ranks import run_ranks
from tiny import tiny_run
from whole_runs import rows

from blip2_train import benchmark
from blip2_train.distributed import (
    all_gather,
    all_reduce_sum,
    current_world,
    fetch_rows,
    request_rows,
    traffic,
)

# Global rows that each of three ranks wants, of four rows each.
WANTED = [[5, 5, 0, 11], [4, 5, 6, 7], [3, 3, 3, 3]]
ROW = 6 * 2  # six bfloat16 numbers


def counted() -> dict[str, Any]:
    world = current_world()
    embeds = torch.randn(4, 2, 3).bfloat16()
    request = request_rows(torch.tensor(WANTED[world.rank]), 4, world)
    before = traffic.received["gathered"]
    fetch_rows(embeds, request)
    all_gather(torch.zeros(4, 5), world)
    all_reduce_sum(torch.zeros(30), world)
    return {
        "rows": (traffic.sent["rows"], traffic.received["rows"]),
        "gathered": traffic.received["gathered"] - before,
        "summed": traffic.received["summed"],
    }


def test_what_is_counted() -> None:
    found = run_ranks(counted, 3)
    # rank 0 gets rows 5 (once) and 11; rank 1 its own; rank 2 gets row 3 of rank 0 (once)
    assert [rank["rows"] for rank in found] == [(ROW, 2 * ROW), (ROW, 0), (ROW, ROW)]
    assert all(rank["gathered"] == 2 * 4 * 5 * 4 for rank in found)
    assert all(rank["summed"] == 2 * 2 / 3 * 30 * 4 for rank in found)


def test_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "collectives.json"
    sizes = "--worlds 2 --batch 4 --tokens 9 --width 64 --steps 2"
    assert benchmark.main(["collectives", *sizes.split(), "--json", str(out)]) == 0
    measured, paper = json.loads(out.read_text())
    whole = 4 * 9 * 64 * 2
    assert measured["batch_bytes"] == whole and 0 < measured["share_of_batch"] <= 1
    assert measured["ours"]["image_rows_received"] <= measured["baseline"]["forward_received"]
    # on the wire there are headers, and what threads of gloo tell each other, too
    assert measured["ours"]["all_ranks_loopback"] >= measured["ours"]["all_ranks"]
    assert paper["baseline"]["forward_received"] == 15 * 105 * 257 * 1408 * 2
    assert paper["baseline"]["backward_received"] == 2 * 15 * 105 * 257 * 1408 * 2
    assert "16 x 105" in capsys.readouterr().out


def test_runs_log_it(shards: Path, tmp_path: Path) -> None:
    changes = {"trainer.max_steps": 4, "validation.every": "null"}
    train(tiny_run(shards, tmp_path, "run", **changes), 2)
    for row in rows(tmp_path / "run", without_speed=False):
        found = {k.split("/")[1]: float(v) for k, v in row.items() if k.startswith("received_mb/")}
        assert found.keys() == {"rows", "gathered", "summed", "gradients"}
        assert all(value > 0 for value in found.values())
        # six samples per rank of 17 tokens of 64 numbers, at most, on average over two steps
        assert found["rows"] <= 6 * 17 * 64 * 4 / 1e6
