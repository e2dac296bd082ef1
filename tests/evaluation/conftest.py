"""Finished runs of each kind, to be evaluated."""

from pathlib import Path

import pytest
from tiny import tiny_run, tiny_stage_runs, train_in_process


@pytest.fixture(scope="session")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the runs stage1, stage2 and clip, of two steps each."""
    runs = tmp_path_factory.mktemp("finished")
    short = {"trainer.max_steps": 2, "validation.every": "null", "schedule.warmup_steps": 1}
    stages = tiny_stage_runs(shards, runs, **short)
    # weights so large that images and texts differ
    settings = {"stage1": tiny_run(shards, runs, "stage1", **short, **{"optimizer.lr": 0.03})}
    for kind in ("stage2", "clip"):
        settings[kind] = [*stages[kind], "optimizer.lr=0.03", f"run.name={kind}"]
    for overrides in settings.values():
        assert train_in_process(overrides) == 0
    return runs
