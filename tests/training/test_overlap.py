"""`trainer.overlap`: the tower sees a batch while the one before is trained on.

Proven: a whole run is the same, bit for bit, in every stage with images; the tower has seen the
next batch before a step begins, and each batch once. (On a GPU: test_gpu.py.)
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_run, tiny_stage_runs, train_in_process
from whole_runs import assert_same_end

from blip2_train.checkpoint import io
from blip2_train.models.vision import VisionTower
from blip2_train.training.stage1 import Stage1Module


def test_stage_1_is_the_same(shards: Path, tmp_path: Path) -> None:
    # dropout and parts: what a step draws must not depend on when the tower ran
    common = {"batch.accumulate": 2, "loss.itc.cache": "true", "qformer.dropout": 0.1}
    for overlap in ("false", "true"):
        changes = common | {"trainer.overlap": overlap, "trainer.max_steps": 8}
        assert train_in_process(tiny_run(shards, tmp_path, f"run-{overlap}", **changes)) == 0
    assert_same_end(tmp_path / "run-true", tmp_path / "run-false")


def test_an_interrupted_run_may_turn_it_on(shards: Path, tmp_path: Path) -> None:
    common = {"checkpoint.every": 3, "checkpoint.keep_last": 9, "trainer.max_steps": 6}
    assert train_in_process(tiny_run(shards, tmp_path, "whole", **common)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "two")
    newest = io.newest_valid(tmp_path / "two" / "checkpoints")
    assert newest is not None
    newest.unlink()
    common |= {"trainer.overlap": "true"}
    assert train_in_process(tiny_run(shards, tmp_path, "two", **common)) == 0
    assert_same_end(tmp_path / "two", tmp_path / "whole")


@pytest.mark.parametrize(
    "stage",
    [
        "stage2",
        pytest.param("clip", marks=pytest.mark.slow),
        pytest.param("lm", marks=pytest.mark.slow),
    ],
)
def test_other_stages_are_the_same(stage: str, shards: Path, tmp_path: Path) -> None:
    for overlap in ("false", "true"):
        changes = {"trainer.overlap": overlap, "trainer.max_steps": 4, "run.name": f"run-{overlap}"}
        assert train_in_process(tiny_stage_runs(shards, tmp_path, **changes)[stage]) == 0
    assert_same_end(tmp_path / "run-true", tmp_path / "run-false")


def test_the_tower_is_a_batch_ahead(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    forward, step = VisionTower.forward, Stage1Module.step

    def seen(self: VisionTower, image: Any) -> Any:
        happened.append(f"tower {len(image)}")
        return forward(self, image)

    def trained(self: Stage1Module, batch: Any, *given: Any) -> Any:
        happened.append(f"step {len(batch['image_tokens'])}")
        return step(self, batch, *given)

    monkeypatch.setattr(VisionTower, "forward", seen)
    monkeypatch.setattr(Stage1Module, "step", trained)
    changes = {"trainer.overlap": "true", "trainer.max_steps": 3, "validation.every": "null"}
    assert train_in_process(tiny_run(shards, tmp_path, "run", **changes)) == 0
    real = [event for event in happened if event.endswith("12")]
    assert real[:6] == ["tower 12", "tower 12", "step 12", "tower 12", "step 12", "tower 12"]
