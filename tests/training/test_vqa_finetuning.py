"""Fine-tuning on questions that the Q-Former reads: the whole command on the tiny twin.

Proven: tower, Q-Former and its text side learn, the language model stays; the run goes through the
same losses and ends with the same weights on 1, 2 and 3 processes; killed and continued it ends
with the bits of an undisturbed one; first weights come from stage 1, or from stages 2 and 1, and
what cannot be had is refused; an encoder-decoder answers too; wrong settings end with one sentence.

`slow`: two processes, as three are proven; killed and continued.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from asking import question_shards, vqa_run, without_captions
from forked import train
from tiny import tiny_run, tiny_stage_runs, train_in_process
from whole_runs import assert_same_end, kill_in_the_middle, last_checkpoint, rows

from blip2_train.checkpoint import io
from blip2_train.prepare import main as prepare

T5 = (
    "{model_type: t5, d_model: 32, d_kv: 16, d_ff: 64, num_layers: 2, num_heads: 2, "
    "feed_forward_proj: gated-gelu, tie_word_embeddings: false}"
)
DOUBLE = {"trainer.precision": "64-true", "data.crop_scale": "[0.5,1.0]", "data.flip": 0.5}
NOT_REACHED = ("qformer.lm_head.", "qformer.layers.1.text_ffn.")  # by no loss of this model


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return question_shards(tmp_path_factory.mktemp("asked") / "synthetic")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vqa-runs")


@pytest.fixture(scope="module")
def alone(asked: Path, runs: Path) -> Path:
    assert train_in_process(vqa_run(asked, runs, "on-1", **DOUBLE)) == 0
    return runs / "on-1"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return last_checkpoint(run)["model"]


def test_all_but_the_language_model_learns(alone: Path) -> None:
    before, after = io.load(alone / "checkpoints" / "step-00000010.ckpt")["model"], weights(alone)
    assert before.keys() == after.keys() and not any("language_model" in name for name in after)
    stayed = {name for name, value in after.items() if value.equal(before[name])}
    assert stayed == {name for name in after if name.startswith(NOT_REACHED)}
    moved = {name.split(".")[0] for name in after.keys() - stayed}
    assert moved == {"vision", "qformer", "lm_proj"}
    assert "qformer.word_embeddings.weight" in after.keys() - stayed
    trained = [row for row in rows(alone) if row["train/loss"]]
    assert len(trained) == 20
    assert float(trained[-1]["train/loss"]) < float(trained[0]["train/loss"]) - 0.1
    validated = [row for row in rows(alone) if row["val/loss_lm"]]
    assert len(validated) == 2 and validated[0]["val/grounding_gap"]
    assert (alone / "samples" / "step-00000020.png").is_file()
    # the Q-Former's tokenizer is known again on resume, like the language model's
    assert {"tokenizer", "language model's tokenizer"} <= set(last_checkpoint(alone)["frozen"])


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_processes_train_as_one_does(
    processes: int, asked: Path, runs: Path, alone: Path
) -> None:
    name = f"on-{processes}"
    train(vqa_run(asked, runs, name, **DOUBLE, **{"data.num_workers": 1}), processes)
    ours, theirs = weights(runs / name), weights(alone)
    assert ours["qformer.query_tokens"].dtype == torch.float64
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-9)
    for a, b in zip(rows(runs / name), rows(alone), strict=True):
        for key, text in b.items():
            if key.startswith(("train/loss", "val/loss", "val/grounding")) and text:
                assert float(a[key]) == pytest.approx(float(text), abs=1e-9), key


@pytest.mark.slow
def test_killed_and_continued(asked: Path, tmp_path: Path) -> None:
    changes = {"trainer.max_steps": 24, "validation.every": 12, "qformer.dropout": 0.1}
    train(vqa_run(asked, tmp_path, "whole", **changes), 1)
    words = vqa_run(asked, tmp_path, "killed", **changes)
    kill_in_the_middle(words, tmp_path / "killed", 1, last=24)
    assert "continuing" in train(words, 1)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


def test_an_encoder_decoder_answers(asked: Path, tmp_path: Path) -> None:
    model = {
        "language_model": "pretrained", "language_model.name": "null",
        "language_model.weights": "random", "language_model.config": T5,
        "language_model.dtype": "float32",
    }  # fmt: skip
    words = vqa_run(asked, tmp_path, "t5", **{"trainer.max_steps": 6, "validation.every": 3})
    words = [word for word in words if "language_model.config." not in word]
    assert train_in_process([*words, *(f"{key}={value}" for key, value in model.items())]) == 0
    losses = [float(row["val/loss"]) for row in rows(tmp_path / "t5") if row["val/loss"]]
    assert len(losses) == 2 and losses[1] < losses[0]


@pytest.mark.slow
def test_images_with_questions_alone_have_cached_features(asked: Path, tmp_path: Path) -> None:
    """As with the tower, which is frozen then."""
    only = without_captions(asked, tmp_path / "only")
    frozen = {
        "vision.trainable": "false", "optimizer.layer_decay": 1, "validation.every": "null",
        "data.crop_scale": "null", "data.flip": 0, "data.decode": "exact", "trainer.max_steps": 4,
    }  # fmt: skip
    folder = asked / "tokenizer"
    for name, features in (("computed", "computed"), ("cached", "cached")):
        words = vqa_run(only, tmp_path, name, **frozen, **{"data.features": features})
        words = [word for word in words if "tokenizer=" not in word]
        words += [f"{group}.tokenizer={folder}" for group in ("text", "language_model")]
        if name == "cached":
            assert prepare(["features", str(only), *words, "--workers", "1"]) == 0
        assert train_in_process(words) == 0
    assert_same_end(tmp_path / "cached", tmp_path / "computed")


# -- where it begins -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage1(asked: Path, runs: Path) -> Path:
    short = {"trainer.max_steps": 2, "validation.every": "null"}
    assert train_in_process(tiny_run(asked, runs, "stage1", **short)) == 0
    return runs / "stage1" / "checkpoints" / "step-00000002.ckpt"


@pytest.fixture(scope="module")
def stage2(asked: Path, runs: Path, stage1: Path) -> Path:
    changes = {"init": "checkpoint", "init_from": stage1, "trainer.max_steps": 2}
    words = tiny_stage_runs(asked, runs, **{"validation.every": "null"})["stage2"]
    words = [word for word in words if not word.startswith(("init=", "trainer.max_steps="))]
    words += [f"{key}={value}" for key, value in changes.items()]
    assert train_in_process([*words, "run.name=stage2"]) == 0
    return runs / "stage2" / "checkpoints" / "step-00000002.ckpt"


def begin(asked: Path, folder: Path, name: str, **changes: Any) -> int:
    first = {"init": "checkpoint", "trainer.max_steps": 1, "validation.every": "null"}
    return train_in_process(vqa_run(asked, folder, name, **first, **changes))


def test_stage_1_brings_its_text_side(
    asked: Path, stage1: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    still = {"optimizer.lr": 0, "schedule.min_lr": 0, "schedule.warmup_lr": 0}
    assert begin(asked, tmp_path, "vqa", init_from=stage1, **still) == 0
    assert "0 unexpected" in caplog.text and "not in the checkpoint: lm_proj.weight" in caplog.text
    ours, theirs = weights(tmp_path / "vqa"), torch.load(stage1, weights_only=True)["model"]
    for name in theirs:
        if name.startswith("qformer."):
            assert ours[name].equal(theirs[name]), name
    assert "dropped: itm_head.weight (head of stage 1)" in caplog.text


def test_stage_2_takes_the_text_side_of_stage_1(
    asked: Path,
    stage1: Path,
    stage2: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert begin(asked, tmp_path, "none", init_from=stage2) == 2
    assert "init_text_from=PATH" in capsys.readouterr().err
    still = {"optimizer.lr": 0, "schedule.min_lr": 0, "schedule.warmup_lr": 0}
    both = {"init_from": stage2, "init_text_from": stage1}
    assert begin(asked, tmp_path, "vqa", **both, **still) == 0
    assert f"init_text_from={stage1}: " in caplog.text and "(not text)" in caplog.text
    ours = weights(tmp_path / "vqa")
    first, second = (torch.load(path, weights_only=True)["model"] for path in (stage1, stage2))
    for name, value in ours.items():
        if not name.startswith("vision."):
            assert value.equal(second[name] if name in second else first[name]), name
    assert not first["qformer.query_tokens"].equal(second["qformer.query_tokens"])
    assert begin(asked, tmp_path, "twice", init_from=stage2, init_text_from=stage2) == 2
    assert f"init_text_from={stage2} has no weight" in capsys.readouterr().err
    wide = {**both, "qformer.max_positions": 72}
    assert begin(asked, tmp_path, "wide", **wide) == 2
    assert "another architecture" in capsys.readouterr().err


def test_no_head_that_writes_captions_is_needed(
    asked: Path, stage1: Path, stage2: Path, tmp_path: Path
) -> None:
    """A stage 1 of Hugging Face's classes has none; here nothing reads it."""
    content = torch.load(stage1, weights_only=True)
    model = {k: v for k, v in content["model"].items() if not k.startswith("qformer.lm_head.")}
    assert len(model) < len(content["model"])
    headless = tmp_path / "headless.ckpt"
    torch.save({**content, "model": model}, headless)
    still = {"optimizer.lr": 0, "schedule.min_lr": 0, "schedule.warmup_lr": 0}
    for name, where in (("one", {}), ("two", {"init_text_from": headless})):
        first = stage2 if where else headless
        assert begin(asked, tmp_path, name, init_from=first, **where, **still) == 0
        words = weights(tmp_path / name)["qformer.word_embeddings.weight"]
        assert words.equal(model["qformer.word_embeddings.weight"])


# -- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.keep_text": "false"}, "wants model.keep_text=true"),
        ({"data.mode": "stream"}, "wants data.mode=indexed"),
        ({"text.prefix": "random_split"}, "wants text.prefix=none"),
        ({"data.prompt": "Question?"}, "must have one {}"),
        ({"data.prompt": "'{} {}'"}, "must have one {}"),
        ({"data.text": "answers"}, "must be one of captions, questions"),
        ({"text.max_question_tokens": 65}, "exceeds qformer.max_positions=64"),
        ({"model.vocab_size": 30522}, "word pieces"),
        ({"init_text_from": "x.ckpt"}, "init_text_from=x.ckpt adds"),
        ({"text.max_tokens": 5}, "has no room"),
        ({"data.text": "captions", "data.prompt": "x"}, "model.vocab_size=null"),
    ],
)
def test_one_sentence(
    changes: dict[str, Any],
    said: str,
    asked: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train_in_process(vqa_run(asked, tmp_path, "wrong", **changes)) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_shards_without_the_text_that_is_asked_for(
    asked: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Captions alone cannot be asked about; questions alone are no captions."""
    assert train_in_process(vqa_run(shards, tmp_path, "captions")) != 0
    error = capsys.readouterr().err
    assert "no question with an answer" in error and "Traceback" not in error
    only = without_captions(asked, tmp_path / "only")
    changes = {"validation.every": "null", "text.tokenizer": asked / "tokenizer"}
    assert train_in_process(tiny_run(only, tmp_path, "stage1", **changes)) != 0
    error = capsys.readouterr().err
    assert "no captions, only questions" in error and "Traceback" not in error
