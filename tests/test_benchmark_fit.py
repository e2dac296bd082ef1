"""`blip2-benchmark fit` and the estimate of memory that `--dry-run` shows too.

Proven: the estimate is what torch's allocator hands out in a real step on a processor, for every
stage, with and without recomputation, quantized weights and other ranks; more samples never take
less; what fits is found exactly; the advice fits and keeps the contrastive batch; the steps that a
GPU is measured with are those of a training. How much a GPU needs is not tested here.
"""

import contextlib
import functools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from language_steps import OPT
from ranks import run_ranks
from tiny import loss_config, tiny_batch, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from blip2_train import benchmark
from blip2_train.benchmarks import batches, fit
from blip2_train.benchmarks.trial import Trial
from blip2_train.config import BatchPlan, batch_plan, plan_batch
from blip2_train.distributed import World, current_world
from blip2_train.errors import UserError
from blip2_train.models.counting import LiveBytes, saved_bytes, stored_bytes
from blip2_train.models.language import LanguageModel
from blip2_train.models.lm_sizes import PACKED, quantize_shapes
from blip2_train.training.fit import STAGES
from blip2_train.training.memory import (
    CHECKPOINTED,
    GB,
    Memory,
    Sketch,
    fused_attention,
    made_up_loss,
    recomputable,
    recompute,
)
from blip2_train.training.objectives import draw_uniform, stage1_step

TOWER = [
    "vision=tiny_random", "vision.name=test_vit", "vision.image_size=32", "qformer.hidden_size=64",
    "qformer.num_layers=2", "qformer.num_heads=2", "qformer.intermediate_size=256",
    "qformer.num_query_tokens=8", "qformer.init=random",
]  # fmt: skip
STAGE1 = ["experiment=stage1_vitg", "text.vocab_size=500", "batch.size=16", *TOWER]
LEARNS = ["vision.trainable=true"]
TUNED = [*STAGE1, *LEARNS]
SIZES = {
    "opt": "{model_type: opt, hidden_size: 64, word_embed_proj_dim: 64, num_hidden_layers: 2, "
    "num_attention_heads: 2, ffn_dim: 256, max_position_embeddings: 64, vocab_size: 500}",
    "t5": "{model_type: t5, d_model: 64, d_kv: 16, d_ff: 128, num_layers: 2, num_heads: 4, "
    "feed_forward_proj: gated-gelu, tie_word_embeddings: false, vocab_size: 500}",
}
CLIP = [
    "experiment=clip_flickr8k_tiny", "text.vocab_size=500", "image_encoder.name=test_vit",
    "image_encoder.image_size=32", "batch.size=16",
]  # fmt: skip
# large enough that the states of random generators, 5 kB for each checkpoint, do not matter
PARTS = ["batch.size=64", "batch.accumulate=2", "loss.itc.cache=true"]
LM = ["experiment=lm_flickr8k_tiny", "+causal_lm.config.vocab_size=500", "batch.size=16"]


def stage2(kind: str, *more: str) -> list[str]:
    words = ["experiment=stage2_vitg_opt2_7b", "language_model=pretrained", "batch.size=16"]
    words += ["language_model.name=null", "language_model.tokenizer=none", *TOWER]
    return [*words, f"language_model.config={SIZES[kind]}", f"kind=stage2_{kind}", *more]


def allocated(step: Any) -> int:
    """The most that torch's allocator has handed out at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    events = trace.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("words", "recomputed"),
    [
        (STAGE1, ()),
        ([*STAGE1, *PARTS], ("qformer",)),
        (TUNED, ("qformer", "vision")),
        (stage2("opt"), ("qformer", "language_model")),
        (stage2("opt", "language_model.quantization=torchao_int8"), ()),
        (stage2("t5"), ()),
        (CLIP, ("image_encoder",)),
        *(
            pytest.param(words, recomputed, marks=pytest.mark.slow)
            for words, recomputed in (
                (STAGE1, ("qformer",)),
                ([*STAGE1, *PARTS], ()),
                (TUNED, ()),
                ([*TUNED, *PARTS], ()),
                (stage2("opt", *LEARNS), ("vision",)),
                (stage2("opt"), ()),
                (stage2("t5"), ("language_model",)),
                (LM, ()),
            )
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_the_estimate_is_what_a_real_step_takes(words: list[str], recomputed: Any) -> None:
    if "torchao" in words[-1]:
        pytest.importorskip("torchao")
    cfg = fit.configuration(words, 1)
    plan, longest = batch_plan(cfg, 1), cfg["text"]["max_tokens"]
    sketch = Sketch(cfg)
    recompute(sketch.model, recomputed)
    estimate = sketch.memory(plan)

    stage = STAGES[cfg["stage"]](cfg)
    model = stage.build_model(shapes_only=True)
    module = stage.build_module(model, plan).train()
    recompute(model, recomputed)
    names = {name for name, p in sketch.model.named_parameters() if p.requires_grad}
    trained = [p for name, p in model.named_parameters() if name in names]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)

    def loss() -> torch.Tensor:
        return made_up_loss(module, plan, cfg["trainer"]["precision"], longest)

    with fused_attention():  # a processor's attention with dropout keeps what no GPU's does
        loss().backward()
        taken = allocated(lambda: loss().backward())
        kept = saved_bytes(loss, [*model.parameters(), *model.buffers()])
    step = max(estimate.tower, estimate.activations + estimate.logits)
    assert step == pytest.approx(taken, rel=0.03)
    assert kept < step
    assert estimate.weights == stored_bytes([*model.parameters(), *model.buffers()])
    assert estimate.gradients == sum(p.nbytes for p in trained)
    assert estimate.optimizer == 2 * estimate.gradients


@pytest.mark.parametrize("words", [STAGE1, stage2("opt")], ids=["stage1", "stage2"])
def test_more_samples_take_more_and_recomputation_less(words: list[str]) -> None:
    sketch = Sketch(fit.configuration(words, 4))
    found = []
    for recomputed in ((), CHECKPOINTED):
        recompute(sketch.model, recomputed)
        found.append([sketch.memory(plan_batch(4 * n, 1, 4)).total for n in (1, 2, 40)])
    assert all(sizes == sorted(sizes) for sizes in found)
    assert all(lean <= plain for plain, lean in zip(*found, strict=True))


def test_parts_and_other_ranks_count() -> None:
    sketch = Sketch(fit.configuration([*STAGE1, "loss.itc.cache=true"], 1))
    whole, parts = (sketch.memory(plan_batch(64, n, 1, cache=True)).activations for n in (1, 4))
    assert parts < 0.5 * whole
    assert sketch.memory(plan_batch(64 * 8, 1, 8)).activations > 1.02 * whole  # 448 elsewhere


def test_a_tower_that_runs_ahead_counts_on_top() -> None:
    words = [[*STAGE1, f"trainer.overlap={overlap}"] for overlap in ("false", "true")]
    plain, ahead = (Sketch(fit.configuration(w, 1)).memory(plan_batch(8, 1, 1)) for w in words)
    smaller = min(plain.tower, plain.activations + plain.logits)
    assert smaller > 0 and ahead.total - plain.total == pytest.approx(1.05 * smaller)


def peak_of_step() -> int:
    """Of a step of all ranks; alone, of two imagined ones."""
    world, B = current_world(), 12
    world = World(0, 2, imagined=True) if world.size == 1 else world
    model, batch = tiny_model().double(), tiny_batch(B, seed=world.rank)
    batch["image_id"] = batch["image_id"] + B * world.rank
    batch["text_length"] = 9
    uniform = draw_uniform(0, 0, 0, B, world)
    with LiveBytes() as live:
        out = stage1_step(
            model, batch["image_embeds"], batch, loss_config("full"), uniform=uniform, world=world
        )
        out["loss"].backward()
    assert out["loss"].isfinite()
    return live.peak.total()


def test_imagined_ranks_take_what_real_ones_take() -> None:
    imagined = peak_of_step()
    for real in run_ranks(peak_of_step, 2):  # which may draw an image twice
        assert real == pytest.approx(imagined, rel=0.05)


def test_packed_weights() -> None:
    weights = 2 * (4 * 16 * 16 + 2 * 16 * 24)  # of both blocks' linear layers
    for quantization, size in PACKED.items():
        with torch.device("meta"):
            lm = LanguageModel(config=OPT, weights="random").lm
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert quantize_shapes(lm, quantization) == weights * (2 - size)


@pytest.mark.parametrize("memory", [0.5, 1, 16, 16.4, 333, 1e4])
@pytest.mark.parametrize("start", [1, 7, 200])
def test_the_largest_batch_is_found(memory: float, start: int) -> None:
    for needs in (
        lambda n: n,
        lambda n: n + 0.01 * n**1.3,
        lambda n: math.sqrt(n),
        lambda n: n + 5 * (n > 20),
        lambda n: n if n <= memory else math.inf,  # out of memory
    ):
        known = functools.cache(needs)
        largest = batches.largest_batch(known, memory, start)
        assert largest == 0 or needs(largest) <= memory
        assert needs(largest + 1) > memory
        assert known.cache_info().misses < 80


def run(words: list[str], tmp_path: Path) -> dict[str, Any]:
    out = tmp_path / "fit.json"
    assert benchmark.main(["fit", *words, "--device", "cpu", "--json", str(out)]) == 0
    return json.loads(out.read_text())[0]


def linear(sketch: Sketch, plan: BatchPlan) -> Memory:
    """In place of a trace, which the tests above are about: 1 MB a sample, less if recomputed."""
    parts = [getattr(sketch.model, name) for name in recomputable(sketch.model)]
    lean = [part for part in parts if part.gradient_checkpointing]
    return replace(sketch.empty(), activations=1e6 * plan.at_a_time / (1 + len(lean)))


def test_command(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sketch, "memory", linear)
    record = run([*stage2("opt"), "--memory", "1.05GB", "--world", "2"], tmp_path)
    said = capsys.readouterr().out
    assert "an estimate, not measured" in said and "qformer" in said
    assert record["measured"] is False and record["memory_gb"] == 1.05
    parts = CHECKPOINTED[:2]
    choices = {tuple(row["recomputed"]): row for row in record["choices"]}
    assert set(choices) == {(), *((name,) for name in parts), parts}
    extra = [row["extra"] for row in record["choices"]]
    assert extra == sorted(extra) and extra[0] == 0 and extra[-1] > 0.1
    fixed = sum(choices[()]["gb"][name] for name in ("weights", "gradients", "optimizer"))
    plain = math.floor(1e3 * (0.05 / 1.05 - fixed))
    assert choices[()]["largest"] == plain
    assert choices[parts]["largest"] // 3 == plain
    assert plain > 8 and record["recommended"] == [] and "recommended: no override" in said


def test_command_asks_for_recomputation(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sketch, "memory", linear)
    record = run([*STAGE1, "batch.size=64", "--memory", "1.05G", "--world", "1"], tmp_path)
    assert record["recommended"] == ["qformer.gradient_checkpointing=true"]
    assert "recommended: qformer.gradient_checkpointing=true\n" in capsys.readouterr().out


def test_advice_fits_and_keeps_the_contrastive_batch() -> None:
    cfg = fit.configuration([*STAGE1, "batch.size=96"], 2)

    def needs(plan: BatchPlan, recomputed: batches.Parts) -> float:
        features = plan.per_device if plan.parts > 1 else 0
        return features + plan.at_a_time * (4 if recomputed else 10)

    def advice(memory: float, **changes: Any) -> batches.Advice:
        found = [
            batches.Choice(parts, batches.largest_of(needs, parts, memory, 2, 48), None, len(parts))  # type: ignore[arg-type]
            for parts in ((), ("qformer",))
        ]
        return batches.advise(cfg | changes, found, needs, memory, 2)

    lean = "qformer.gradient_checkpointing=true"
    assert advice(480).overrides == []
    assert advice(479).overrides == advice(192).overrides == [lean]
    parts = advice(191)
    assert parts.overrides == ["batch.accumulate=4", "loss.itc.cache=true"]
    assert parts.plan.contrastive == 96 and parts.plan.at_a_time == 12
    assert "would compare 24 samples in place of 96" in batches.describe(cfg, parts)[-1]
    assert advice(48 + 10 * 12 - 1).overrides[0] == "batch.accumulate=6"
    with pytest.raises(UserError, match=r"batch\.size=96 cannot be cut"):
        advice(48)
    alone = {"loss": cfg["loss"] | {"weights": {"itc": 0, "itm": 0, "lm": 1}}}
    assert advice(48, **alone).overrides == ["batch.accumulate=4", lean]


def test_advice_is_relative_to_what_is_set() -> None:
    cfg = fit.configuration([*STAGE1, "qformer.gradient_checkpointing=true"], 1)
    assert batches.switches(cfg, ("qformer",)) == []
    assert batches.switches(cfg, ()) == ["qformer.gradient_checkpointing=false"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*STAGE1, "--memory", "80"], "80 is no memory"),
        ([*STAGE1, "--memory", "0GB"], "0GB is no memory"),
        (STAGE1, "--memory is missing"),
        ([*STAGE1, "--memory", "1GB"], "is too little: weights take 0.0 GB"),
        ([*STAGE1, "--memory", "80GB", "--world", "7"], "set batch.size=14 or 21"),
        ([*STAGE1, "qformer.layers=3", "--memory", "80GB"], "unknown key qformer.layers"),
        (["vision=demo", "--memory", "80GB"], "experiment=NAME"),
        (["experiment=stage2_vitg_flant5xl", "--memory", "8GB"], "language_model.quantization="),
        (["experiment=stage1_vitg", "--memory", "80GB", "--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with contextlib.suppress(SystemExit):  # of argparse
        assert benchmark.main(["fit", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


@pytest.mark.parametrize("words", [STAGE1, stage2("opt")], ids=["stage1", "stage2"])
def test_a_trial_trains_what_a_training_trains(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = fit.configuration(words, 2)
    sketch = Sketch(cfg)
    trial = Trial(cfg, sketch, "cpu")
    before = {name: p.clone() for name, p in trial.model.named_parameters()}
    trial.step(plan_batch(8, 1, 2))
    trained = {name for name, p in sketch.model.named_parameters() if p.requires_grad}
    moved = {name for name, p in trial.model.named_parameters() if not p.equal(before[name])}
    # the bias of keys has no gradient but rounding
    assert moved <= trained and all(name.endswith("key.bias") for name in trained - moved)
    assert {p.dtype for p in trial.model.parameters()} == {
        p.dtype for p in sketch.model.parameters()
    }

    def step(plan: Any) -> None:
        if plan.per_device > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trial, "step", step)
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 10)
    largest = batches.largest_of(lambda plan, _: trial.needs(plan), (), 2e9, 2, 64)
    assert largest == 5


def test_a_trial_computes_as_a_training_does() -> None:
    """The tower in float8, a language model's capped logits: known from weights alone."""
    pytest.importorskip("torchao")
    tower = ["vision.precision=float8", "vision.dtype=bfloat16"]
    cfg = fit.configuration([*stage2("opt"), *tower, "trainer.precision=32-true"], 1)
    trial = Trial(cfg, Sketch(cfg), "cpu")
    stored = {type(p.data).__name__ for p in trial.model.vision.parameters()}
    assert "Float8Tensor" in stored
    gemma = "{model_type: gemma2, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2,"
    gemma += " num_key_value_heads: 1, head_dim: 16, intermediate_size: 64, vocab_size: 99,"
    gemma += " final_logit_softcapping: 3.0}"
    capped = [w for w in stage2("opt") if not w.startswith("language_model.config")]
    cfg = fit.configuration([*capped, f"language_model.config={gemma}"], 1)
    trial = Trial(cfg, Sketch(cfg), "cpu")
    real = STAGES["stage2"](cfg).build_model(shapes_only=True).language_model
    ours = trial.model.language_model
    assert ours._head_form == real._head_form == "rows"
    assert ours._mask_form == real._mask_form


# -- docs/performance.md ---------------------------------------------------------------------------

DOCS = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
EXPERIMENTS = ["stage1_vitg", "stage1_vitl", "stage2_vitg_opt2_7b", "stage2_vitg_flant5xl"]


def documented() -> dict[tuple[str, int], tuple[int, int]]:
    """{(experiment, GB): largest batches without and with recomputation}."""
    section = DOCS.read_text().partition("## What fits")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", section, flags=re.MULTILINE)
    sizes = [int(n) for n in re.findall(r"(\d+) GB", section.partition("\n|---")[0])]
    found = {}
    for name, cells in rows:
        for size, cell in zip(sizes, cells.split("|"), strict=True):
            plain, _, lean = cell.strip().partition(" / ")
            found[name, size] = (int(plain), int(lean))
    return found


def check_documented(experiment: str, sizes: list[int]) -> None:
    sketch = Sketch(fit.configuration([f"experiment={experiment}"], 16))
    parts = tuple(recomputable(sketch.model))
    for size in sizes:
        for recomputed, batch in zip(((), parts), documented()[experiment, size], strict=True):
            recompute(sketch.model, recomputed)
            fits, exceeds = (
                sketch.memory(plan_batch(16 * n, 1, 16)).total for n in (batch, batch + 1)
            )
            assert fits <= size * GB < exceeds, f"{experiment}: {size} GB {recomputed}: {batch}"


def test_what_the_docs_say() -> None:
    found = documented()
    assert {name for name, _ in found} == set(EXPERIMENTS) and len(found) == 20
    check_documented("stage2_vitg_opt2_7b", [24])


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_all_that_the_docs_say(experiment: str) -> None:
    check_documented(experiment, sorted({size for _, size in documented()}))
