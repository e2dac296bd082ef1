"""64 real pairs can be learned by heart: every loss reaches its floor, retrieval is perfect.

The classic smoke test of stage 1: where matching stays at 0.6365 here, something is wrong.
"""

import json
from pathlib import Path

import pytest
import torch
from tiny import train_in_process
from whole_runs import last_metrics

from blip2_train.checkpoint import io
from blip2_train.losses import smoothing_floor
from blip2_train.prepare import main as prepare

PAIRS = 64


@pytest.mark.slow
def test_64_real_pairs_are_learned_by_heart(realdata: Path, tmp_path: Path) -> None:
    source = json.loads((realdata / "flickr8k" / "dataset_flickr8k.json").read_text())
    images = [image for image in source["images"] if image["split"] == "train"][:PAIRS]
    captions = tmp_path / "captions.jsonl"
    captions.write_text(
        "".join(
            json.dumps({"image": image["filename"], "caption": image["sentences"][0]["raw"]}) + "\n"
            for image in images
        )
    )
    shards = tmp_path / "shards"
    folder = ["folder", "--images", str(realdata / "flickr8k" / "Images")]
    folder += ["--captions", str(captions), "--split", "train", "--out", str(shards)]
    assert prepare([*folder, "--tokenizer", "600", "--workers", "1"]) == 0

    overrides = [
        "experiment=stage1_flickr8k_tiny",
        f"data.sources.flickr8k.shards={shards}",
        f"data.validation.shards={shards}",
        "data.validation.split=train",
        f"text.tokenizer={shards / 'tokenizer'}",
        "data.num_workers=0",
        "trainer.max_steps=300",
        "batch.size=32",
        "trainer.accelerator=cpu",
        "validation.every=300",
        "validation.rerank_k=16",
        "wandb.mode=disabled",
        f"run.dir={tmp_path}",
        "run.name=overfit",
    ]
    assert train_in_process(overrides) == 0
    learned = last_metrics(tmp_path / "overfit" / "metrics.csv")["val"]
    path = io.newest_valid(tmp_path / "overfit" / "checkpoints")
    assert path is not None
    vocabulary = len(torch.load(path, weights_only=True)["model"]["qformer.lm_head.bias"])
    floor = smoothing_floor(vocabulary, 0.1)
    print({"lm floor": floor, **learned})
    assert learned["itm_accuracy"] > 0.95
    assert learned["loss_itm"] < 0.3
    assert learned["loss_lm"] < floor + 0.2
    assert learned["i2t_r1"] == learned["t2i_r1"] == 100.0
