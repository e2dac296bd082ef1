"""Small models, batches and runs that many tests need."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip2_train.data.batch import lm_targets, text_tokens
from blip2_train.models.qformer import QFormer
from blip2_train.models.rows import Group, Span
from blip2_train.models.stage1 import Blip2Stage1
from blip2_train.training.objectives import ItcConfig, LossConfig

VOCAB, WIDTH, PATCHES, TEXT = 23, 12, 5, 9  # word pieces with [DEC], tower width, tokens, text


class NoTower(nn.Module):
    """Stands for the image tower where a test starts from its features."""


def tiny_model(dropout: float = 0.0, **changes: Any) -> Blip2Stage1:
    """Q-Former of width 16 and 3 blocks, drawn from seed 0."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_layers": 3,
        "num_heads": 2,
        "intermediate_size": 24,
        "num_query_tokens": 4,
        "max_positions": TEXT,
        "dropout": dropout,
    }
    qformer = QFormer(vocab_size=VOCAB, vision_width=WIDTH, **(sizes | changes))
    model = Blip2Stage1(
        NoTower(),  # type: ignore[arg-type]
        qformer,
        dec_token_id=VOCAB - 1,
        end_token_id=3,
        embed_dim=6,
    )
    for parameter in model.parameters():  # larger weights: everything then matters
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def tiny_batch(size: int, seed: int = 0, ids: list[int] | None = None) -> dict[str, Any]:
    """Captions of 3 to TEXT tokens and image tokens under `image_embeds`; float64."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, TEXT + 1, (size,), generator=generator)
    mask = (torch.arange(TEXT) < lengths[:, None]).long()
    input_ids = torch.randint(5, VOCAB - 1, (size, TEXT), generator=generator)
    input_ids[:, 0] = 2
    input_ids[torch.arange(size), lengths - 1] = 3
    return {
        "input_ids": input_ids * mask,
        "attention_mask": mask,
        "image_id": torch.arange(size) if ids is None else torch.tensor(ids),
        "text_index": text_tokens(mask),
        "tokens": mask.sum(dim=1).tolist(),
        "lm_index": lm_targets(mask),
        "text_length": int(lengths.max()),
        "image_embeds": torch.randn(size, PATCHES, WIDTH, generator=generator, dtype=torch.float64),
    }


def rows_of(batch: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Some rows of a batch; its text length stays that of the whole."""
    part = {k: v[rows] for k, v in batch.items() if isinstance(v, Tensor) and "_index" not in k}
    part["text_length"] = batch["text_length"]
    part["text_index"] = text_tokens(part["attention_mask"])
    part["tokens"] = batch["tokens"][rows]
    part["lm_index"] = lm_targets(part["attention_mask"])
    return part


def one_pass(qformer: QFormer, image: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Every position's state [R, Q + T, D] of R pairs, under any mask; nothing is left out."""
    (R, T), Q = ids.shape, qformer.num_query_tokens
    spans = Span(0, R, Q), Span(R * Q, R, T)
    hidden = torch.cat([qformer.embed_queries(R), qformer.embed_text(ids)])
    hidden, _ = qformer._blocks(hidden, [Group(spans, mask)], R * Q, [(image, 1)])
    return torch.cat([span.pad(hidden) for span in spans], dim=1)


def loss_config(
    gradient: str = "reference", normalise: str = "global", **weights: float
) -> LossConfig:
    return LossConfig(
        weights={"itc": 1.0, "itm": 1.0, "lm": 1.0} | weights,
        normalise=normalise,
        itc=ItcConfig(0.1, gradient),
    )


def tiny_run(shards: Path, runs: Path, name: str, **changes: Any) -> list[str]:
    """Overrides of a run of a few seconds on synthetic shards."""
    settings: dict[str, Any] = {
        "experiment": "stage1_flickr8k_tiny",
        "data": "synthetic",
        "data.sources.synthetic.shards": shards,
        "data.validation.shards": shards,
        "data.num_workers": 0,
        "text.tokenizer": shards / "tokenizer",
        "vision.name": "test_vit",
        "vision.image_size": 32,
        "qformer.hidden_size": 32,
        "qformer.num_layers": 2,
        "qformer.num_heads": 2,
        "qformer.intermediate_size": 64,
        "qformer.num_query_tokens": 4,
        "batch.size": 12,
        "trainer.max_steps": 12,
        "trainer.log_every": 2,
        "trainer.accelerator": "cpu",
        "validation.every": 6,
        "validation.batch_size": 5,
        "validation.samples": 2,
        "checkpoint.every": 4,
        "wandb.mode": "disabled",
        "run.dir": runs,
        "run.name": name,
    }
    return [f"{key}={value}" for key, value in (settings | changes).items()]


def command(overrides: list[str], processes: int = 1) -> list[str]:
    """The command line that trains, under torchrun for several processes."""
    if processes == 1:
        return [sys.executable, "-m", "blip2_train.train", *overrides]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [*launcher, "--module", "blip2_train.train", *overrides]


def train_in_process(overrides: list[str]) -> int:
    """Exit code of `blip2-train` with these overrides, in this process."""
    from blip2_train.train import run

    return run(overrides)


def run_command(
    overrides: list[str], processes: int = 1, **options: Any
) -> subprocess.CompletedProcess:
    """Runs the command and waits; stdout and stderr come back as text."""
    return subprocess.run(
        command(overrides, processes), capture_output=True, text=True, timeout=300, **options
    )


def tiny_finetuning(shards: Path, runs: Path, name: str, **changes: Any) -> dict[str, list[str]]:
    """Overrides of a run of a few seconds of each of the small fine-tuning experiments.

    Their names are "retrieval" and "caption", the runs' folders `name` with those in front.
    """
    twins = {
        "retrieval": {"text.tokenizer": shards / "tokenizer"},
        "caption": {
            "language_model.tokenizer": shards / "tokenizer",
            "language_model.config.hidden_size": 32,
            "language_model.config.word_embed_proj_dim": 32,
            "language_model.config.num_attention_heads": 2,
            "language_model.config.ffn_dim": 64,
        },
    }
    found = {}
    for twin, own in twins.items():
        settings = {"experiment": f"finetune_{twin}_tiny", **own, **changes}
        words = tiny_run(shards, runs, f"{twin}-{name}", **settings)
        if twin == "caption":
            words = [word for word in words if not word.startswith("text.tokenizer")]
        found[twin] = words
    return found


def tiny_stage_runs(shards: Path, runs: Path, **changes: Any) -> dict[str, list[str]]:
    """Overrides of a run of a few seconds of every other stage; stage 2 builds on nothing."""
    common: dict[str, Any] = {
        "data": "synthetic",
        "data.sources.synthetic.shards": shards,
        "data.validation.shards": shards,
        "data.num_workers": 0,
        "batch.size": 12,
        "schedule.warmup_steps": 4,
        "trainer.max_steps": 12,
        "trainer.log_every": 2,
        "trainer.accelerator": "cpu",
        "validation.every": 6,
        "validation.batch_size": 5,
        "validation.samples": 2,
        "checkpoint.every": 4,
        "wandb.mode": "disabled",
        "run.dir": runs,
    }
    clip = {
        "experiment": "clip_flickr8k_tiny",
        "text.tokenizer": shards / "tokenizer",
        "image_encoder.name": "test_vit",
        "image_encoder.image_size": 32,
        "text_encoder.hidden_size": 32,
        "text_encoder.num_layers": 1,
        "text_encoder.num_heads": 2,
        "text_encoder.intermediate_size": 64,
        "model.embed_dim": 16,
    }
    lm = {
        "experiment": "lm_flickr8k_tiny",
        "causal_lm.tokenizer": shards / "tokenizer",
        "causal_lm.config.hidden_size": 32,
        "causal_lm.config.word_embed_proj_dim": 32,
        "causal_lm.config.num_hidden_layers": 2,
        "causal_lm.config.ffn_dim": 64,
        "causal_lm.config.num_attention_heads": 2,
    }
    config = "{model_type: opt, hidden_size: 32, word_embed_proj_dim: 32, num_hidden_layers: 2, "
    config += "num_attention_heads: 2, ffn_dim: 64, max_position_embeddings: 64, dropout: 0.1}"
    stage2 = {
        "experiment": "stage2_flickr8k_tiny",
        "init": "random",
        "vision": "tiny_random",
        "vision.name": "test_vit",
        "vision.image_size": 32,
        "qformer.hidden_size": 32,
        "qformer.num_layers": 2,
        "qformer.num_heads": 2,
        "qformer.intermediate_size": 64,
        "qformer.num_query_tokens": 4,
        "language_model.name": "null",
        "language_model.weights": "random",
        "language_model.config": config,
        "language_model.tokenizer": shards / "tokenizer",
    }
    stages = {"clip": clip, "lm": lm, "stage2": stage2}
    return {
        name: [f"{key}={value}" for key, value in (own | common | changes).items()]
        for name, own in stages.items()
    }
