"""Shards of questions and short runs on them, that several tests need."""

from pathlib import Path
from typing import Any

from blip2_train.data.index import read_index, write_index
from blip2_train.data.shards import ShardReader, write_shard
from blip2_train.prepare import main as prepare


def question_shards(folder: Path, samples: int = 60) -> Path:
    """Rendered scenes of 32 pixels with five questions each, and a tokenizer that knows these."""
    options = f"--samples {samples} --held-out 12 --size 32 --samples-per-shard 25 --workers 1"
    words = ["synthetic", "--questions", "--out", str(folder), *options.split()]
    assert prepare([*words, "--tokenizer", "200"]) == 0
    return folder


def vqa_run(shards: Path, runs: Path, name: str, **changes: Any) -> list[str]:
    """Overrides of the tiny twin, in seconds."""
    settings: dict[str, Any] = {
        "experiment": "finetune_vqa_tiny",
        "data.sources.synthetic.shards": shards,
        "data.validation.shards": shards,
        "data.num_workers": 0,
        "text.tokenizer": shards / "tokenizer",
        "language_model.tokenizer": shards / "tokenizer",
        "language_model.config.hidden_size": 32,
        "language_model.config.word_embed_proj_dim": 32,
        "language_model.config.ffn_dim": 64,
        "+language_model.config.init_std": 0.3,  # with 0.02 it could hardly say anything
        "vision.name": "test_vit",
        "vision.image_size": 32,
        "qformer.hidden_size": 32,
        "qformer.num_layers": 2,
        "qformer.num_heads": 2,
        "qformer.intermediate_size": 64,
        "qformer.num_query_tokens": 4,
        "batch.size": 12,
        "schedule.warmup_steps": 5,
        "trainer.max_steps": 20,
        "trainer.log_every": 1,
        "trainer.accelerator": "cpu",
        "validation.every": 10,
        "validation.batch_size": 5,
        "validation.samples": 2,
        "checkpoint.every": 5,
        "wandb.mode": "disabled",
        "run.dir": runs,
        "run.name": name,
    }
    return [f"{key}={value}" for key, value in (settings | changes).items()]


def without_captions(shards: Path, folder: Path, split: str = "train") -> Path:
    """The samples of a split with their questions alone."""
    found = [info for info in read_index(shards).values() if info.split == split]
    folder.mkdir(parents=True)
    written = []
    for info in found:
        reader = ShardReader(shards / info.name, info)
        samples = [reader.read(number) for number in range(len(reader))]
        content = [
            {"__key__": raw.key, "jpg": raw.image, "json": {**raw.meta, "captions": []}}
            for raw in samples
        ]
        written.append(write_shard(folder / info.name, content))
    write_index(folder, written)
    return folder
