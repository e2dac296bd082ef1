"""A continued run keeps its W&B run; the runs of a sweep have one each. Without a network."""

from pathlib import Path

import pytest
from tiny import tiny_run, train_in_process
from whole_runs import last_checkpoint

SHORT = {"wandb.mode": "offline", "validation.every": "null"}


def ids(run: Path) -> list[str]:
    """Of the W&B runs that were written there."""
    return [path.name.rsplit("-", 1)[1] for path in sorted(run.glob("wandb/offline-run-*"))]


def test_a_continued_run_keeps_its_id(shards: Path, tmp_path: Path) -> None:
    overrides = [*tiny_run(shards, tmp_path, "run", **SHORT), "resume.allow=[trainer.max_steps]"]
    assert train_in_process([*overrides, "trainer.max_steps=4"]) == 0
    (first,) = ids(tmp_path / "run")
    assert last_checkpoint(tmp_path / "run")["wandb_id"] == first
    assert train_in_process([*overrides, "trainer.max_steps=8"]) == 0
    assert set(ids(tmp_path / "run")) == {first}


@pytest.mark.slow
def test_runs_of_a_sweep(shards: Path, tmp_path: Path) -> None:
    overrides = tiny_run(shards, tmp_path, "tiny", **SHORT | {"trainer.max_steps": 2})
    assert train_in_process(["-m", *overrides, "seed=1,2"]) == 0
    found = [ids(tmp_path / "tiny_sweep" / f"seed-{seed}") for seed in (1, 2)]
    assert [len(names) for names in found] == [1, 1] and found[0] != found[1]
