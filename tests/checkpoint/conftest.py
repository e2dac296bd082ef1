"""Small trained models of each stage, and what blip2-convert makes of them."""

from pathlib import Path
from typing import Any

import pytest
from checkpoint.converting import convert
from tiny import tiny_run, tiny_stage_runs, train_in_process

T5 = "{model_type: t5, d_model: 32, d_kv: 16, d_ff: 40, num_layers: 2, num_decoder_layers: 2, "
T5 += "num_heads: 2, feed_forward_proj: gated-gelu, tie_word_embeddings: false, "
T5 += "decoder_start_token_id: 0}"
QUICK: dict[str, Any] = {"validation.every": "null", "trainer.max_steps": 4}


@pytest.fixture(scope="session")
def known(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Overrides of a run of stage 1, and of stage 2 with a decoder alone and with an encoder."""
    folder = tmp_path_factory.mktemp("runs")
    stage2 = tiny_stage_runs(shards, folder, **QUICK)["stage2"]
    t5 = [o for o in stage2 if not o.startswith("language_model.config=")]
    return {
        "stage1": tiny_run(shards, folder, "stage1", **QUICK),
        "stage2": [*stage2, "run.name=stage2"],
        "t5": [*t5, "run.name=t5", f"language_model.config={T5}"],
    }


@pytest.fixture(scope="session")
def runs(known: dict[str, list[str]]) -> dict[str, Path]:
    """Folders of these runs, trained."""
    found = {}
    for name, overrides in known.items():
        assert train_in_process(overrides) == 0
        place = next(o for o in overrides if o.startswith("run.dir=")).removeprefix("run.dir=")
        found[name] = Path(place) / name
    return found


@pytest.fixture(scope="session")
def made(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each run as a LAVIS file and a folder of HF."""
    folder = tmp_path_factory.mktemp("made")
    for name, run in runs.items():
        assert convert("blip2-train", "hf", run, folder / f"{name}.hf") == 0
        assert convert("blip2-train", "lavis", run, folder / f"{name}.pth") == 0
    return {path.name: path for path in folder.iterdir()}
