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
from blip2_train.rules import at, has, is_number, value_problems


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
        per_device: samples of a contrastive batch on one device.
        world_size: devices.
        parts: in which a device computes them, one after the other.
    """

    size: int
    accumulate: int
    contrastive: int
    per_device: int
    world_size: int
    parts: int = 1

    @property
    def at_a_time(self) -> int:
        """Samples whose activations one device holds."""
        return self.per_device // self.parts

    def __str__(self) -> str:
        return (
            f"batch {self.size} = {self.accumulate * self.parts} part(s) of "
            f"{self.at_a_time * self.world_size} = {self.at_a_time} x {self.world_size} device(s) "
            f"each; contrast compares {self.contrastive} samples at a time"
        )


def plan_batch(size: int, accumulate: int, world_size: int, *, cache: bool = False) -> BatchPlan:
    """Cuts the global batch.

    Args:
        size: samples per optimizer step, over all devices.
        accumulate: parts that a device computes one after the other.
        world_size: devices.
        cache: the parts are compared with each other, as one contrastive batch.

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
    if cache:
        return BatchPlan(size, 1, size, size // world_size, world_size, parts=accumulate)
    contrastive = size // accumulate
    return BatchPlan(size, accumulate, contrastive, contrastive // world_size, world_size)


def batch_plan(cfg: Mapping[str, Any], world_size: int) -> BatchPlan:
    """The plan of a resolved configuration.

    Raises:
        UserError: see `plan_batch`.
    """
    cache = cfg["stage"] == "stage1" and cfg["loss"]["itc"].get("cache", False)
    return plan_batch(cfg["batch"]["size"], cfg["batch"]["accumulate"], world_size, cache=cache)


def trains_tower(cfg: Mapping[str, Any]) -> bool:
    """Whether the image tower of stage 1 or 2 learns with the rest."""
    return at(cfg, "vision.trainable") is True


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


def lacks_checkpoint(cfg: Mapping[str, Any]) -> bool:
    """Whether a training should go on from a checkpoint, and none is given.

    So should stage 2, and stage 1 where a tower learns that a Q-Former reads already.
    """
    tuned = cfg["stage"] == "stage1" and trains_tower(cfg) and at(cfg, "qformer.init") != "random"
    return at(cfg, "init_from") is None and (tuned or at(cfg, "init") == "checkpoint")


def without_checkpoint(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A plain configuration with a name for a checkpoint that must be given, but is not read."""
    return {**cfg, "init_from": "CHECKPOINT"} if lacks_checkpoint(cfg) else dict(cfg)


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
    problems = value_problems(cfg)

    def need(condition: bool, message: str) -> None:
        if not condition:
            problems.append(message)

    if has(cfg, "loss.weights"):
        weights = at(cfg, "loss.weights")
        need(
            isinstance(weights, Mapping) and any(weights.values()),
            f"loss.weights={weights}: at least one must be above 0",
        )
    if lacks_checkpoint(cfg) and at(cfg, "init") == "checkpoint":
        problems.append(
            "stage 2 begins with a stage-1 checkpoint: give init_from=PATH, or init=random or "
            "init=bert for the ablation without stage 1"
        )
    elif lacks_checkpoint(cfg):
        problems.append(
            "vision.trainable=true goes on from a stage-1 checkpoint: give init_from=PATH, or "
            "qformer.init=random to begin with nothing"
        )
    elif at(cfg, "init") != "checkpoint" and has(cfg, "init"):
        need(
            at(cfg, "init_from") is None,
            f"init={at(cfg, 'init')} and init_from={at(cfg, 'init_from')} exclude each other",
        )
    need(bool(at(cfg, "data.sources")), "data.sources is empty; name at least one source")
    shares: dict[str, Any] = {}
    for name, source in (at(cfg, "data.sources") or {}).items():
        shares[name] = weight = (source or {}).get("weight")
        need(
            weight is None or (is_number(weight) and 0 < weight < math.inf),
            f"data.sources.{name}.weight={weight} must be a number above 0, or null",
        )
        given = set(source or {})
        missing, unknown = sorted(SOURCE_KEYS - given), sorted(given - SOURCE_KEYS)
        need(not missing, f"data.sources.{name} has no {', '.join(missing)}")
        need(not unknown, f"data.sources.{name} has unknown keys: {', '.join(unknown)}")
    need(
        len({weight is None for weight in shares.values()}) < 2,
        f"data.sources.*.weight are {shares}: null is a number of samples, which does not compare "
        "with shares; give all of them or none",
    )
    need(
        at(cfg, "data.mode") != "stream" or len(shares) == 1 or None not in shares.values(),
        "data.sources.*.weight must be numbers with data.mode=stream, where sizes are not known",
    )
    if at(cfg, "data.features") == "cached":
        problems += _cache_problems(cfg)
    problems += _tower_problems(cfg)
    if at(cfg, "vision.precision") == "float8":
        dtype, precision = at(cfg, "vision.dtype"), at(cfg, "trainer.precision")
        need(
            dtype == "bfloat16" and precision != "64-true",
            f"vision.precision=float8 gives features in bfloat16, which vision.dtype={dtype} and "
            f"trainer.precision={precision} do not go with; set vision.dtype=bfloat16 and "
            "trainer.precision=bf16-mixed or 32-true, or vision.precision=native",
        )
    if at(cfg, "stage") == "clip" and is_number(temp := at(cfg, "model.temp")):
        need(temp >= 0.01, f"model.temp={temp} must be at least 0.01, where clip keeps it")
    if has(cfg, "causal_lm.config"):
        config = at(cfg, "causal_lm.config")
        need(
            isinstance(config, Mapping) and "model_type" in config,
            f"causal_lm.config={config} names no model_type, such as opt or llama",
        )
    reader = {"stage1": "qformer", "clip": "text_encoder"}.get(str(at(cfg, "stage")))
    tokens, positions = at(cfg, "text.max_tokens"), at(cfg, f"{reader}.max_positions")
    if is_number(tokens) and is_number(positions):
        need(
            tokens <= positions,
            f"text.max_tokens={tokens} exceeds {reader}.max_positions={positions}",
        )
    problems += _question_problems(cfg)
    name = str(at(cfg, "run.name"))
    need(
        "/" not in name and name not in ("", ".", ".."),
        f"run.name={name} must be a plain folder name; run.dir holds the path",
    )
    validation = at(cfg, "data.validation") or {}
    need(
        at(cfg, "validation.every") is None or {"shards", "split"} <= set(validation),
        "data.validation has no shards and split to validate on; set them or validation.every=null",
    )
    lowest, peak = at(cfg, "schedule.min_lr"), at(cfg, "optimizer.lr")
    if is_number(lowest) and is_number(peak):
        need(lowest <= peak, f"schedule.min_lr={lowest} exceeds optimizer.lr={peak}")
    size, accumulate = at(cfg, "batch.size"), at(cfg, "batch.accumulate")
    if isinstance(size, int) and isinstance(accumulate, int) and min(size, accumulate) > 0:
        try:
            plan_batch(size, accumulate, world_size)  # a cache cuts at the same places
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))


def _tower_problems(cfg: Mapping[str, Any]) -> list[str]:
    """What a trained image tower cannot be together with, and what only such a one can have."""
    if not trains_tower(cfg):
        alone = {"vision.gradient_checkpointing": False, "optimizer.layer_decay": 1}
        return [
            f"{key}={str(at(cfg, key)).lower()} acts on a trained image tower of stage 1 or 2: set "
            f"vision.trainable=true, or {key}={str(without).lower()}"
            for key, without in alone.items()
            if at(cfg, key) not in (without, None)
        ]
    wanted = {
        "vision.dtype": ("float32", "its weights are trained in float32"),
        "vision.precision": ("native", "float8 is for weights that stay as they are"),
        "data.features": ("computed", "features that were computed before do not follow it"),
        "trainer.overlap": (False, "the next batch must see what this step makes of it"),
    }
    return [
        f"vision.trainable=true does not go with {key}={str(at(cfg, key)).lower()} ({why}): set "
        f"{key}={str(value).lower()}"
        for key, (value, why) in wanted.items()
        if at(cfg, key) != value
    ]


def _cache_problems(cfg: Mapping[str, Any]) -> list[str]:
    """What cached features, of one whole image each, cannot be trained with."""
    wanted: dict[str, Any] = {"data.crop_scale": None, "data.flip": 0, "data.mode": "indexed"}
    wanted |= {
        f"data.sources.{name}.randaugment": False
        for name, source in (at(cfg, "data.sources") or {}).items()
        if isinstance(source, Mapping)
    }
    changes = [
        f"{key}={'null' if value is None else str(value).lower()}"
        for key, value in wanted.items()
        if at(cfg, key) != value
    ]
    problems = []
    if changes:
        problems.append(
            "data.features=cached has whole images that nothing changes any more; set "
            + " ".join(changes)
        )
    if at(cfg, "stage") not in ("stage1", "stage2"):
        problems.append(
            f"stage={at(cfg, 'stage')} has no frozen image tower: data.features=computed"
        )
    return problems


def _question_problems(cfg: Mapping[str, Any]) -> list[str]:
    """What does not go with learning to answer questions, or only with that."""
    problems = []
    keep = at(cfg, "model.keep_text")
    if at(cfg, "init_text_from") is not None and not (keep and at(cfg, "init") == "checkpoint"):
        problems.append(
            f"init_text_from={at(cfg, 'init_text_from')} adds the Q-Former's text side to that of "
            "init_from: set init=checkpoint and model.keep_text=true, or leave it out"
        )
    if at(cfg, "data.text") != "questions":
        if keep and at(cfg, "model.vocab_size") is None:
            problems.append("model.vocab_size=null is read from text.tokenizer for questions alone")
        return problems
    wanted = {"model.keep_text": True, "text.prefix": "none", "data.mode": "indexed"}
    changes = [
        f"{key}={str(value).lower()}" for key, value in wanted.items() if at(cfg, key) != value
    ]
    if changes:
        problems.append(f"data.text=questions wants {' '.join(changes)}")
    prompt = at(cfg, "data.prompt")
    if isinstance(prompt, str) and prompt.count("{}") != 1:
        problems.append(
            f"data.prompt={prompt!r} must have one {{}}, where data.text=questions puts the "
            "question, as in 'Question: {} Answer:'"
        )
    tokens, positions = at(cfg, "text.max_question_tokens"), at(cfg, "qformer.max_positions")
    if is_number(tokens) and is_number(positions) and tokens > positions:
        problems.append(
            f"text.max_question_tokens={tokens} exceeds qformer.max_positions={positions}"
        )
    return problems


def unknown_keys(cfg: DictConfig, keys: list[str], command: str = "blip2-train") -> list[str]:
    """A sentence for each key that the configuration does not have, with the closest one.

    Args:
        cfg: composed configuration.
        keys: dotted keys given on the command line.
        command: its name.
    """
    known = sorted(dotted_keys(cfg))
    sentences = []
    for key in keys:
        if key in known:
            continue
        last = key.rsplit(".", 1)[-1]
        same = [k for k in known if k.rsplit(".", 1)[-1] == last]
        close = same or difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"see {command} --help"
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
