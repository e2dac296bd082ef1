"""Loss curves with the image tower in float8 and in bfloat16.

Proven: the losses of the first steps hardly differ, and differ (the option does something); over
300 steps the smoothed losses stay together (slow).
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_run, train_in_process
from whole_runs import rows

pytest.importorskip("torchao")

# Twice the largest gap of three seeds: another processor rounds differently, and over 300 steps
# that leads as far away. A tower in float32 is as far from one in bfloat16.
BOUNDS = {
    "train/loss": 0.17,
    "train/loss_itc": 0.21,
    "train/loss_itm": 0.0026,
    "train/loss_lm": 0.055,
}


def curves(shards: Path, folder: Path, **changes: Any) -> dict[str, dict[str, np.ndarray]]:
    """Logged losses {precision: {name: [rows]}} of two runs that differ in nothing else."""
    found = {}
    for precision in ("native", "float8"):
        settings = {"vision.dtype": "bfloat16", "vision.precision": precision, **changes}
        settings["validation.every"] = "null"
        assert train_in_process(tiny_run(shards, folder, precision, **settings)) == 0
        table = rows(folder / precision)
        found[precision] = {name: np.array([float(r[name]) for r in table]) for name in BOUNDS}
    return found


def largest_gaps(found: dict[str, dict[str, np.ndarray]], window: int) -> dict[str, float]:
    """Of each loss, the largest difference of its means over `window` rows; printed."""
    mean = np.ones(window) / window
    gaps = {}
    for name in BOUNDS:
        ours, theirs = (np.convolve(found[p][name], mean, "valid") for p in ("float8", "native"))
        gaps[name] = float(abs(ours - theirs).max())
        print(f"{name}: {gaps[name]:.5f} nats between {theirs[0]:.3f} and {theirs[-1]:.3f}")
    return gaps


def test_the_first_steps_hardly_differ(shards: Path, tmp_path: Path) -> None:
    found = curves(shards, tmp_path, **{"trainer.max_steps": 8, "trainer.log_every": 1})
    gaps = largest_gaps(found, window=1)  # 0.0145 at most
    assert all(0 < gap < 0.03 for gap in gaps.values())


@pytest.mark.slow
def test_the_curves_stay_together(shards: Path, tmp_path: Path) -> None:
    changes = {"trainer.max_steps": 300, "trainer.log_every": 1, "checkpoint.every": 300}
    gaps = largest_gaps(curves(shards, tmp_path, **changes), window=50)
    assert all(gap < BOUNDS[name] for name, gap in gaps.items())
