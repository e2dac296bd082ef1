"""The benchmarks run and write what they promise; what they find is not judged here."""

import json
from pathlib import Path

import numpy as np
import pytest

from blip2_train import benchmark
from blip2_train.benchmarks import loader
from blip2_train.benchmarks.photographs import Photographer
from blip2_train.benchmarks.pipelines import PIPELINES, is_installed
from blip2_train.data.images import encode_jpeg


def test_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(loader, "ROUNDS", 1)
    out = tmp_path / "out" / "loader.json"
    options = ["--sizes", "64x48", "--images", "24", "--batch", "8", "--json", str(out)]
    assert benchmark.main(["loader", *options]) == 0
    (record,) = json.loads(out.read_text())
    assert record["name"] == "loader 64x48" and record["equal"] is True
    assert record["shapes"]["images"] == 24 and record["shapes"]["batch"] == 8
    assert {"torch", "pillow", "webdataset"} <= record["versions"].keys()
    measured = {loader.OURS: record["ours"], loader.BASELINE: record["baseline"]}
    measured |= record["others"]
    assert measured.keys() == PIPELINES.keys()
    for name, values in measured.items():
        assert bool(values) == is_installed(name)
        assert not values or (values["images"] == 16 and values["cpu_ms_per_image"] > 0)
    times = [record[side]["cpu_ms_per_image"] for side in ("baseline", "ours")]
    assert record["speedup"] == pytest.approx(times[0] / times[1])
    table = capsys.readouterr().out
    assert "loader 64x48" in table and loader.BASELINE in table


@pytest.mark.parametrize(
    "options",
    [
        ["--sizes", "big"],
        ["--images", "0"],
        ["--images", "10", "--batch", "64"],
        ["--sizes", "0x5"],
    ],
)
def test_impossible_options_are_one_sentence(options: list[str], capsys) -> None:
    assert benchmark.main(["loader", *options]) == 2
    assert capsys.readouterr().err.startswith("error: --")


def test_pairs_of_one_shard() -> None:
    assert loader._same_shard_pairs([["a", "a"], ["b", "b"]]) == pytest.approx(3)
    assert loader._same_shard_pairs([["a", "b"], ["a", "b"]]) == 0
    assert loader._same_shard_pairs([["a"], ["b"]]) == 1


def test_photographs_take_the_bytes_of_photographs() -> None:
    """Bits per pixel at quality 90: 2.7 of real ones at 256 pixels, 2.2 at 375."""
    photographer = Photographer(341, 256)
    first, second = photographer.shoot(), photographer.shoot()
    assert first.size == (341, 256) and not np.array_equal(first, second)
    assert np.array_equal(first, Photographer(341, 256).shoot())
    assert 2 < 8 * len(encode_jpeg(first, 90)) / (341 * 256) < 3.5
