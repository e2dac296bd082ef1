"""What a configuration means before anything is built: where it lives, rules across keys, batches.

No torch here: `blip2-train --help` must answer at once.
"""

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blip2_train.errors import UserError


def conf_dir() -> Path:
    """Folder of the YAML files: inside the installed package, or beside it in a checkout.

    Raises:
        UserError: neither place has them.
    """
    package = Path(__file__).resolve().parent
    places = [package / "conf", package.parent / "conf"]
    for place in places:
        if (place / "train.yaml").is_file():
            return place
    raise UserError(f"no configuration files in {places[0]} or {places[1]}; reinstall blip2-train")


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        rank: among all processes.
        local_rank: on this machine.
        world_size: all processes.
        local_world_size: processes on this machine.
        launcher: "torchrun", "slurm" or "" (this process alone).
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launcher: str = ""


def launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Reads what torchrun or srun put into the environment."""
    if "LOCAL_RANK" in environ and "WORLD_SIZE" in environ:
        world = int(environ["WORLD_SIZE"])
        return Launch(
            rank=int(environ["RANK"]),
            local_rank=int(environ["LOCAL_RANK"]),
            world_size=world,
            local_world_size=int(environ.get("LOCAL_WORLD_SIZE", world)),
            launcher="torchrun",
        )
    # srun sets these for each task; a shell inside an allocation (salloc, a notebook) has
    # SLURM_NTASKS too but no step of several tasks
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1 and "SLURM_PROCID" in environ:
        nodes = int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", 1)))
        return Launch(
            rank=int(environ["SLURM_PROCID"]),
            local_rank=int(environ["SLURM_LOCALID"]),
            world_size=tasks,
            local_world_size=tasks // nodes,
            launcher="slurm",
        )
    return Launch()


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut.

    Attributes:
        size: samples per optimizer step, over all devices.
        accumulate: contrastive batches per optimizer step.
        contrastive: samples that ITC and ITM compare with each other, size / accumulate.
        per_device: samples of one forward on one device.
        world_size: devices.
    """

    size: int
    accumulate: int
    contrastive: int
    per_device: int
    world_size: int

    def __str__(self) -> str:
        return (
            f"batch {self.size} = {self.accumulate} part(s) of {self.contrastive} = "
            f"{self.per_device} x {self.world_size} device(s) each; contrast compares "
            f"{self.contrastive} samples at a time"
        )


def plan_batch(size: int, accumulate: int, world_size: int) -> BatchPlan:
    """Cuts the global batch.

    Raises:
        UserError: it cannot be cut evenly; names the nearest sizes that can.
    """
    if accumulate < 1:
        raise UserError(f"batch.accumulate={accumulate} must be at least 1")
    unit = world_size * accumulate
    if size < 1 or size % unit:
        below, above = size // unit * unit, (max(size, 0) // unit + 1) * unit
        near = f"{below} or {above}" if below > 0 else f"{above}"
        raise UserError(
            f"batch.size={size} is not divisible by devices x batch.accumulate = "
            f"{world_size} x {accumulate} = {unit}; set batch.size={near}"
        )
    contrastive = size // accumulate
    return BatchPlan(size, accumulate, contrastive, contrastive // world_size, world_size)


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, every interpolation resolved.

    Raises:
        UserError: a required key (`???`) has no value, or an interpolation leads nowhere.
    """
    kinds = sorted(cfg.recipe.table)
    own = OmegaConf.is_missing(cfg, "kind") or cfg.kind is None  # None: the stage has its own
    if not own and cfg.kind not in kinds:
        raise UserError(f"kind={cfg.kind} is not a row of the recipe; its rows: {', '.join(kinds)}")
    try:
        plain: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        reason = str(error).splitlines()[0]
        raise UserError(f"{key}: {reason}" if key else reason) from error
    del plain["recipe"]  # its row was read through the other keys
    return plain


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
    "data.caption": ("uniform", "first", "weighted"),
    "data.decode": ("fast", "exact"),
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
    "text.max_tokens": 3,
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
    "data.crop_scale": (1e-6, 1),
    "data.flip": (0, 1),
    "data.max_skip_fraction": (0, 1),
    "loss.smoothing": (0, 1 - 1e-9),
    "loss.itc.smoothing": (0, 1 - 1e-9),
    "loss.lm.smoothing": (0, 1 - 1e-9),
    "loss.weights.itc": (0, math.inf),
    "loss.weights.itm": (0, math.inf),
    "loss.weights.lm": (0, math.inf),
    "model.temp": (0.001, 0.5),
    "optimizer.betas": (0, 1 - 1e-9),
    "optimizer.eps": (0, math.inf),
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
    "data.crop_scale",
    "optimizer.grad_clip",
    "schedule.steps_per_epoch",
    "text.vocab_size",
    "trainer.devices",
    "validation.every",
    "validation.max_images",
    "vision.image_size",
)
# Text, which may be empty where it is not a name or a place; and switches.
TEXTS = {"data.prompt": True, "data.root": False, "run.dir": False, "run.name": False}
TEXTS |= {"resume.from": False, "text.tokenizer": False, "vision.name": False}
TEXTS |= {"vision.weights": False, "qformer.init": False, "wandb.project": False}
TEXTS |= {"image_encoder.name": False, "image_encoder.weights": False}
TEXTS |= {"language_model.name": False, "language_model.tokenizer": False}
TEXTS |= {"language_model.end": False, "causal_lm.tokenizer": False, "causal_lm.end": False}
SWITCHES = (
    "trainer.deterministic",
    "vision.drop_last_block",
    "qformer.gradient_checkpointing",
    "language_model.gradient_checkpointing",
    "image_encoder.gradient_checkpointing",
    "model.keep_text",
)
# Groups whose classes have defaults, and check what else they are given themselves.
GROUPS = (
    "vision.", "qformer.", "language_model.", "image_encoder.", "text_encoder.",
    "causal_lm.config.",
)  # fmt: skip

# What every source of data.sources says.
SOURCE_KEYS = {"shards", "split", "weight", "randaugment"}


def validate(cfg: Mapping[str, Any], world_size: int = 1) -> None:
    """Rules for keys and across keys, all checked before anything is built.

    Args:
        cfg: resolved configuration, from `to_plain`.
        world_size: number of processes.

    Raises:
        UserError: with every problem found.
    """
    problems = _value_problems(cfg)

    def need(condition: bool, message: str) -> None:
        if not condition:
            problems.append(message)

    if _has(cfg, "loss.weights"):
        weights = _at(cfg, "loss.weights")
        need(
            isinstance(weights, Mapping) and any(weights.values()),
            f"loss.weights={weights}: at least one must be above 0",
        )
    if _at(cfg, "init") == "checkpoint":
        need(
            _at(cfg, "init_from") is not None,
            "stage 2 begins with a stage-1 checkpoint: give init_from=PATH, or init=random or "
            "init=bert for the ablation without stage 1",
        )
    elif _has(cfg, "init"):
        need(
            _at(cfg, "init_from") is None,
            f"init={_at(cfg, 'init')} and init_from={_at(cfg, 'init_from')} exclude each other",
        )
    need(bool(_at(cfg, "data.sources")), "data.sources is empty; name at least one source")
    for name, source in (_at(cfg, "data.sources") or {}).items():
        given = set(source or {})
        missing, unknown = sorted(SOURCE_KEYS - given), sorted(given - SOURCE_KEYS)
        need(not missing, f"data.sources.{name} has no {', '.join(missing)}")
        need(not unknown, f"data.sources.{name} has unknown keys: {', '.join(unknown)}")
    if _at(cfg, "stage") == "clip" and _is_number(temp := _at(cfg, "model.temp")):
        need(temp >= 0.01, f"model.temp={temp} must be at least 0.01, where clip keeps it")
    if _has(cfg, "causal_lm.config"):
        config = _at(cfg, "causal_lm.config")
        need(
            isinstance(config, Mapping) and "model_type" in config,
            f"causal_lm.config={config} names no model_type, such as opt or llama",
        )
    reader = {"stage1": "qformer", "clip": "text_encoder"}.get(str(_at(cfg, "stage")))
    tokens, positions = _at(cfg, "text.max_tokens"), _at(cfg, f"{reader}.max_positions")
    if _is_number(tokens) and _is_number(positions):
        need(
            tokens <= positions,
            f"text.max_tokens={tokens} exceeds {reader}.max_positions={positions}",
        )
    name = str(_at(cfg, "run.name"))
    need(
        "/" not in name and name not in ("", ".", ".."),
        f"run.name={name} must be a plain folder name; run.dir holds the path",
    )
    validation = _at(cfg, "data.validation") or {}
    need(
        _at(cfg, "validation.every") is None or {"shards", "split"} <= set(validation),
        "data.validation has no shards and split to validate on; set them or validation.every=null",
    )
    lowest, peak = _at(cfg, "schedule.min_lr"), _at(cfg, "optimizer.lr")
    if _is_number(lowest) and _is_number(peak):
        need(lowest <= peak, f"schedule.min_lr={lowest} exceeds optimizer.lr={peak}")
    size, accumulate = _at(cfg, "batch.size"), _at(cfg, "batch.accumulate")
    if isinstance(size, int) and isinstance(accumulate, int) and min(size, accumulate) > 0:
        try:
            plan_batch(size, accumulate, world_size)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))


def _value_problems(cfg: Mapping[str, Any]) -> list[str]:
    """A sentence for each value that its key cannot have."""
    problems = []

    def absent(key: str) -> bool:
        return not _has(cfg, key) or (key.startswith(GROUPS) and _at(cfg, key) is None)

    for key, allowed in CHOICES.items():
        if not absent(key) and (value := _at(cfg, key)) not in allowed:
            problems.append(f"{key}={value} must be one of {', '.join(allowed)}")
    for key, may_be_empty in TEXTS.items():
        value = _at(cfg, key)
        if absent(key) or (value is None and key in NULLABLE):
            continue
        if not isinstance(value, str) or not (value or may_be_empty):
            problems.append(f"{key}={value} must be text")
    for key in SWITCHES:
        if not absent(key) and not isinstance(value := _at(cfg, key), bool):
            problems.append(f"{key}={value} must be true or false")
    for key, least in COUNTS.items():
        value = _at(cfg, key)
        if absent(key) or (value is None and key in NULLABLE):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            problems.append(f"{key}={value} must be a whole number of at least {least}")
    for key, (low, high) in NUMBERS.items():
        value = _at(cfg, key)
        if absent(key) or (value is None and key in NULLABLE):
            continue
        values = value if key in PAIRS and isinstance(value, list) and len(value) == 2 else [value]
        fits = len(values) == (2 if key in PAIRS else 1)
        if not fits or not all(_is_number(v) and low <= v <= high for v in values):
            what = "two numbers" if key in PAIRS else "a number"
            bound = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            problems.append(f"{key}={value} must be {what} {bound}")
    return problems


def _at(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg.get(part) if isinstance(cfg, Mapping) else None
    return cfg


def _has(cfg: Any, key: str) -> bool:
    *parents, last = key.split(".")
    inner = _at(cfg, ".".join(parents)) if parents else cfg
    return isinstance(inner, Mapping) and last in inner


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def unknown_keys(cfg: DictConfig, keys: list[str]) -> list[str]:
    """A sentence for each key that the configuration does not have, with the closest one.

    Args:
        cfg: composed configuration.
        keys: dotted keys given on the command line.
    """
    known = sorted(dotted_keys(cfg))
    sentences = []
    for key in keys:
        if key in known:
            continue
        last = key.rsplit(".", 1)[-1]
        same = [k for k in known if k.rsplit(".", 1)[-1] == last]
        close = same or difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "see blip2-train --help"
        sentences.append(f"unknown key {key}; {hint}")
    return sentences


def dotted_keys(cfg: Any, prefix: str = "") -> set[str]:
    """Every key of a composed configuration, parents included, as "a.b.c"."""
    names: set[str] = set()
    if OmegaConf.is_dict(cfg):
        for key in cfg:
            name = f"{prefix}{key}"
            names.add(name)
            if OmegaConf.is_missing(cfg, key):
                continue
            child = cfg._get_node(key)
            if OmegaConf.is_interpolation(cfg, key):
                try:
                    child = cfg[key]
                except OmegaConfBaseException:
                    continue
            names |= dotted_keys(child, name + ".")
    return names


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {"a.b.c": value}; lists are values."""
    if not isinstance(cfg, Mapping):
        return {prefix.removesuffix("."): cfg}
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        flat |= flatten(value, f"{prefix}{key}.")
    return flat
