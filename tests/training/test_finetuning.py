"""Fine-tuning with a trained image tower: the whole command on the small twins of the experiments.

Proven: the tower learns, is stored and counts as trained; retrieval and captioning go through the
same losses and end with the same weights on 1, 2 and 3 processes, tower included; a run that is
killed ends with the exact bits of an undisturbed one; recomputed blocks and parts of a cached batch
change nothing; each group of weights learns at its layer's rate in every step, after a restart too,
and without layer-wise decay to the very bits of groups without it; `init_from` brings Q-Former and,
where there is one, the tower, its positions fitted to another image size; what cannot be is refused
in one sentence.

`slow`: 2 and 3 processes in float32; of captioning what is one code with retrieval; resuming with
dropout and recomputed blocks; the very bits of both; more of the cases of saving memory.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked import train
from safetensors.torch import save_file
from tiny import tiny_finetuning, tiny_run, train_in_process
from whole_runs import (
    assert_equal_states,
    assert_same_end,
    kill_in_the_middle,
    largest_differences,
    last_checkpoint,
    rows,
)

from blip2_train.data.stream import EvalStream
from blip2_train.models.vision import VisionTower
from blip2_train.training import fit, module
from blip2_train.training.feeding import open_validation, validation_images
from blip2_train.training.loading import evaluate, load_run

TWINS = ("retrieval", "caption")
STEPS = 20
# What is random but for dropout: crops, flips, drawn captions, drawn negatives.
RANDOM = {
    "data.caption": "uniform", "data.crop_scale": "[0.5,1.0]", "data.flip": 0.5,
    "schedule.warmup_steps": 5, "trainer.max_steps": STEPS, "trainer.log_every": 1,
    "validation.every": 10, "checkpoint.every": 5,
}  # fmt: skip
SHORT = {"trainer.max_steps": 4, "validation.every": "null", "schedule.warmup_steps": 2}


def slow(*case: Any) -> Any:
    """A case for `make test-all`."""
    return pytest.param(*case, marks=pytest.mark.slow)


def fine_tune(
    twin: str, shards: Path, runs: Path, name: str, processes: int = 1, **changes: Any
) -> Path:
    words = tiny_finetuning(shards, runs, name, **changes)[twin]
    if processes == 1:
        assert train_in_process(words) == 0
    else:
        train(words, processes)
    return runs / f"{twin}-{name}"


def tower_of(run: Path) -> dict[str, torch.Tensor]:
    model = last_checkpoint(run)["model"]
    return {k.removeprefix("vision."): v for k, v in model.items() if k.startswith("vision.")}


def untrained(**options: Any) -> VisionTower:
    return VisionTower("test_vit", weights="random", **({"image_size": 32} | options))


# -- the number of processes -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(shards: Path, runs: Path) -> dict[str, Path]:
    """Undisturbed runs of one process in float64."""
    double = {**RANDOM, "trainer.precision": "64-true"}
    return {twin: fine_tune(twin, shards, runs, "double-1", **double) for twin in TWINS}


@pytest.mark.parametrize("twin", TWINS)
def test_the_tower_learns(twin: str, alone: dict[str, Path]) -> None:
    tower, before = tower_of(alone[twin]), untrained().double().state_dict()
    assert tower.keys() == before.keys()
    stayed = [name for name, value in tower.items() if value.equal(before[name])]
    assert stayed == []
    moved = max((value - before[name]).abs().max().item() for name, value in tower.items())
    assert moved > 1e-3
    end = last_checkpoint(alone[twin])
    assert "vision" not in end["frozen"]  # it is stored itself
    assert not [name for name in end["model"] if name.startswith("language_model.")]
    losses = [float(row["train/loss"]) for row in rows(alone[twin]) if row["train/loss"]]
    assert len(losses) == STEPS and sum(losses[-5:]) < sum(losses[:5]) - 0.1


@pytest.fixture(scope="module")
def several(shards: Path, runs: Path) -> Callable[[str, int], Path]:
    """The same on several processes, without drawn samples; each is run once."""

    @functools.cache
    def run(twin: str, processes: int) -> Path:
        double = {**RANDOM, "trainer.precision": "64-true", "validation.samples": 0}
        return fine_tune(twin, shards, runs, f"double-{processes}", processes, **double)

    return run


@pytest.mark.parametrize(
    ("twin", "processes"),
    [("retrieval", 2), ("retrieval", 3), slow("caption", 2), ("caption", 3)],
)
def test_the_number_of_processes_changes_nothing(
    twin: str, processes: int, several: Callable[[str, int], Path], alone: dict[str, Path]
) -> None:
    assert max(largest_differences(several(twin, processes), alone[twin]).values()) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("twin", TWINS)
def test_the_number_of_processes_in_float32(twin: str, shards: Path, runs: Path) -> None:
    whole = fine_tune(twin, shards, runs, "single-1", **RANDOM)
    for processes in (2, 3):
        several = fine_tune(twin, shards, runs, f"single-{processes}", processes, **RANDOM)
        apart = largest_differences(several, whole)
        assert apart["losses"] <= 1e-5 and apart["weights"] <= 1e-4


def test_killed_and_continued_on_three(
    shards: Path, tmp_path: Path, several: Callable[[str, int], Path]
) -> None:
    changes = {**RANDOM, "trainer.precision": "64-true", "validation.samples": 0}
    words = tiny_finetuning(shards, tmp_path, "killed", **changes)["retrieval"]
    killed = tmp_path / "retrieval-killed"
    kill_in_the_middle(words, killed, 3, last=STEPS, step=7)
    assert "continuing" in train(words, 3)
    assert_same_end(killed, several("retrieval", 3))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("twin", TWINS)
def test_killed_and_continued_with_dropout(
    twin: str, processes: int, shards: Path, tmp_path: Path
) -> None:
    changes = {
        **RANDOM, "qformer.dropout": 0.1, "vision.gradient_checkpointing": True,
        "validation.every": "null",
    }  # fmt: skip
    whole = fine_tune(twin, shards, tmp_path, "whole", processes, **changes)
    words = tiny_finetuning(shards, tmp_path, "killed", **changes)[twin]
    killed = tmp_path / f"{twin}-killed"
    kill_in_the_middle(words, killed, processes, last=STEPS, step=7)
    assert "continuing" in train(words, processes)
    assert_same_end(killed, whole)


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("twin", TWINS)
def test_recomputed_blocks_change_nothing(twin: str, shards: Path, tmp_path: Path) -> None:
    changes = {**SHORT, "qformer.dropout": 0.1, "trainer.precision": "64-true"}
    plain = fine_tune(twin, shards, tmp_path, "plain", **changes)
    changes["vision.gradient_checkpointing"] = True
    again = fine_tune(twin, shards, tmp_path, "again", **changes)
    a, b = last_checkpoint(plain), last_checkpoint(again)
    for key in ("model", "optimizer"):
        assert_equal_states(a[key], b[key], key)
    assert [row["train/loss"] for row in rows(plain)] == [row["train/loss"] for row in rows(again)]


@pytest.mark.parametrize("processes", [slow(1), 2])
def test_parts_of_a_cached_batch_are_one_batch(
    processes: int, shards: Path, tmp_path: Path
) -> None:
    """GradCache through the tower; on two processes also with recomputed blocks in it."""
    changes: dict[str, Any] = {**SHORT, "trainer.precision": "64-true"}
    whole = fine_tune("retrieval", shards, tmp_path, "whole", **changes)
    changes |= {"batch.accumulate": 3, "loss.itc.cache": True}
    changes["vision.gradient_checkpointing"] = processes == 2
    parts = fine_tune("retrieval", shards, tmp_path, "parts", processes, **changes)
    assert max(largest_differences(parts, whole).values()) <= 1e-9


# -- learning rates --------------------------------------------------------------------------------


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """Of each step that is taken meanwhile: the learning rate of every weight that it used."""
    seen: list[dict[str, float]] = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        (owner,) = owners
        names = {parameter: name for name, parameter in owner.model.named_parameters()}
        seen.append({names[p]: g["lr"] for g in self.param_groups for p in g["params"]})
        return step(self, *args, **kwargs)

    owners: list[Any] = []
    build = fit.build_module

    def remember(*args: Any, **kwargs: Any) -> Any:
        owners[:] = [build(*args, **kwargs)]
        return owners[0]

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    monkeypatch.setattr(fit, "build_module", remember)
    return seen


def wanted_rate(name: str, step: int, decay: float, blocks: int = 5) -> float:
    """By hand: warm-up from 0.1 to 1 in 2 steps, then a cosine to 0 at step 6."""
    whole = [0.1, 0.55, 1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2][step]
    if not name.startswith("vision."):
        return whole
    block = re.match(r"vision\.tower\.blocks\.(\d+)\.", name)
    layer = int(block[1]) + 1 if block else 0  # positions, class token, patches
    return whole * decay ** (blocks + 1 - layer)


@pytest.mark.parametrize("twin", ["retrieval", slow("caption")])
def test_each_layer_learns_at_its_rate(
    twin: str, shards: Path, tmp_path: Path, rates: list[dict[str, float]]
) -> None:
    changes = {
        "trainer.max_steps": 6, "checkpoint.every": 3, "validation.every": "null",
        "optimizer.lr": 1.0e-2, "schedule.min_lr": 0, "schedule.warmup_lr": 1.0e-3,
        "schedule.warmup_steps": 2, "optimizer.layer_decay": 0.8,
    }  # fmt: skip
    run = fine_tune(twin, shards, tmp_path, "run", **changes)
    model = last_checkpoint(run)["model"]
    assert len(rates) == 6 and all(step.keys() == model.keys() for step in rates)
    for number, step in enumerate(rates):
        for name, rate in step.items():
            wanted = 1e-2 * wanted_rate(name, number, 0.8)
            assert rate == pytest.approx(wanted, rel=1e-12), f"{name}, step {number}"
    tower = {rate for name, rate in rates[2].items() if name.startswith("vision.")}
    assert sorted(tower) == pytest.approx([1e-2 * 0.8**n for n in range(6, 0, -1)], rel=1e-12)
    whole = list(rates)
    rates.clear()
    (run / "checkpoints" / "step-00000006.ckpt").unlink()
    assert fine_tune(twin, shards, tmp_path, "run", **changes) == run
    assert rates == whole[3:]
    assert_equal_states(last_checkpoint(run)["model"], model)


def two_groups(model: Any, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """What there was before layers had rates of their own."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for n, p in trained if p.ndim != 1 and not n.endswith(".bias")]
    others = [p for n, p in trained if p.ndim == 1 or n.endswith(".bias")]
    return [
        {"params": decayed, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": others, "weight_decay": 0.0, "lr_scale": 1.0},
    ]


@pytest.mark.slow
def test_without_layer_decay_nothing_changes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**SHORT, "optimizer.layer_decay": 1.0}
    ours = fine_tune("retrieval", shards, tmp_path, "ours", **changes)
    monkeypatch.setattr(module, "parameter_groups", two_groups)
    plain = fine_tune("retrieval", shards, tmp_path, "plain", **changes)
    assert_same_end(ours, plain)


# -- where the weights come from -------------------------------------------------------------------


def interpolated(table: torch.Tensor, side: int) -> torch.Tensor:
    """As the reference does it: bicubic, not aligned to corners, the class token's kept."""
    before = round((table.shape[1] - 1) ** 0.5)
    grid = table[:, 1:].unflatten(1, (before, before)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class First(Exception):
    """Raised where training would begin."""


def initial_model(words: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The weights with which a run begins."""
    found: dict[str, torch.Tensor] = {}
    build = fit.build_module

    def stop(*args: Any, **kwargs: Any) -> Any:
        found.update(build(*args, **kwargs).model.state_dict())
        raise First

    with monkeypatch.context() as patch:
        patch.setattr(fit, "build_module", stop)
        with pytest.raises(First):
            train_in_process(words)
    return found


def test_from_a_frozen_tower_to_larger_images_and_on(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stage 1 at 32 pixels, fine-tuned at 48 and evaluated, then at 80, then frozen."""
    published = untrained(drop_last_block=False).tower.state_dict()
    weights = tmp_path / "tower.safetensors"
    save_file({key: value.contiguous() for key, value in published.items()}, weights)
    here = {"vision.weights": weights}
    assert train_in_process(tiny_run(shards, tmp_path, "stage1", **here, **SHORT)) == 0
    stage1 = last_checkpoint(tmp_path / "stage1")["model"]
    assert not [name for name in stage1 if name.startswith("vision.")]

    # the Q-Former and its heads come from the checkpoint, the tower from its own weights
    begin = {
        **here, **SHORT, "vision.image_size": 48, "validation.every": 4,
        "init_from": tmp_path / "stage1" / "checkpoints" / "step-00000004.ckpt",
    }  # fmt: skip
    words = tiny_finetuning(shards, tmp_path, "first", **begin)["retrieval"]
    caplog.clear()
    model = initial_model(words, monkeypatch)
    assert "an image tower" in caplog.text and "0 not in the checkpoint" in caplog.text
    for name, value in model.items():
        own = name.removeprefix("vision.tower.")
        wanted = stage1[name] if own == name else published[own]
        wanted = interpolated(wanted, 3) if own == "pos_embed" else wanted
        assert value.equal(wanted), name
    assert train_in_process(words) == 0
    tuned = last_checkpoint(tmp_path / "retrieval-first")["model"]
    assert tuned["vision.tower.pos_embed"].shape[1] == 10

    # it can be loaded and measured without the file that it began with
    weights.unlink()
    stage, loaded = load_run(tmp_path / "retrieval-first")
    images = validation_images(stage.cfg, open_validation(stage.cfg), 48, None)
    assert isinstance(images, EvalStream)
    found, _ = evaluate(stage, loaded, images, batch_size=5)
    last = [row for row in rows(tmp_path / "retrieval-first") if row["val/loss"]][-1]
    assert found.metrics["loss"] == pytest.approx(float(last["val/loss"]), abs=1e-6)
    assert found.metrics["i2t_r1"] == pytest.approx(float(last["val/i2t_r1"]), abs=1e-6)

    # a checkpoint that has a tower brings it
    init = tmp_path / "retrieval-first" / "checkpoints" / "step-00000004.ckpt"
    on = {**SHORT, "vision.image_size": 80, "vision.seed": 1, "init_from": init}
    words = tiny_finetuning(shards, tmp_path, "second", **on)["retrieval"]
    for name, value in initial_model(words, monkeypatch).items():
        wanted = tuned[name]
        assert value.equal(interpolated(wanted, 5) if "pos_embed" in name else wanted), name

    # a frozen one is another tower than the Q-Former was trained with
    caplog.clear()
    initial_model(tiny_run(shards, tmp_path, "frozen", init_from=init, **SHORT), monkeypatch)
    assert "vision.trainable=false takes the tower of vision.weights" in caplog.text

    # half a tower is none
    content = torch.load(init, weights_only=True)
    del content["model"]["vision.tower.cls_token"]
    torch.save(content, tmp_path / "half.ckpt")
    words = tiny_finetuning(
        shards, tmp_path, "half", **{**on, "init_from": tmp_path / "half.ckpt"}
    )["retrieval"]
    assert "the first is vision.tower.cls_token" in refusal(words, capsys)


def test_captioning_goes_on_from_stage_2(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q-Former and projection come along, and a trained tower too."""
    first = fine_tune("caption", shards, tmp_path, "first", **SHORT)
    on = {**SHORT, "init": "checkpoint", "vision.image_size": 48, "vision.seed": 1}
    on["init_from"] = first / "checkpoints" / "step-00000004.ckpt"
    words = tiny_finetuning(shards, tmp_path, "second", **on)["caption"]
    model, tuned = initial_model(words, monkeypatch), last_checkpoint(first)["model"]
    assert {"lm_proj.weight", "vision.tower.cls_token", "qformer.query_tokens"} <= tuned.keys()
    for name, wanted in tuned.items():
        fits = interpolated(wanted, 3) if "pos_embed" in name else wanted
        assert model[name].equal(fits), name


# -- refusals --------------------------------------------------------------------------------------


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert train_in_process(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision.dtype": "bfloat16"}, "set vision.dtype=float32"),
        ({"vision.dtype": "bfloat16", "vision.precision": "float8"}, "vision.precision=native"),
        ({"trainer.overlap": "true"}, "set trainer.overlap=false"),
        ({"data.features": "cached"}, "set data.features=computed"),
        ({"vision.trainable": "false"}, "optimizer.layer_decay=0.95 acts on a trained"),
        ({"vision.name": "test_resnet", "vision.drop_last_block": "true"}, "drop_last_block=false"),
        (
            {
                "vision.name": "vgg11", "vision.drop_last_block": "false",
                "vision.image_size": 64, "vision.gradient_checkpointing": "true",
            },
            "vision.gradient_checkpointing=true is not possible with vgg11",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(
    changes: dict[str, Any],
    message: str,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = tiny_finetuning(shards, tmp_path, "refused", **changes)["retrieval"]
    assert message in refusal(words, capsys)


def test_no_features_are_made_of_a_tower_that_learns(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from blip2_train.prepare import main as prepare

    words = tiny_finetuning(shards, tmp_path, "features")["retrieval"]
    assert prepare(["features", str(shards), *words]) == 2
    assert "set vision.trainable=false" in capsys.readouterr().err


def test_a_dry_run_says_what_is_trained(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny_finetuning(shards, tmp_path, "dry")["caption"]
    assert train_in_process([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"vision\.tower +\d[\d,]+ +trained +float32", said)
    assert "frozen tower" not in said and "GFLOP" in said
