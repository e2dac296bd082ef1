"""What each key of the configuration may be, by itself; rules across keys are in config.py."""

import math
from collections.abc import Mapping
from typing import Any

# What single keys may be, in the stages that have them: one of some values,
CHOICES: dict[str, tuple[str, ...]] = {
    "stage": ("stage1", "stage2", "clip", "lm"),
    "init": ("checkpoint", "bert", "random"),
    "text.prefix": ("none", "random_split"),
    "loss.gradient": ("reference", "full"),
    "image_encoder.pool": ("head", "max", "mean"),
    "image_encoder.position": ("learned", "sincos"),
    "language_model.weights": ("pretrained", "random"),
    "language_model.dtype": ("bfloat16", "float16", "float32"),
    "language_model.quantization": (
        "bitsandbytes_int8", "bitsandbytes_nf4", "torchao_int8", "torchao_int4",
    ),
    "loss.itc.gradient": ("reference", "full"),
    "loss.normalise": ("global", "rank"),
    "trainer.precision": ("32-true", "64-true", "bf16-mixed"),
    "trainer.accelerator": ("auto", "cpu", "gpu"),
    "vision.dtype": ("float32", "bfloat16"),
    "vision.precision": ("native", "float8"),
    "data.caption": ("uniform", "first", "weighted"),
    "data.decode": ("fast", "exact"),
    "data.features": ("computed", "cached"),
    "data.mode": ("indexed", "stream"),
    "data.text": ("captions", "questions"),
    "data.on_bad_shard": ("error", "skip"),
    "wandb.mode": ("auto", "online", "offline", "disabled"),
}  # fmt: skip
# a whole number of at least,
COUNTS = {
    "batch.accumulate": 1,
    "batch.size": 1,
    "checkpoint.every": 1,
    "checkpoint.keep_best": 0,
    "checkpoint.keep_every": 1,
    "checkpoint.keep_last": 1,
    "data.locality": 1,
    "data.max_words": 1,
    "data.num_workers": 0,
    "data.shuffle_window": 1,
    "qformer.cross_attention_freq": 1,
    "qformer.hidden_size": 1,
    "qformer.intermediate_size": 1,
    "qformer.max_positions": 1,
    "qformer.num_heads": 1,
    "qformer.num_layers": 1,
    "qformer.num_query_tokens": 1,
    "seed": 0,
    "vision.image_size": 1,
    "image_encoder.image_size": 1,
    "image_encoder.seed": 0,
    "language_model.seed": 0,
    "text_encoder.hidden_size": 1,
    "text_encoder.intermediate_size": 1,
    "text_encoder.max_positions": 1,
    "text_encoder.num_heads": 1,
    "text_encoder.num_layers": 1,
    "model.vocab_size": 1,
    "validation.max_new_tokens": 1,
    "validation.num_beams": 1,
    "model.embed_dim": 1,
    "text.vocab_size": 1,
    "schedule.steps_per_epoch": 1,
    "schedule.warmup_steps": 0,
    "text.bucket": 1,
    "text.max_question_tokens": 3,
    "text.max_tokens": 3,
    "text.parts": 1,
    "trainer.devices": 1,
    "trainer.log_every": 1,
    "trainer.max_consecutive_skips": 1,
    "trainer.max_steps": 1,
    "validation.batch_size": 1,
    "validation.every": 1,
    "validation.max_images": 1,
    "validation.rerank_k": 0,
    "validation.samples": 0,
}
# or a number within bounds, both included; lists have it for each of their two numbers.
NUMBERS: dict[str, tuple[float, float]] = {
    "data.cache_gb": (1e-9, math.inf),
    "data.crop_scale": (1e-6, 1),
    "data.flip": (0, 1),
    "data.max_skip_fraction": (0, 1),
    "data.retry_seconds": (0, math.inf),
    "trainer.hang_seconds": (1, 1e6),
    "loss.smoothing": (0, 1 - 1e-9),
    "loss.itc.smoothing": (0, 1 - 1e-9),
    "loss.lm.smoothing": (0, 1 - 1e-9),
    "loss.weights.itc": (0, math.inf),
    "loss.weights.itm": (0, math.inf),
    "loss.weights.lm": (0, math.inf),
    "model.temp": (0.001, 0.5),
    "optimizer.betas": (0, 1 - 1e-9),
    "optimizer.eps": (0, math.inf),
    "optimizer.layer_decay": (1e-6, 1),
    "optimizer.grad_clip": (1e-12, math.inf),
    "optimizer.lr": (0, math.inf),
    "optimizer.weight_decay": (0, math.inf),
    "qformer.query_std": (1e-12, math.inf),
    "schedule.min_lr": (0, math.inf),
    "schedule.warmup_lr": (0, math.inf),
}
PAIRS = ("data.crop_scale", "optimizer.betas")
NULLABLE = (
    "causal_lm.end",
    "checkpoint.keep_every",
    "data.cache_dir",
    "data.crop_scale",
    "model.vocab_size",
    "optimizer.grad_clip",
    "schedule.steps_per_epoch",
    "text.vocab_size",
    "trainer.compile",
    "trainer.devices",
    "validation.every",
    "validation.max_images",
    "vision.image_size",
)
# Text, which may be empty where it is not a name or a place; and switches.
TEXTS = {
    "data.prompt": True,
    "data.root": False,
    "data.cache_dir": False,
    "run.dir": False,
    "run.name": False,
    "sweep.name": False,
}
TEXTS |= {"resume.from": False, "text.tokenizer": False, "vision.name": False}
TEXTS |= {"vision.weights": False, "qformer.init": False, "wandb.project": False}
TEXTS |= {"image_encoder.name": False, "image_encoder.weights": False}
TEXTS |= {"language_model.name": False, "language_model.tokenizer": False}
TEXTS |= {"language_model.end": False, "causal_lm.tokenizer": False, "causal_lm.end": False}
SWITCHES = (
    "data.allow_pipe",
    "trainer.deterministic",
    "trainer.overlap",
    "vision.drop_last_block",
    "vision.gradient_checkpointing",
    "vision.trainable",
    "qformer.gradient_checkpointing",
    "language_model.gradient_checkpointing",
    "image_encoder.gradient_checkpointing",
    "model.keep_text",
    "loss.itc.cache",
    "trainer.compile",
)
# Groups whose classes have defaults, and check what else they are given themselves.
GROUPS = (
    "vision.", "qformer.", "language_model.", "image_encoder.", "text_encoder.",
    "causal_lm.config.",
)  # fmt: skip


def value_problems(
    cfg: Mapping[str, Any],
    *,
    choices: Mapping[str, tuple[str, ...]] = CHOICES,
    counts: Mapping[str, int] = COUNTS,
    numbers: Mapping[str, tuple[float, float]] = NUMBERS,
    texts: Mapping[str, bool] = TEXTS,
    switches: tuple[str, ...] = SWITCHES,
    nullable: tuple[str, ...] = NULLABLE,
) -> list[str]:
    """A sentence for each value that its key cannot have; the tables are those of this module."""
    problems = []

    def absent(key: str) -> bool:
        return not has(cfg, key) or (key.startswith(GROUPS) and at(cfg, key) is None)

    for key, allowed in choices.items():
        value = at(cfg, key)
        if absent(key) or (value is None and key in nullable):
            continue
        if value not in allowed:
            problems.append(f"{key}={value} must be one of {', '.join(allowed)}")
    for key, may_be_empty in texts.items():
        value = at(cfg, key)
        if absent(key) or (value is None and key in nullable):
            continue
        if not isinstance(value, str) or not (value or may_be_empty):
            problems.append(f"{key}={value} must be text")
    for key in switches:
        value = at(cfg, key)
        if absent(key) or (value is None and key in nullable):
            continue
        if not isinstance(value, bool):
            problems.append(f"{key}={value} must be true or false")
    for key, least in counts.items():
        value = at(cfg, key)
        if absent(key) or (value is None and key in nullable):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            problems.append(f"{key}={value} must be a whole number of at least {least}")
    for key, (low, high) in numbers.items():
        value = at(cfg, key)
        if absent(key) or (value is None and key in nullable):
            continue
        values = value if key in PAIRS and isinstance(value, list) and len(value) == 2 else [value]
        fits = len(values) == (2 if key in PAIRS else 1)
        if not fits or not all(is_number(v) and low <= v <= high for v in values):
            what = "two numbers" if key in PAIRS else "a number"
            bound = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            problems.append(f"{key}={value} must be {what} {bound}")
    return problems


def at(cfg: Any, key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    for part in key.split("."):
        cfg = cfg.get(part) if isinstance(cfg, Mapping) else None
    return cfg


def has(cfg: Any, key: str) -> bool:
    """Whether there is such a dotted key, be it null."""
    *parents, last = key.split(".")
    inner = at(cfg, ".".join(parents)) if parents else cfg
    return isinstance(inner, Mapping) and last in inner


def is_number(value: Any) -> bool:
    """Whether it is a number (and not a truth value)."""
    return isinstance(value, int | float) and not isinstance(value, bool)
