"""The whole command on rendered shards.

Proven: the image tower is not touched, not trained and not stored; checkpoints load with
weights_only; a damaged one is detected and the one before is used; what may not change on resume is
refused; samples drawn and validation do not depend on the number of processes; a non-finite
gradient skips the step; bad input ends with one sentence and exit code 2. (Kills: test_kill.py.)
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked import start_training, train
from tiny import command, run_command, tiny_run, train_in_process
from whole_runs import (
    assert_equal_states,
    children_of,
    last_checkpoint,
    rows,
)

from blip2_train.checkpoint import io
from blip2_train.prepare import main as prepare


@pytest.fixture(scope="session")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on one process, with two loader workers."""
    runs = tmp_path_factory.mktemp("runs")
    train(tiny_run(shards, runs, "whole", **{"data.num_workers": 2}))
    return runs / "whole"


def test_a_loader_process_that_is_killed_ends_the_run_with_a_sentence(
    shards: Path, tmp_path: Path
) -> None:
    overrides = tiny_run(shards, tmp_path, "killed", **{"data.num_workers": 2})
    training = start_training(overrides)
    training.wait_for("step 6/")
    os.kill(max(children_of(training.pid)), signal.SIGKILL)
    output = training.finish(code=3)
    assert "\nerror: a loader process died" in output, output


def test_the_number_of_processes_hardly_changes_a_run(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Float32 rounds differently; the same negatives, samples and validation must come out."""
    train(tiny_run(shards, tmp_path, "two"), 2)
    for ours, theirs in zip(rows(tmp_path / "two"), rows(undisturbed), strict=True):
        for name, value in theirs.items():
            if name.startswith(("train/loss", "val/loss")) and value:
                assert float(ours[name]) == pytest.approx(float(value), abs=2e-4), name
    a, b = last_checkpoint(tmp_path / "two"), last_checkpoint(undisturbed)
    assert a["drawn"] == b["drawn"] == {"synthetic": 12 * 12}


def test_a_finished_run_says_so(undisturbed: Path, shards: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file()}
    said = train(tiny_run(shards, undisturbed.parent, "whole", **{"data.num_workers": 2}))
    assert "is finished" in said
    assert before == {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file()}


def test_what_a_run_leaves(undisturbed: Path) -> None:
    names = {p.relative_to(undisturbed).as_posix() for p in undisturbed.rglob("*") if p.is_file()}
    assert {"config.yaml", "metrics.csv", "samples/step-00000006.png"} <= names
    assert {n for n in names if n.startswith("checkpoints")} == {
        f"checkpoints/step-{step:08d}.ckpt"
        for step in (6, 8, 12)  # 4 is no longer kept
    }
    table = rows(undisturbed, without_speed=False)
    trained = [row for row in table if row["train/loss"]]
    assert [int(row["step"]) for row in trained] == [2, 4, 6, 8, 10, 12]
    epochs = [float(row["epochs/synthetic"]) for row in trained]
    assert epochs == pytest.approx([12 * step / 108 for step in (2, 4, 6, 8, 10, 12)])
    for name in ("samples_per_second_per_device", "model_flops_utilisation", "peak_memory_gb"):
        assert float(trained[-1][name]) > 0, name
    assert float(trained[-1]["lr"]) > 0 and 0 <= float(trained[-1]["data_wait_share"]) <= 1
    validated = [row for row in table if row["val/loss"]]
    assert [int(row["step"]) for row in validated] == [6, 12]
    assert {"val/i2t_r1", "val/itm_t2i_r10", "val/itm_accuracy_match"} <= set(validated[0])


def test_a_checkpoint_holds_trained_weights_and_plain_values_only(undisturbed: Path) -> None:
    path = undisturbed / "checkpoints" / "step-00000012.ckpt"
    content = torch.load(path, weights_only=True)
    assert not [name for name in content["model"] if name.startswith("vision.")]
    assert content["frozen"]["vision"]["digest"] and content["world_size"] == 1
    count = sum(len(group["params"]) for group in content["optimizer"]["param_groups"])
    assert count == len(content["model"])


def test_a_damaged_checkpoint_is_left_for_the_one_before(
    shards: Path, undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "damaged"
    overrides = tiny_run(shards, tmp_path, "damaged")
    assert train_in_process([*overrides, "trainer.max_steps=8"]) == 0
    newest = run / "checkpoints" / "step-00000008.ckpt"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    caplog.clear()
    assert train_in_process([*overrides, "trainer.max_steps=8"]) == 0
    assert "step-00000008.ckpt is damaged" in caplog.text
    assert "step-00000006.ckpt from step 6" in caplog.text
    assert newest.with_suffix(".ckpt.damaged").exists() and io.damage(newest) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("qformer.hidden_size=64", "qformer.hidden_size: 32 -> 64"),
        ("seed=7", "seed: 42 -> 7"),
        ("optimizer.lr=0.5", "resume.allow=[optimizer.lr]"),
        ("resume=never", "holds a run"),
        ("loss.weights.lm=0", "loss.weights.lm: 1.0 -> 0"),
        ("resume=nowhere.ckpt", "nowhere.ckpt"),
    ],
)
def test_what_may_not_change_on_resume(
    change: str,
    message: str,
    shards: Path,
    undisturbed: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = tiny_run(shards, undisturbed.parent, "whole", **{"trainer.max_steps": 14})
    extra = ["resume.allow=[trainer.max_steps]"] if "resume=" not in change else []
    assert train_in_process([*overrides, *extra, change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_a_checkpoint_of_before_there_were_stages_goes_on(shards: Path, tmp_path: Path) -> None:
    overrides = tiny_run(shards, tmp_path, "old", **{"validation.every": "null"})
    assert train_in_process([*overrides, "trainer.max_steps=2"]) == 0
    path = tmp_path / "old" / "checkpoints" / "step-00000002.ckpt"
    content = io.load(path)
    config = yaml.safe_load(content["config"])
    assert config.pop("stage") == "stage1"
    io.save(path, content | {"config": yaml.safe_dump(config)})
    more = ["trainer.max_steps=4", "resume.allow=[trainer.max_steps]"]
    assert train_in_process([*overrides, *more]) == 0
    assert last_checkpoint(tmp_path / "old")["step"] == 4


def test_an_allowed_change_goes_through(shards: Path, tmp_path: Path) -> None:
    overrides = tiny_run(shards, tmp_path, "longer", **{"validation.every": "null"})
    assert train_in_process([*overrides, "trainer.max_steps=4"]) == 0
    allow = "resume.allow=[optimizer.lr,optimizer.weight_decay,trainer.max_steps]"
    change = ["trainer.max_steps=8", "optimizer.lr=2e-3", "optimizer.weight_decay=0.5"]
    assert train_in_process([*overrides, *change, allow]) == 0
    state = last_checkpoint(tmp_path / "longer")
    assert state["step"] == 8
    decays = [group["weight_decay"] for group in state["optimizer"]["param_groups"]]
    assert decays == [0.5, 0.0]  # and not the checkpoint's own


def test_other_shards_are_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    options = "--samples 60 --held-out 10 --size 32 --workers 1 --seed 5"
    prepare(["synthetic", "--out", str(other), *options.split()])
    overrides = tiny_run(shards, tmp_path, "run", **{"validation.every": "null"})
    assert train_in_process([*overrides, "trainer.max_steps=4"]) == 0
    moved = [*overrides, "trainer.max_steps=6", "resume.allow=[trainer.max_steps]"]
    moved += [f"data.sources.synthetic.shards={other}"]
    assert train_in_process(moved) == 2
    assert "not those" in capsys.readouterr().err


def test_the_tower_stays_as_it_was(shards: Path, tmp_path: Path) -> None:
    from blip2_train.config import Launch, to_plain
    from blip2_train.models.vision import VisionTower
    from blip2_train.train import compose
    from blip2_train.training import fit

    seen: dict[str, Any] = {}
    build = fit.build_module

    def spy(*args: Any, **kwargs: Any) -> Any:
        module = build(*args, **kwargs)
        seen["module"], seen["before"] = module, module.model.vision.digest()
        return module

    overrides = tiny_run(shards, tmp_path, "tower", **{"validation.every": 3})
    cfg = to_plain(compose([*overrides, "trainer.max_steps=4"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "build_module", spy)
        fit.fit(cfg, Launch())
    vision: VisionTower = seen["module"].model.vision
    assert vision.digest() == seen["before"]
    assert not vision.training and not any(p.requires_grad for p in vision.parameters())
    optimizer = seen["module"].trainer.optimizers[0]
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in vision.parameters()}
    fresh = VisionTower("test_vit", weights="random", image_size=32)
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert vision.train()(image).equal(fresh(image))


def test_a_step_with_a_bad_gradient_is_skipped(shards: Path, tmp_path: Path) -> None:
    """Weights and optimizer of the step before stay; the count is logged."""
    from blip2_train.training.stage1 import Stage1Module

    step = Stage1Module.training_step

    def poisoned(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = step(self, batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step == 2 else loss

    results = {}
    for name, function in (("good", step), ("bad", poisoned)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stage1Module, "training_step", function)
            changes = {"trainer.max_steps": 4, "checkpoint.every": 1, "validation.every": "null"}
            assert train_in_process(tiny_run(shards, tmp_path, name, **changes)) == 0
        results[name] = tmp_path / name
    before, after = (io.load(io.step_path(results["bad"] / "checkpoints", step)) for step in (2, 3))
    assert_equal_states(before["model"], after["model"])
    assert_equal_states(before["optimizer"]["state"], after["optimizer"]["state"])
    last = rows(results["bad"])[-1]
    assert last["skipped_steps"] == "1"
    assert rows(results["good"])[-1]["skipped_steps"] == "0"
    weights = last_checkpoint(results["bad"])["model"]
    assert all(value.isfinite().all() for value in weights.values())


def test_too_many_bad_gradients_stop_the_run(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from blip2_train.training.stage1 import Stage1Module

    step = Stage1Module.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage1Module, "training_step", lambda *a: step(*a) * float("inf"))
        changes = {"trainer.max_consecutive_skips": 4, "trainer.log_every": 1}
        assert train_in_process(tiny_run(shards, tmp_path, "bad", **changes)) == 2
    error = capsys.readouterr().err
    assert "last 4 steps" in error and "synthetic/train-0000" in error


BAD_INPUT = [
    ("optimizer.lrr=1", "did you mean optimizer.lr?"),
    ("experiment=stage1_vitq", "stage1_vitg"),
    ("data.sources.synthetic.shards=/nowhere/at/all", "data.sources.synthetic.shards"),
    ("data.sources.synthetic.split=dev", "dev"),
    ("text.tokenizer=/nowhere", "/nowhere"),
    ("batch.size=13 batch.accumulate=4", "batch.size=12 or 16"),
    ("trainer.devices=8", "torchrun --nproc-per-node 8"),
    ("trainer.precision=16-mixed", "trainer.precision"),
    ("vision.name=vit_gigantic", "vit_gigantic"),
    ("vision.nome=x", "nome"),
    ("qformer.num_heads=5", "num_heads"),
    ("init_from=/nowhere.pth", "/nowhere.pth"),
    ("loss.weights.itc=0 loss.weights.itm=0 loss.weights.lm=0", "loss.weights"),
    ("run.name=a/b", "run.name"),
    ("kind=foo", "stage1_vitl"),
    ("data.prompt=null", "data.prompt"),
    ("trainer.deterministic=maybe", "trainer.deterministic"),
    ("seed=-1", "seed=-1"),
    ("qformer.cross_attention_freq=0", "qformer.cross_attention_freq"),
]


@pytest.mark.parametrize(("change", "message"), BAD_INPUT)
def test_bad_input_is_one_sentence(
    change: str,
    message: str,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = tiny_run(shards, tmp_path, "bad")
    if change.startswith("experiment="):
        overrides = overrides[1:]
    assert train_in_process([*overrides, *change.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert message in error
    assert not (tmp_path / "bad" / "checkpoints").exists()


def test_bad_input_of_the_command(shards: Path, tmp_path: Path) -> None:
    """The real process: exit code 2, one line, no traceback."""
    overrides = tiny_run(shards, tmp_path, "bad")
    done = run_command([*overrides, "batch.siz=3", "optimizer.lrr=1"])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "batch.size" in done.stderr
    assert "optimizer.lr?" in done.stderr


def test_help_is_quick_and_dry_run_trains_nothing(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    started = time.perf_counter()
    done = run_command(["--help"])
    assert done.returncode == 0 and "stage1_vitg" in done.stdout
    assert time.perf_counter() - started < 10  # 0.4 s on a free machine
    script = "import sys, blip2_train.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([command([])[0], "-c", script], check=False).returncode == 0
    assert train_in_process([*tiny_run(shards, tmp_path, "dry"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "batch 12" in said and "trained " in said and "GB" in said
    assert not (tmp_path / "dry").exists()


def test_losses_turned_off_freeze_what_they_do_not_reach(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"loss.weights.itc": 0, "loss.weights.itm": 0, "trainer.max_steps": 2}
    assert train_in_process(tiny_run(shards, tmp_path, "lm", **changes)) == 0
    assert "no loss reaches" in caplog.text and "query_ffn" in caplog.text


def test_samples_that_cannot_be_decoded_are_written_down(tmp_path: Path) -> None:
    from blip2_train.data.index import read_index, write_index
    from blip2_train.data.shards import write_shard

    folder = tmp_path / "shards"
    options = (
        "--samples 54 --held-out 12 --size 32 --samples-per-shard 60 --workers 1 --tokenizer 160"
    )
    prepare(["synthetic", "--out", str(folder), *options.split()])
    index = read_index(folder)
    good = next(info for info in index.values() if info.split == "train")
    from blip2_train.data.shards import ShardReader

    reader = ShardReader(folder / good.name, good)
    samples = []
    for number in range(len(reader)):
        raw = reader.read(number)
        image = b"no jpeg" if number % 27 == 3 else raw.image
        samples.append({"__key__": raw.key, "jpg": image, "json": raw.meta})
    index[good.name] = write_shard(folder / good.name, samples)
    write_index(folder, index.values())
    changes = {"data.max_skip_fraction": 0.9, "validation.every": "null"}
    assert train_in_process(tiny_run(folder, tmp_path, "run", **changes)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").open()]
    assert {line["key"] for line in lines} == {"00000003", "00000030"}
    assert rows(tmp_path / "run")[-1]["skipped_samples"] == str(len(lines))
    overrides = tiny_run(folder, tmp_path, "strict", **{"validation.every": "null"})
    assert train_in_process([*overrides, "trainer.max_steps=100"]) == 2


def test_validation_with_fewer_batches_than_processes(shards: Path, tmp_path: Path) -> None:
    """A rank without a validation batch takes part in every collective all the same."""
    changes = {"validation.max_images": 4, "validation.every": 2, "trainer.max_steps": 2}
    overrides = tiny_run(shards, tmp_path, "few", **changes)
    train(overrides, 2)
    alone = tiny_run(shards, tmp_path, "alone", **changes)
    assert train_in_process(alone) == 0
    ours, theirs = rows(tmp_path / "few")[-1], rows(tmp_path / "alone")[-1]
    assert ours["val/i2t_r1"] == theirs["val/i2t_r1"]
    assert float(ours["val/loss"]) == pytest.approx(float(theirs["val/loss"]), abs=1e-4)


@pytest.mark.slow
def test_going_back_to_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    """Later checkpoints are set aside, and the same command again goes on from what came since."""
    overrides = tiny_run(shards, tmp_path, "back", **{"validation.every": "null"})
    overrides += ["checkpoint.every=2", "checkpoint.keep_last=9"]
    assert train_in_process(overrides) == 0
    folder = tmp_path / "back" / "checkpoints"
    back = [*overrides, f"resume={io.step_path(folder, 4)}"]
    back += ["trainer.max_steps=6", "resume.allow=[trainer.max_steps]"]
    weights = last_checkpoint(tmp_path / "back")["model"]
    assert train_in_process(back) == 0
    assert list(io.steps(folder)) == [2, 4, 6]
    assert len(list(folder.glob("*.abandoned"))) == 4
    again = [*back, "trainer.max_steps=12"]
    assert train_in_process(again) == 0
    assert list(io.steps(folder)) == [2, 4, 6, 8, 10, 12]
    # within the warm-up the schedule does not depend on the length: the same steps, the same bits
    assert_equal_states(last_checkpoint(tmp_path / "back")["model"], weights)


def test_batch_and_accumulation_may_change_on_resume(shards: Path, tmp_path: Path) -> None:
    """The position in the data is a number of samples, not of steps."""
    overrides = tiny_run(shards, tmp_path, "batch", **{"validation.every": "null"})
    allow = "resume.allow=[trainer.max_steps]"
    assert train_in_process([*overrides, "trainer.max_steps=4"]) == 0
    change = ["trainer.max_steps=6", "batch.size=16", "batch.accumulate=2", allow]
    assert train_in_process([*overrides, *change]) == 0
    state = last_checkpoint(tmp_path / "batch")
    assert state["drawn"] == {"synthetic": 4 * 12 + 2 * 16} and state["step"] == 6


def test_double_precision_resumes_exactly(shards: Path, tmp_path: Path) -> None:
    changes = {"trainer.precision": "64-true", "validation.every": "null", "checkpoint.every": 3}
    for name, stops in (("whole", [6]), ("parts", [3, 6])):
        overrides = tiny_run(shards, tmp_path, name, **changes)
        overrides += ["schedule.min_lr=1e-3", "schedule.warmup_steps=1"]  # no part of the length
        for steps in stops:
            extra = [f"trainer.max_steps={steps}", "resume.allow=[trainer.max_steps]"]
            assert train_in_process([*overrides, *extra]) == 0
    whole, parts = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "parts")
    assert whole["model"]["qformer.query_tokens"].dtype == torch.float64
    assert_equal_states(parts["model"], whole["model"])


def test_a_missing_shard_is_found_before_training(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    (folder / "train-000001.tar").unlink()
    assert train_in_process(tiny_run(folder, tmp_path, "run")) == 2
    assert "'train-000001.tar' is missing" in capsys.readouterr().err


def test_parts_of_a_cached_batch_are_one_batch(shards: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "trainer.precision": "64-true", "qformer.dropout": 0, "trainer.max_steps": 4,
        "validation.every": "null",
    }  # fmt: skip
    assert train_in_process(tiny_run(shards, tmp_path, "whole", **changes)) == 0
    changes |= {"batch.accumulate": 3, "loss.itc.cache": True}
    said = train(tiny_run(shards, tmp_path, "parts", **changes), 2)
    assert "batch 12 = 3 part(s) of 4 = 2 x 2 device(s) each; contrast compares 12" in said
    whole, parts = (last_checkpoint(tmp_path / name)["model"] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, atol=1e-8, rtol=1e-8, msg=name)
    ours, theirs = rows(tmp_path / "parts"), rows(tmp_path / "whole")
    for one, two in zip(ours, theirs, strict=True):
        assert float(one["train/loss"]) == pytest.approx(float(two["train/loss"]), abs=1e-9)
