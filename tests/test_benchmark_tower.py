"""The benchmark of the frozen tower.

Proven: both sides have the same weights and give the same features, the reference's with attention
multiplied out; the arithmetic is the tower's; nothing is timed here.
"""

import json
from pathlib import Path

import pytest
import torch

from blip2_train import benchmark
from blip2_train.benchmarks.tower import PRESETS, Bench

TINY = ["vision.name=vit_tiny_patch16_224", "vision.image_size=32", "+vision.options.depth=3"]
PLAIN = [*TINY, "+vision.options.embed_dim=64", "+vision.options.num_heads=2"]


def tiny_bench() -> Bench:
    cfg = PRESETS["vitg"].compose([*PLAIN, "vision.dtype=float32", "vision.weights=random"])
    return Bench(cfg, 3, torch.device("cpu"))


def test_both_sides_are_the_same_tower() -> None:
    bench = tiny_bench()
    ours, theirs = (tower.state_dict() for tower in bench.towers.values())
    assert all(value.equal(theirs[name]) for name, value in ours.items())
    images = bench.images(3, seed=0)
    torch.testing.assert_close(bench.features("ours", images), bench.features("textbook", images))
    assert bench.cosine()["least"] == pytest.approx(1, abs=1e-6)


def test_only_the_reference_multiplies_attention_out() -> None:
    bench, seen = tiny_bench(), {}
    images = bench.images(2, seed=0)
    for side in ("ours", "textbook"):
        with torch.profiler.profile() as trace:
            bench.features(side, images)
        seen[side] = {event.key for event in trace.key_averages()}
    assert "aten::scaled_dot_product_attention" in seen["ours"] - seen["textbook"]
    assert "aten::softmax" in seen["textbook"]


def test_arithmetic_by_hand() -> None:
    bench = tiny_bench()
    P, D = 5, 64  # class token and 2 x 2 patches
    block = P * (4 * D * D + 8 * D * D) + 2 * P * P * D
    wanted = 4 * 3 * 16 * 16 * D + 2 * block  # two of the three blocks are read
    summary = bench.measure(rounds=1)["textbook"]
    assert summary["gflop_per_image"] * 1e9 == pytest.approx(2 * wanted)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "tower.json"
    words = ["tower", "--preset", "vitg", "--batch", "2", "--rounds", "2", "--device", "cpu"]
    assert benchmark.main([*words, *PLAIN, "--json", str(out)]) == 0
    (record,) = json.loads(out.read_text())
    assert record["name"] == "tower vitg" and record["shapes"]["tower"] == "bfloat16"
    assert record["cosine"]["least"] > 0.99
    for side in ("ours", "baseline"):
        values = record[side]
        assert values["images_per_second"] == pytest.approx(2 / values["seconds"])
        assert values["cpu_seconds"] > 0 and values["share_of_ceiling"] > 0
        assert values["peak_memory_mib"] is None
    speeds = [record[side]["images_per_second"] for side in ("ours", "baseline")]
    assert record["equal"] is True
    assert record["speedup"] == pytest.approx(speeds[0] / speeds[1])
    table = capsys.readouterr().out
    assert "tower vitg: 2 images" in table and "cosine of both sides' features" in table


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vision.namez=x"], "vision.namez"),
        (["vision.name=no_such"], "no_such is not a timm model"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert benchmark.main(["tower", "--device", "cpu", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error
