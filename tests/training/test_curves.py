"""Options that may only change what a run costs: 300 tiny steps with each of them on and off.

Proven (slow): features from the cache, overlap and checkpointing give the plain run's losses, in
training and validation, bit for bit; parts of a contrastive batch (GradCache) give them up to
rounding. (Compiled blocks: test_compile.py; the tower in float8: test_float8_curve.py.)
"""

from pathlib import Path

import pytest
from tiny import tiny_run, tiny_stage_runs, train_in_process
from whole_runs import assert_same_end, rows

from blip2_train.prepare import main as prepare

COMMON = {
    "trainer.max_steps": 300,
    "trainer.log_every": 10,
    "validation.every": 100,
    "checkpoint.every": 100,
    "data.crop_scale": "null",
    "data.flip": 0,
    "data.decode": "exact",
}
# What each does, and the largest difference of a loss that it may make.
STAGE1 = {
    "cached": ({"data.features": "cached"}, 0.0),
    "overlap": ({"trainer.overlap": "true"}, 0.0),
    "checkpointing": ({"qformer.gradient_checkpointing": "true"}, 0.0),
    "parts": ({"batch.accumulate": 3, "loss.itc.cache": "true"}, 0.01),
}
STAGE2 = {
    "cached": ({"data.features": "cached"}, 0.0),
    "overlap": ({"trainer.overlap": "true"}, 0.0),
    "checkpointing": (
        {"qformer.gradient_checkpointing": "true", "language_model.gradient_checkpointing": "true"},
        0.0,
    ),
}


def largest_difference(ours: Path, theirs: Path) -> float:
    """Of all losses in metrics.csv."""
    return max(
        abs(float(one[name]) - float(two[name]))
        for one, two in zip(rows(ours), rows(theirs), strict=True)
        for name in two
        if name.startswith(("train/loss", "val/loss")) and two[name]
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_an_option_does_not_change_what_is_learned(
    stage: str, shards: Path, tmp_path: Path
) -> None:
    def run(name: str, **changes: object) -> None:
        if stage == "stage1":
            overrides = tiny_run(shards, tmp_path, name, **COMMON, **changes)
        else:
            runs = tiny_stage_runs(shards, tmp_path, **COMMON, **{"run.name": name}, **changes)
            overrides = runs["stage2"]
        assert train_in_process(overrides) == 0

    made = ["features", str(shards), *tiny_run(shards, tmp_path, "none"), "--workers", "1"]
    assert prepare(made) == 0
    run("plain")
    found = {}
    for name, (changes, bound) in (STAGE1 if stage == "stage1" else STAGE2).items():
        run(name, **changes)
        found[name] = largest_difference(tmp_path / name, tmp_path / "plain")
        if bound == 0.0:
            assert_same_end(tmp_path / name, tmp_path / "plain")
        assert found[name] <= bound, found
    print(f"{stage}, largest difference of a loss in 300 steps: {found}")
