"""`benchmarks/gpu.sh`, every command of it, small enough for a processor (slow)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.sh"
TINY = {
    "ROUNDS": "1",
    "BATCH": "8",
    "SAMPLES": "48",
    "STAGE2": "vitg_opt2_7b",
    "FITS": "stage1_vitg",
    "MEMORY": "4GB",
    "OVERRIDES": "vision=tiny_random vision.image_size=32 vision.name=test_vit qformer=tiny "
    "trainer.precision=32-true",
    "OVERRIDES2": "language_model.dtype=float32 language_model.config={model_type:opt,"
    "hidden_size:32,word_embed_proj_dim:32,num_hidden_layers:2,num_attention_heads:2,ffn_dim:64,"
    "vocab_size:99}",
}


@pytest.mark.slow
def test_every_result_is_written(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", str(SCRIPT), str(tmp_path)],
        env=os.environ | TINY | {"PATH": path}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    steps = {f"stage1_vitg{kind}" for kind in ("", "_float8", "_cached", "_loader")}
    steps |= {"stage1_vitg_cached_loader", "stage2_vitg_opt2_7b"}
    names = steps | {"tower_vitg", "tower_vitg_float8", "fit_stage1_vitg"}
    assert {file.stem for file in tmp_path.iterdir()} == names
    for name in steps:
        (record,) = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["equal"], name
        assert record["in_a_row"]["from"] == ("loader" if "loader" in name else "memory")


def test_a_command_that_fails_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "blip2-benchmark"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    (tmp_path / "blip2-prepare").symlink_to(broken)
    done = subprocess.run(
        ["sh", str(SCRIPT), str(tmp_path / "out")],
        env=os.environ | TINY | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().startswith("failed: stage1_vitg stage1_vitg_float8")
    only = subprocess.run(
        ["sh", str(SCRIPT), str(tmp_path / "out")],
        env=os.environ | TINY | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ONLY": "tower_vitg"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert only.stderr.strip() == "failed: tower_vitg"
