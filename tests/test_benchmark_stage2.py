"""The benchmark of a stage-2 step, and the textbook step that it measures against.

Proven: both give the same losses and gradients, for decoder-only models and encoder-decoders; the
textbook step does the reference's arithmetic, counted by hand, and no more; ours does less and
keeps less; presets have the published sizes, and their weights are drawn where they are used;
nothing is timed here.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from language_steps import OPT, T5, VOCAB, N, T, stage2, texts
from tiny import PATCHES, WIDTH
from torch import nn

from blip2_train import benchmark
from blip2_train.benchmarks import stage1, tower
from blip2_train.benchmarks import stage2 as subject
from blip2_train.benchmarks.step import count_flops
from blip2_train.benchmarks.textbook_stage2 import textbook_stage2_step
from blip2_train.distributed import World
from blip2_train.models.counting import saved_bytes
from blip2_train.models.freezing import count_parameters
from blip2_train.models.language import LanguageModel
from blip2_train.models.linear import Linear
from blip2_train.training.stage2 import stage2_step

TINY = [
    "vision.name=test_vit", "vision.image_size=32", "qformer.hidden_size=32",
    "qformer.num_layers=2", "qformer.num_heads=2", "qformer.intermediate_size=64",
    "qformer.num_query_tokens=4",
]  # fmt: skip
CONFIGS = {"small": OPT, "small_t5": T5}


def tiny_words(preset: str) -> list[str]:
    sizes = {k: v for k, v in CONFIGS[preset].items() if k != "max_position_embeddings"}
    return [*TINY, *(f"language_model.config.{key}={value}" for key, value in sizes.items())]


@pytest.mark.parametrize("config", [OPT, T5], ids=lambda c: c["model_type"])
def test_textbook_and_ours_agree(config: dict[str, Any]) -> None:
    model, batch = stage2(config), texts(slice(0, N), encoder=config is T5)
    embeds = torch.randn(N, PATCHES, WIDTH, dtype=torch.float64)
    lm = model.language_model.lm
    kinds = [type(module) for module in lm.modules()]
    assert Linear in kinds and nn.Linear not in kinds
    found = []
    for side in ("ours", "textbook"):
        model.zero_grad()
        if side == "ours":
            out = stage2_step(model, embeds, batch, "global", World())
        else:
            out = textbook_stage2_step(model, embeds, batch)
        out["loss"].backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((out["loss"].item(), gradients))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    # the textbook step leaves the model as it was
    assert lm.config._attn_implementation == "sdpa"
    assert [type(module) for module in lm.modules()] == kinds


def test_textbook_does_the_references_arithmetic() -> None:
    """Every product at every position, written out for the sizes of `language_steps`."""
    model, batch = stage2(OPT), texts(slice(0, N), encoder=False)
    embeds = torch.randn(N, PATCHES, WIDTH, dtype=torch.float64)
    Q, D, F, V, layers = 4, 16, 24, VOCAB, 2
    L = Q + T  # queries and text, padded to the longest
    qformer = layers * (Q * (4 * D * D + 2 * D * F) + 2 * Q * Q * D)
    qformer += Q * 2 * D * D + 2 * PATCHES * WIDTH * D + 2 * Q * PATCHES * D  # one block looks
    qformer += Q * D * 16  # the projection
    linear = layers * L * (4 * D * D + 2 * D * F) + L * D * V
    attention = layers * 2 * L * L * D
    # both factors of a product get a gradient, but not a weight that is frozen
    wanted = 3 * qformer + 2 * linear + 3 * attention
    flops = count_flops(lambda: textbook_stage2_step(model, embeds, batch)["loss"].backward())
    assert flops == 2 * N * wanted


@pytest.mark.parametrize("preset", ["small", "small_t5"])
def test_what_is_kept_and_computed(preset: str) -> None:
    found = subject.PRESETS[preset]
    bench = subject.Bench(found.compose([*subject.FIXED]), 16, torch.device("cpu"))
    batch = bench.made_up(16, seed=0)
    features = torch.randn(16, 257, 352)
    kept = {
        side: saved_bytes(lambda s=side: bench.losses(s, features, batch), bench.model.parameters())
        for side in ("ours", "textbook")
    }
    assert kept["ours"] < (0.9 if preset == "small" else 0.95) * kept["textbook"]
    flops = {side: bench.flops(side) for side in kept}
    assert flops["ours"].keys() == {"tower", "qformer", "language model"}
    assert flops["ours"]["tower"] == flops["textbook"]["tower"] > 0
    # texts of similar length are read together, and the vocabulary only where there is a target
    assert flops["ours"]["language model"] < 0.97 * flops["textbook"]["language model"]
    # keys and values of the image have no gradient to `ln_vision`
    assert flops["ours"]["qformer"] < 0.9 * flops["textbook"]["qformer"]


def test_each_phase_ends_once() -> None:
    words = [*tiny_words("small"), *subject.FIXED]
    bench = subject.Bench(subject.PRESETS["small"].compose(words), 16, torch.device("cpu"))
    batch = bench.made_up(16, seed=0)
    assert len(batch["parts"]) == 2
    phases: list[str] = []
    for side in ("ours", "textbook"):
        bench.losses(side, bench.features(side, batch), batch, phases.append)
    assert phases == 2 * ["qformer", "language model"]


@pytest.mark.parametrize("preset", ["small", "small_t5"])
def test_command(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "stage2.json"
    words = ["stage2", "--preset", preset, "--batch", "3", "--rounds", "2", "--device", "cpu"]
    overrides = tiny_words(preset)
    assert benchmark.main([*words, *overrides, "--json", str(out)]) == 0
    (record,) = json.loads(out.read_text())
    assert record["name"] == f"stage2 {preset}" and record["equal"] is True
    assert record["overrides"][-len(overrides) :] == overrides
    assert record["shapes"]["language_model"] == CONFIGS[preset]["model_type"]
    phases = {"tower", "qformer", "language model", "backward", "optimizer"}
    for side in ("ours", "baseline"):
        values: dict[str, Any] = record[side]
        assert values["seconds"].keys() == values["cpu_seconds"].keys() == phases
        assert all(seconds > 0 for seconds in values["seconds"].values())
        assert values["samples_per_second"] < values["samples_per_second_from_features"]
        assert values["matmul_ceiling_tflops"] > 0 and values["share_of_ceiling"] > 0
    assert record["ours"]["host_waits"] == 0
    speeds = [record[side]["samples_per_second"] for side in ("ours", "baseline")]
    assert record["speedup"] == pytest.approx(speeds[0] / speeds[1])
    table = capsys.readouterr().out
    assert f"stage2 {preset}: 3 samples" in table and "equal: losses differ by" in table


def test_a_model_in_half_precision_is_compared_in_float32() -> None:
    words = [*tiny_words("small"), "language_model.dtype=bfloat16", *subject.FIXED]
    bench = subject.Bench(subject.PRESETS["small"].compose(words), 3, torch.device("cpu"))
    model = bench.model.language_model
    assert isinstance(model, subject.MadeUpLanguageModel) and model.dtype == torch.bfloat16
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = bench.compare()
    assert found["equal"] and found["largest_difference"]["gradient"] < 1e-3
    after = model.state_dict()
    assert all(value.equal(after[name]) for name, value in before.items())
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("preset", "parameters"), [("vitg_opt2_7b", 2_651_596_800), ("vitg_flant5xl", 2_849_757_184)]
)
def test_presets_have_the_published_sizes(preset: str, parameters: int) -> None:
    cfg = subject.PRESETS[preset].compose([], *subject.FIXED)
    assert cfg["language_model"]["weights"] == "random"
    with torch.device("meta"):
        model = LanguageModel(
            config=cfg["language_model"]["config"], weights="random", dtype="bfloat16"
        )
    assert count_parameters(model.parameters(), trainable=False) == parameters


def test_presets_are_offered() -> None:
    modules = {"stage1": stage1, "stage2": subject, "tower": tower}
    assert {name: set(presets) for name, (_, presets) in benchmark.MODELS.items()} == {
        name: set(module.PRESETS) for name, module in modules.items()
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["language_model.weightz=random"], "language_model.weightz"),
        (["language_model.config={model_type: nothing}"], "nothing is unknown to transformers"),
        (["text.prefix=random_split"], "text.prefix=random_split splits a caption"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert benchmark.main(["stage2", "--device", "cpu", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error
