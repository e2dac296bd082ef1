"""The whole command for stage 2, clip and lm on rendered shards.

Proven for each: a run with dropout that is killed by SIGKILL and started again ends with the exact
weights, optimizer state and metrics of an undisturbed one, on 1 and on 3 processes (half of these
in `make test-all` alone); the number of processes hardly changes a run; what `clip` and `lm`
leave is what stage 1 and stage 2 load; frozen parts stay bit for bit as they were and are not in
checkpoints; OPT, T5, Llama and Qwen, int8 and checkpointing; wrong input ends with one sentence.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import train
from tiny import tiny_run, tiny_stage_runs, train_in_process
from whole_runs import assert_same_end, kill_in_the_middle, last_checkpoint, rows

STAGES = ("stage2", "clip", "lm")
DROPOUT = {
    "stage2": ["qformer.dropout=0.1"],
    "clip": [],
    "lm": ["causal_lm.config.dropout=0.1"],
}
LANGUAGE_MODELS = {
    "opt": "{model_type: opt, hidden_size: 32, word_embed_proj_dim: 32, num_hidden_layers: 2, "
    "num_attention_heads: 2, ffn_dim: 64, max_position_embeddings: 64, dropout: 0.1}",
    "t5": "{model_type: t5, d_model: 32, d_kv: 16, d_ff: 64, num_layers: 2, num_heads: 2, "
    "feed_forward_proj: gated-gelu, tie_word_embeddings: false, dropout_rate: 0.1}",
    "llama": "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 2, num_key_value_heads: 1, attention_dropout: 0.1}",
    "qwen": "{model_type: qwen2, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 2, num_key_value_heads: 1, attention_dropout: 0.1}",
}


def model_of(name: str) -> dict[str, str]:
    return {"language_model.config": LANGUAGE_MODELS[name]}


def without(overrides: list[str], key: str) -> list[str]:
    return [override for override in overrides if not override.startswith(key)]


@pytest.fixture(scope="session")
def stage0(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs of clip and lm."""
    runs = tmp_path_factory.mktemp("stage0")
    stages = tiny_stage_runs(shards, runs)
    for name in ("clip", "lm"):
        assert train_in_process([*stages[name], f"run.name={name}"]) == 0
    return runs


def kill_and_continue(overrides: list[str], runs: Path, processes: int) -> None:
    overrides = [*overrides, "trainer.max_steps=24", "validation.every=12"]  # time to be killed in
    train([*overrides, "run.name=whole"], processes)
    killed = [*overrides, "run.name=killed"]
    kill_in_the_middle(killed, runs / "killed", processes, last=24)
    assert "continuing" in train(killed, processes)
    assert_same_end(runs / "killed", runs / "whole")


def also(stage: str, processes: int) -> Any:
    """A case for `make test-all`."""
    return pytest.param(stage, processes, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("stage", "processes"),
    [
        ("stage2", 3), ("clip", 1), ("lm", 1),
        also("stage2", 1), also("clip", 3), also("lm", 3),
    ],
)  # fmt: skip
def test_killed_and_continued(stage: str, processes: int, shards: Path, tmp_path: Path) -> None:
    overrides = tiny_stage_runs(shards, tmp_path)[stage]
    accumulate = f"batch.accumulate={1 if processes == 1 else 2}"
    kill_and_continue([*overrides, *DROPOUT[stage], accumulate], tmp_path, processes)


@pytest.mark.parametrize("stage", STAGES)
def test_the_number_of_processes_hardly_changes_a_run(
    stage: str, shards: Path, tmp_path: Path
) -> None:
    overrides = [*tiny_stage_runs(shards, tmp_path)[stage], "trainer.max_steps=6"]
    if stage == "lm":
        overrides.append("causal_lm.config.dropout=0")
    assert train_in_process([*overrides, "run.name=one"]) == 0
    train([*overrides, "run.name=two"], 2)
    for ours, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        for name, value in theirs.items():
            if name.startswith(("train/loss", "val/l", "val/grounding")) and value:
                assert float(ours[name]) == pytest.approx(float(value), abs=2e-4), name
    assert last_checkpoint(tmp_path / "two")["drawn"] == {"synthetic": 72}


def test_stage_0_leaves_what_stages_1_and_2_load(
    stage0: Path, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """clip's tower into stage 1, its Q-Former and lm's model into stage 2."""
    tower = ["vision.name=test_vit", f"vision.weights={stage0 / 'clip' / 'tower.safetensors'}"]
    short = {"trainer.max_steps": 2, "validation.every": "null"}
    assert train_in_process([*tiny_run(shards, tmp_path, "stage1", **short), *tower]) == 0
    checkpoint = tmp_path / "stage1" / "checkpoints" / "step-00000002.ckpt"
    stage2 = [
        *(
            o
            for o in tiny_stage_runs(shards, tmp_path)["stage2"]
            if not o.startswith("language_model")
        ),
        *tower,
        "language_model=pretrained",
        f"language_model.name={stage0 / 'lm' / 'model'}",
        "language_model.dtype=float32",
        "init=checkpoint",
        "trainer.max_steps=6",
        "run.name=stage2",
    ]
    caplog.clear()
    assert train_in_process([*stage2, f"init_from={checkpoint}"]) == 0
    assert "0 unexpected" in caplog.text and "not in the checkpoint: lm_proj.weight" in caplog.text
    assert "dropped: itm_head.weight (head of stage 1)" in caplog.text
    assert "grounding gap" in caplog.text and "says:" in caplog.text
    last = last_checkpoint(tmp_path / "stage2")
    assert set(last["frozen"]) == {"vision", "language_model", "language model's tokenizer"}
    assert not [n for n in last["model"] if n.startswith(("vision.", "language_model."))]
    validated = [row for row in rows(tmp_path / "stage2") if row["val/loss_lm"]]
    assert {"val/lm_right", "val/lm_shuffled", "val/lm_blank", "val/grounding_gap"} <= set(
        validated[0]
    )
    assert (tmp_path / "stage2" / "samples" / "step-00000006.png").is_file()


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_any_language_model_trains_and_stays_as_it_was(
    name: str, shards: Path, tmp_path: Path
) -> None:
    from blip2_train.config import Launch, to_plain
    from blip2_train.models.freezing import state_digest
    from blip2_train.train import compose
    from blip2_train.training import fit

    seen: dict[str, Any] = {}
    build = fit.build_module

    def spy(*args: Any, **kwargs: Any) -> Any:
        module = build(*args, **kwargs)
        seen["module"] = module
        seen["before"] = state_digest(module.model.language_model.lm.state_dict())
        return module

    overrides = [
        *tiny_stage_runs(shards, tmp_path, **model_of(name))["stage2"],
        f"text.prefix={'random_split' if name == 't5' else 'none'}",
        "trainer.max_steps=6",
        "run.name=run",
    ]
    cfg = to_plain(compose(overrides))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "build_module", spy)
        fit.fit(cfg, Launch())
    model = seen["module"].model
    assert state_digest(model.language_model.lm.state_dict()) == seen["before"]
    assert not any(p.requires_grad for p in model.language_model.parameters())
    model.train()
    assert not any(part.training for part in model.language_model.modules())
    queries = torch.randn(2, 4, 32)
    text = {"input_ids": torch.tensor([[5, 6, 7]] * 2), "lm_index": torch.arange(6)}
    text["attention_mask"] = torch.ones(2, 3, dtype=torch.long)
    text |= {"target_ids": text["input_ids"], "target_mask": text["attention_mask"]}
    assert model.text_logits(queries, text).equal(model.text_logits(queries, text))
    losses = [float(row["train/loss"]) for row in rows(tmp_path / "run") if row["train/loss"]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_checkpointing_changes_nothing(name: str, shards: Path, tmp_path: Path) -> None:
    overrides = [
        *tiny_stage_runs(shards, tmp_path, **model_of(name))["stage2"],
        "qformer.dropout=0.1",
        "validation.every=null",
        "trainer.max_steps=4",
    ]
    on = ["qformer.gradient_checkpointing=true", "language_model.gradient_checkpointing=true"]
    assert train_in_process([*overrides, "run.name=off"]) == 0
    assert train_in_process([*overrides, *on, "run.name=on"]) == 0
    a, b = (last_checkpoint(tmp_path / run)["model"] for run in ("on", "off"))
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], atol=1e-6, rtol=1e-5, msg=key)
    ours, theirs = rows(tmp_path / "on")[-1], rows(tmp_path / "off")[-1]
    assert float(ours["train/loss"]) == pytest.approx(float(theirs["train/loss"]), abs=1e-6)


def test_int8_on_a_cpu(stage0: Path, shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    overrides = [
        *(
            o
            for o in tiny_stage_runs(shards, tmp_path)["stage2"]
            if not o.startswith("language_model")
        ),
        "language_model=pretrained",
        f"language_model.name={stage0 / 'lm' / 'model'}",
        "language_model.dtype=float32",
        "trainer.max_steps=6",
    ]
    assert train_in_process([*overrides, "run.name=float"]) == 0
    int8 = [*overrides, "language_model.quantization=torchao_int8", "run.name=int8"]
    assert train_in_process(int8) == 0
    ours, theirs = (last_checkpoint(tmp_path / name) for name in ("int8", "float"))
    assert ours["frozen"] == theirs["frozen"]  # one model, however it is stored
    for a, b in zip(rows(tmp_path / "int8"), rows(tmp_path / "float"), strict=True):
        for name in ("train/loss", "val/loss_lm"):
            if a[name]:
                assert a[name] != b[name]
                assert float(a[name]) == pytest.approx(float(b[name]), rel=0.02)


def test_text_side_is_kept_on_request(shards: Path, tmp_path: Path) -> None:
    """It is in the checkpoint, and stays as it was."""
    overrides = tiny_stage_runs(shards, tmp_path)["stage2"]
    short = ["validation.every=null", "model.keep_text=true", "model.vocab_size=100"]
    for steps in (2, 4):
        assert train_in_process(
            [*overrides, *short, f"trainer.max_steps={steps}", f"run.name=to-{steps}"]
        ) == 0  # fmt: skip
    a, b = (last_checkpoint(tmp_path / name)["model"] for name in ("to-2", "to-4"))
    assert a["qformer.word_embeddings.weight"].shape[0] == 101
    assert a["qformer.word_embeddings.weight"].equal(b["qformer.word_embeddings.weight"])
    assert not a["qformer.query_tokens"].equal(b["qformer.query_tokens"])


def test_plain_fp16_t5_is_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = model_of("t5") | {"language_model.dtype": "float16"}
    overrides = tiny_stage_runs(shards, tmp_path, **changes)["stage2"]
    assert "use bfloat16" in refusal(overrides, capsys)


def refusal(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert train_in_process([*overrides, "run.name=refused"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_a_stage_1_checkpoint_must_fit(
    stage0: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage2 = [*tiny_stage_runs(shards, tmp_path)["stage2"], "init=checkpoint"]
    assert "init_from=PATH" in refusal(stage2, capsys)
    assert "/no/file" in refusal([*stage2, "init_from=/no/file"], capsys)
    short = {"trainer.max_steps": 1, "validation.every": "null"}
    assert train_in_process(tiny_run(shards, tmp_path, "small", **short)) == 0
    capsys.readouterr()
    checkpoint = tmp_path / "small" / "checkpoints" / "step-00000001.ckpt"
    given = [*stage2, f"init_from={checkpoint}"]
    wide = refusal([*given, "qformer.hidden_size=64"], capsys)
    assert "qformer.query_tokens is (1, 4, 32), the model's is (1, 4, 64)" in wide
    deep = refusal([*given, "qformer.num_layers=3"], capsys)
    assert "lacks" in deep and "qformer.layers.2" in deep
    other = stage0 / "clip" / "checkpoints" / "step-00000012.ckpt"
    assert "no query tokens" in refusal([*stage2, f"init_from={other}"], capsys)
    content = torch.load(checkpoint, weights_only=True)
    del content["model"]["qformer.query_tokens"]
    torch.save(content, tmp_path / "without.ckpt")
    message = refusal([*stage2, f"init_from={tmp_path / 'without.ckpt'}"], capsys)
    assert "no query tokens" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["language_model.name=/nowhere", "language_model.weights=pretrained"], "/nowhere"),
        (["language_model.tokenizer=/nowhere"], "/nowhere"),
        (["text.prefix=random_split"], "text.prefix=none"),
        (["language_model.end=two words"], "language_model.end"),
        (["init_from=x.ckpt"], "exclude each other"),
        (["language_model.quantization=int7"], "language_model.quantization=int7"),
        (["language_model.cofnig=1"], "cofnig"),
        (["loss.itc.smoothing=0.1"], "unknown key loss.itc.smoothing"),
    ],
)
def test_what_stage_2_refuses(
    changes: list[str],
    message: str,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = [*tiny_stage_runs(shards, tmp_path)["stage2"], *changes]
    assert message in refusal(overrides, capsys)


def test_a_run_killed_before_its_product_makes_up_for_it(
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last checkpoint is safe whatever becomes of the product, and the product comes after."""
    for stage, product in (("lm", "model/config.json"), ("clip", "tower.safetensors")):
        overrides = [*tiny_stage_runs(shards, tmp_path)[stage], f"run.name={stage}"]
        overrides += ["trainer.max_steps=2", "validation.every=null"]

        def full(*_: Any) -> None:
            raise OSError("disk full")

        with monkeypatch.context() as patch:
            patch.setattr("blip2_train.training.lm.save_model", full)
            patch.setattr("blip2_train.models.clip.Clip.save_tower", full)
            assert train_in_process(overrides) == 2
        assert "could not be written (disk full)" in capsys.readouterr().err
        assert last_checkpoint(tmp_path / stage)["step"] == 2
        assert not (tmp_path / stage / product).exists()
        assert train_in_process(overrides) == 0
        assert (tmp_path / stage / product).is_file()


def test_what_lm_refuses(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = tiny_stage_runs(shards, tmp_path)["lm"]
    positions = refusal([*lm, "text.max_tokens=400"], capsys)
    assert "causal_lm.config.max_position_embeddings=256" in positions
    assert "causal_lm.end" in refusal([*lm, "causal_lm.end=two words"], capsys)
    missing = refusal(
        [*(o for o in lm if not o.startswith("causal_lm.tokenizer")), "data.root=/nowhere"], capsys
    )
    assert "causal_lm.tokenizer=/nowhere" in missing
    other = ["causal_lm=any", *without(lm, "causal_lm.config")]
    assert "model_type" in refusal(other, capsys)
    t5 = "causal_lm.config={model_type: t5, d_model: 16, num_layers: 1, num_heads: 1}"
    assert "encoder-decoder" in refusal([*other, t5], capsys)
    llama = "{model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, "
    llama += "num_attention_heads: 1}"
    assert train_in_process([*other, f"causal_lm.config={llama}", "trainer.max_steps=2"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text.max_tokens": 70}, "reads 64 positions"),
        ({"validation.max_new_tokens": 100}, "reads 64 positions"),
        ({"data.prompt": "a b c d e f g h i j k l m n", "text.max_tokens": 8}, "no room"),
    ],
)
def test_texts_must_fit(
    changes: dict[str, Any],
    message: str,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = tiny_stage_runs(shards, tmp_path, **changes)["stage2"]
    assert message in refusal(overrides, capsys)


def test_stage_2_without_stage_1_may_begin_with_a_bert(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import BertConfig, BertForPreTraining

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertForPreTraining(BertConfig(vocab_size=50, intermediate_size=64, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    changes = {"init": "bert", "qformer.init": tmp_path / "bert", "trainer.max_steps": 1}
    overrides = tiny_stage_runs(shards, tmp_path, **changes)["stage2"]
    assert train_in_process([*overrides, "validation.every=null"]) == 0
    assert "layers.self_attention.query" in caplog.text and "bert " in caplog.text


def test_another_tokenizer_is_refused_on_resume(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same vocabulary, but words are no longer written small."""
    overrides = [*tiny_stage_runs(shards, tmp_path)["lm"], "validation.every=null"]
    assert train_in_process([*overrides, "trainer.max_steps=2", "run.name=refused"]) == 0
    other = tmp_path / "tokenizer"
    shutil.copytree(shards / "tokenizer", other)
    settings = other / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"do_lower_case": False}))
    allow = ["trainer.max_steps=4", "resume.allow=[trainer.max_steps]"]
    changed = [o for o in overrides if not o.startswith("causal_lm.tokenizer")] + [
        f"causal_lm.tokenizer={other}"
    ]
    assert "tokenizer is not the one" in refusal([*changed, *allow], capsys)
