"""Runs whose image tower computes in float8.

Proven: the start-up check passes a tower whose features stay and refuses one whose do not, or that
cannot be computed, before anything is compiled; it is the same at every call; long tokens do not
hide the others; both stages train with it, also on two ranks, and their checkpoints say so; a run
does not go on in another precision, and those of before there were two go on; old GPUs and other
precisions are refused at the start.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked import train
from tiny import tiny_run, tiny_stage_runs, train_in_process
from torch import Tensor, nn
from whole_runs import assert_same_end, last_checkpoint, rows

from blip2_train.checkpoint import io
from blip2_train.config import Launch, to_plain
from blip2_train.data.features import tower_identity
from blip2_train.errors import UserError
from blip2_train.models.vision import VisionTower
from blip2_train.prepare import main as prepare
from blip2_train.train import compose
from blip2_train.training import float8
from blip2_train.training.dry_run import describe
from blip2_train.training.float8 import (
    check_gpu,
    made_up_pictures,
    start_tower,
    token_similarity,
)
from blip2_train.training.loading import load_run
from blip2_train.training.resume import check_frozen

pytest.importorskip("torchao")

CPU = torch.device("cpu")
FLOAT8 = {"vision.dtype": "bfloat16", "vision.precision": "float8"}


def tower(**options: Any) -> VisionTower:
    settings = {"weights": "random", "dtype": "bfloat16", "precision": "float8", "image_size": 32}
    return VisionTower("test_vit", **(settings | options))


# -- the start-up check ----------------------------------------------------------------------------


def test_a_tower_whose_features_stay_is_converted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    vision = tower()
    start_tower(vision, CPU)
    twin = tower(precision="native")
    image = made_up_pictures(float8.PICTURES, 32)
    similarity = token_similarity(twin(image), vision(image))
    assert float8.LEAST_SIMILARITY <= similarity < 1
    assert f"cosine with the native features {similarity:.5f}" in caplog.text
    assert "only emulate float8 products" in caplog.text
    assert any(hasattr(p, "qdata") for p in vision.parameters())
    caplog.clear()
    before = twin.digest()
    start_tower(twin, CPU)  # nothing happens, nothing is said
    assert twin.digest() == before and not caplog.text


@pytest.mark.parametrize(
    ("least", "bad", "said"),
    [
        (1.0, 1.0, r"cosine with the native ones is 0\.99\d+ on made-up .* must be at least 1\.0"),
        (0.999, float("nan"), "cosine with the native ones is nan"),
    ],
)
def test_a_tower_whose_features_do_not_stay_is_refused(
    least: float, bad: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float8, "LEAST_SIMILARITY", least)
    vision = tower()
    with torch.no_grad():
        vision.tower.blocks[1].mlp.fc1.weight[0, 0] *= bad
    with pytest.raises(UserError, match=rf"vision\.name=test_vit.*{said}.*precision=native"):
        start_tower(vision, CPU)


def test_blocks_that_mix_strongly_are_refused() -> None:
    """No monkeypatch: random weights that decide the features, as trained ones need not."""
    vision = tower()
    with torch.no_grad():
        for layer in vision.tower.blocks.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(
                    std=layer.in_features**-0.5, generator=torch.Generator().manual_seed(0)
                )
    with pytest.raises(UserError, match=r"is 0\.99[0-8]\d+ on made-up pictures"):
        start_tower(vision, CPU)


def test_a_device_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand more")

    vision = tower()
    convert = vision.convert

    def breaking() -> None:
        convert()
        monkeypatch.setattr(torch, "_scaled_mm", broken)

    monkeypatch.setattr(vision, "convert", breaking)
    said = r"on this device \(CUBLAS_STATUS_NOT_SUPPORTED\); set vision\.precision=native"
    with pytest.raises(UserError, match=said):
        start_tower(vision, CPU)


def test_pictures_are_the_same_at_every_call() -> None:
    before = torch.get_rng_state()
    one, two = made_up_pictures(3, 48), made_up_pictures(3, 48)
    assert one.equal(two) and one.dtype == torch.uint8 and one.shape == (3, 3, 48, 48)
    assert torch.get_rng_state().equal(before)
    assert one.float().std() > 30 and not one[0].equal(one[1])
    near = (one[..., 1:].float() - one[..., :-1].float()).abs().mean()
    assert near < 0.5 * one.float().std()  # smooth, unlike noise


def test_long_tokens_do_not_hide_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    one, noise = (torch.randn(2, 50, 16, generator=generator) for _ in range(2))
    other = one + 0.1 * noise
    one[:, 0] = other[:, 0] = 1000
    whole = torch.cosine_similarity(one.flatten(1), other.flatten(1)).min()
    assert whole > 0.9999 and token_similarity(one, other) < 0.998


def test_old_gpus_are_refused_before_anything_is_read(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    cfg = to_plain(compose(tiny_run(shards, tmp_path, "old", **FLOAT8)))
    with pytest.raises(UserError, match=r"Old GPU has 8\.0"):
        check_gpu(cfg, Launch(), cuda=True)
    check_gpu(cfg, Launch(), cuda=False)
    cfg["vision"]["precision"] = "native"
    check_gpu(cfg, Launch(), cuda=True)
    cfg["vision"]["precision"], cfg["data"]["features"] = "float8", "cached"
    check_gpu(cfg, Launch(), cuda=True)
    check_gpu({"data": cfg["data"]}, Launch(), cuda=True)  # no tower at all


@pytest.mark.gpu
def test_a_gpu_computes_what_a_processor_does() -> None:
    """Also where the processor converted it, which training does not do."""
    image, twin = made_up_pictures(2, 32), tower()
    twin.convert()
    wanted = twin(image)
    vision = tower()
    start_tower(vision, torch.device("cuda"))
    for converted in (vision, twin.cuda()):
        assert token_similarity(converted(image.cuda()).cpu(), wanted) > float8.LEAST_SIMILARITY


# -- whole runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two runs of stage 1, native and in float8, that stopped after 4 steps."""
    runs = tmp_path_factory.mktemp("float8")
    for name, changes in (("native", {"vision.dtype": "bfloat16"}), ("float8", FLOAT8)):
        assert train_in_process([*tiny_run(shards, runs, name, **changes), *STEPS]) == 0
    return runs


STEPS = ["trainer.max_steps=4", "validation.every=null"]
MORE = ["trainer.max_steps=6", "validation.every=null", "resume.allow=[trainer.max_steps,vision]"]


def test_checkpoints_know_the_weights_and_the_precision(finished: Path) -> None:
    ours, theirs = (last_checkpoint(finished / name) for name in ("float8", "native"))
    identity = theirs["frozen"]["vision"]
    assert identity.keys() == {"name", "weights", "digest"}  # as before there were two
    assert ours["frozen"]["vision"] == identity | {"precision": "float8"}
    assert not [name for name in ours["model"] if name.startswith("vision.")]
    flops = [rows(finished / n, without_speed=False)[0] for n in ("float8", "native")]
    assert all(float(row["model_flops_utilisation"]) > 0 for row in flops)


@pytest.mark.slow
def test_a_run_in_float8_goes_on(finished: Path, shards: Path, tmp_path: Path) -> None:
    resumed = [*tiny_run(shards, finished, "float8", **FLOAT8), *MORE]
    whole = [*tiny_run(shards, tmp_path, "whole", **FLOAT8), *MORE]
    assert train_in_process(resumed) == train_in_process(whole) == 0
    ours, theirs = (last_checkpoint(p) for p in (finished / "float8", tmp_path / "whole"))
    assert all(ours["model"][name].equal(value) for name, value in theirs["model"].items())
    _, model = load_run(finished / "float8")
    assert any(hasattr(p, "qdata") for p in model.vision.parameters())


@pytest.mark.parametrize(("name", "now"), [("native", "float8"), ("float8", "native")])
def test_no_run_changes_its_precision(
    name: str, now: str, finished: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"vision.dtype": "bfloat16", "vision.precision": now}
    assert train_in_process([*tiny_run(shards, finished, name, **changes), *MORE]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert f"vision.precision: {name} -> {now}" in error


def test_the_identity_refuses_it_too() -> None:
    native = {"vision": {"name": "a", "weights": "random", "digest": "0"}}
    converted = {"vision": native["vision"] | {"precision": "float8"}}
    for saved, now in ((native, converted), (converted, native)):
        check_frozen(now, {"frozen": now}, Path("it.ckpt"))
        check_frozen(now, None, None)
        with pytest.raises(UserError, match=r"vision\.precision=\w+, and it\.ckpt was trained"):
            check_frozen(now, {"frozen": saved}, Path("it.ckpt"))


def test_a_native_checkpoint_of_before_goes_on(
    finished: Path, shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "native", tmp_path / "old")
    path = tmp_path / "old" / "checkpoints" / "step-00000004.ckpt"
    content = io.load(path)
    config = yaml.safe_load(content["config"])
    assert config["vision"].pop("precision") == "native"
    io.save(path, content | {"config": yaml.safe_dump(config)})
    overrides = tiny_run(shards, tmp_path, "old", **{"vision.dtype": "bfloat16"})
    assert train_in_process([*overrides, *MORE]) == 0
    assert last_checkpoint(tmp_path / "old")["step"] == 6


def test_two_ranks_train_in_it(finished: Path, shards: Path, tmp_path: Path) -> None:
    said = train([*tiny_run(shards, tmp_path, "two", **FLOAT8), *STEPS], 2)
    assert "cosine with the native features" in said
    for ours, theirs in zip(rows(tmp_path / "two"), rows(finished / "float8"), strict=False):
        assert float(ours["train/loss"]) == pytest.approx(float(theirs["train/loss"]), abs=0.05)


def test_cached_features_know_it(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Computed in float8 once, they train as the tower would; native ones are another cache."""
    whole = {"data.crop_scale": "null", "data.flip": 0, "data.decode": "exact"} | FLOAT8
    folder = shutil.copytree(shards, tmp_path / "shards")
    # not the training's batch size: a token's scale is its own
    overrides = tiny_run(folder, tmp_path, "none", **FLOAT8)
    assert prepare(["features", str(folder), *overrides, "--workers", "1", "--batch", "16"]) == 0
    for kind in ("computed", "cached"):
        changes = whole | {"data.features": kind}
        assert train_in_process([*tiny_run(folder, tmp_path, kind, **changes), *STEPS]) == 0
    assert_same_end(tmp_path / "cached", tmp_path / "computed")
    identities = [last_checkpoint(tmp_path / kind)["frozen"] for kind in ("cached", "computed")]
    assert identities[0] == identities[1] and identities[0]["vision"]["precision"] == "float8"
    changes = whole | {"data.features": "cached", "vision.precision": "native"}
    capsys.readouterr()
    assert train_in_process([*tiny_run(folder, tmp_path, "other", **changes), *STEPS]) == 2
    assert "differs in vision.precision" in capsys.readouterr().err


def test_native_features_of_before_are_found() -> None:
    before = {"name": "test_vit", "weights": "random", "dtype": "bfloat16", "seed": 0}
    now = {"_target_": "VisionTower", **before, "precision": "native"}
    assert tower_identity(now) == tower_identity(before) == before
    assert tower_identity(now | {"precision": "float8"}) == before | {"precision": "float8"}


def test_stage_2_trains_in_it(shards: Path, tmp_path: Path) -> None:
    overrides = tiny_stage_runs(shards, tmp_path, **FLOAT8, **{"validation.every": "null"})
    assert train_in_process([*overrides["stage2"], "trainer.max_steps=2", "run.name=two"]) == 0
    frozen = last_checkpoint(tmp_path / "two")["frozen"]
    assert frozen["vision"]["precision"] == "float8" and "precision" not in frozen["language_model"]


def test_a_refused_start_is_one_sentence(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(float8, "LEAST_SIMILARITY", 1.0)
    assert train_in_process(tiny_run(shards, tmp_path, "far", **FLOAT8)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: vision.precision=float8 changes the features")
    assert error.count("\n") == 1 and not list((tmp_path / "far").rglob("*.ckpt"))


@pytest.mark.parametrize("change", [{"vision.dtype": "float32"}, {"trainer.precision": "64-true"}])
def test_other_precisions_do_not_go_with_it(
    change: dict[str, str], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_in_process(tiny_run(shards, tmp_path, "bad", **(FLOAT8 | change))) == 2
    ((key, value),) = change.items()
    error = capsys.readouterr().err
    assert error.startswith("error: vision.precision=float8 ") and f"{key}={value}" in error


def test_a_dry_run_describes_it(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    describe(to_plain(compose(tiny_run(shards, tmp_path, "dry", **FLOAT8))), Launch())
    said = capsys.readouterr().out
    assert "precision: float8" in said and "arithmetic per sample: frozen tower" in said
