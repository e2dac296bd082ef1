"""The benchmark of a stage-1 step, and the textbook step that it measures against.

Proven: both give the same losses and gradients; the textbook step does the reference's arithmetic
and keeps what it keeps, no more; ours does less and keeps less; neither is timed here.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import loss_config, tiny_batch, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from blip2_train import benchmark
from blip2_train.benchmarks import textbook
from blip2_train.benchmarks.stage1 import PRESETS, Bench
from blip2_train.benchmarks.textbook import textbook_step
from blip2_train.config import to_plain
from blip2_train.distributed import World
from blip2_train.models.counting import saved_bytes
from blip2_train.models.qformer import QFormer
from blip2_train.models.stage1 import Blip2Stage1
from blip2_train.prepare import main as prepare
from blip2_train.train import compose
from blip2_train.training.objectives import draw_uniform, stage1_step

TINY = [
    "vision.name=test_vit", "vision.image_size=32", "qformer.hidden_size=32",
    "qformer.num_layers=2", "qformer.num_heads=2", "qformer.intermediate_size=64",
    "qformer.num_query_tokens=4", "text.vocab_size=99",
]  # fmt: skip


@pytest.mark.parametrize("ids", [None, [0, 1, 0, 2, 1, 3]])
def test_textbook_and_ours_agree(ids: list[int] | None) -> None:
    model, batch = tiny_model().double(), tiny_batch(6, ids=ids)
    uniform = draw_uniform(0, 0, 0, 6, World())
    found = []
    for function in (stage1_step, textbook_step):
        model.zero_grad()
        out = function(model, batch["image_embeds"], batch, loss_config(), uniform=uniform)
        out["loss"].backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((out, gradients))
    (ours, our_gradients), (theirs, their_gradients) = found
    for name in ("loss", "loss_itc", "loss_itm", "loss_lm"):
        assert ours[name].item() == pytest.approx(theirs[name].item(), abs=1e-6), name
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_textbook_does_the_references_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """240.5 GFLOP a sample, forward and backward, at ViT-g's shapes and 32 tokens of text."""
    monkeypatch.setattr(textbook, "_draw", lambda sim, same, uniform: [0] * len(sim))
    with FakeTensorMode():
        qformer = QFormer(vocab_size=30523, vision_width=1408)
        model = Blip2Stage1(nn.Identity(), qformer, dec_token_id=30522, end_token_id=102)  # type: ignore[arg-type]
        ids = torch.ones(2, 32, dtype=torch.int64)
        batch = {"input_ids": ids, "attention_mask": ids, "image_id": torch.arange(2)}
        with FlopCounterMode(display=False) as counter:
            textbook_step(
                model.eval(), torch.ones(2, 257, 1408), batch, loss_config(), torch.ones(2, 2)
            )["loss"].backward()
    assert counter.get_total_flops() / 2 == pytest.approx(240.5e9, rel=0.005)


def test_what_is_kept_and_computed() -> None:
    """The reference keeps 712 MiB at the shapes of `small`."""
    cfg = to_plain(compose(["experiment=stage1_vitg", *PRESETS["small"].overrides,
                            "qformer.init=random", "vision.weights=random"]))  # fmt: skip
    bench = Bench(cfg, 16, torch.device("cpu"))
    batch = bench.made_up(16, seed=0)
    features = torch.randn(16, 257, 352)
    kept = {
        side: saved_bytes(lambda s=side: bench.losses(s, features, batch), bench.model.parameters())
        for side in ("ours", "textbook")
    }
    assert kept["textbook"] / 2**20 == pytest.approx(712, rel=0.03)
    assert kept["ours"] < 0.45 * kept["textbook"]
    flops = {side: bench.flops(side)["qformer"] for side in kept}
    assert flops["ours"] < 0.62 * flops["textbook"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "stage1.json"
    words = ["stage1", "--batch", "3", "--rounds", "2", "--device", "cpu", *TINY]
    assert benchmark.main([*words, "--json", str(out)]) == 0
    (record,) = json.loads(out.read_text())
    assert record["name"] == "stage1 small" and record["equal"] is True
    assert record["overrides"][-len(TINY) :] == TINY
    for side in ("ours", "baseline"):
        values: dict[str, Any] = record[side]
        assert values["seconds"].keys() == {"tower", "forward", "backward", "optimizer"}
        assert values["cpu_seconds"].keys() == values["seconds"].keys()
        assert all(seconds > 0 for seconds in values["seconds"].values())
        assert values["samples_per_second"] < values["samples_per_second_from_features"]
        assert values["matmul_ceiling_tflops"] > 0 and values["share_of_ceiling"] > 0
    assert [record[side]["host_waits"] for side in ("ours", "baseline")] == [0, 2 * 3]
    speeds = [record[side]["samples_per_second"] for side in ("ours", "baseline")]
    assert record["speedup"] == pytest.approx(speeds[0] / speeds[1])
    kept = [record[side]["saved_mib"] for side in ("ours", "baseline")]
    assert record["memory_ratio"] == pytest.approx(kept[0] / kept[1])
    parts = {"image", "queries, text, captions", "contrast", "negatives", "words", "matching"}
    assert record["parts"].keys() == parts
    fed = record["in_a_row"]
    assert fed["from"] == "memory"
    for name in ("plain", "overlap"):
        assert fed[name]["samples_per_second"] > 0 and 0 <= fed[name]["data_wait_share"] < 1
    table = capsys.readouterr().out
    assert "stage1 small: 3 samples" in table and "equal: losses differ by" in table


@pytest.mark.parametrize("features", ["computed", "cached"])
def test_steps_fed_from_shards(
    features: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tower = ["vision=tiny_random", "vision.name=test_vit", "vision.image_size=32"]
    experiment = ["experiment=stage1_vitg", *tower]
    assert prepare(["features", str(shards), *experiment, "--workers", "1"]) == 0
    out = tmp_path / "stage1.json"
    words = ["stage1", "--preset", "vitg", "--batch", "6", "--rounds", "1", "--device", "cpu"]
    data = [
        f"data.features={features}", "data=synthetic", f"text.tokenizer={shards / 'tokenizer'}",
        f"data.sources.synthetic.shards={shards}", "data.num_workers=0", "data.crop_scale=null",
        "data.flip=0", "text.vocab_size=null", "trainer.precision=32-true",
    ]  # fmt: skip
    given = [*words, "--loader", "--json", str(out), *TINY[2:-1], *tower, *data]
    assert benchmark.main(given) == 0
    (record,) = json.loads(out.read_text())
    assert record["equal"] is True and record["in_a_row"]["from"] == "loader"
    assert record["in_a_row"]["overlap"]["samples_per_second"] > 0
    assert (record["ours"]["gflop_per_sample"]["tower"] > 0) is (features == "computed")
    assert "fed from loader" in capsys.readouterr().out
    missing = [word.replace(str(shards), "/nowhere") for word in given]
    assert benchmark.main(missing) == 2
    assert "there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["qformer.hidden_siez=3"], "qformer.hidden_siez"),
        (["vision.name=no_such_tower"], "no_such_tower is not a timm model"),
        (["nonsense"], "nonsense"),
        (["vision.trainable=true"], "set vision.trainable=false"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert benchmark.main(["stage1", "--device", "cpu", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error
