"""What a configuration means before anything is built: where it lives, rules across keys, batches.

No torch here: `blip2-train --help` must answer at once.
"""

import difflib
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
            f"batch {self.size} = {self.accumulate} contrastive batch(es) of {self.contrastive} "
            f"= {self.per_device} x {self.world_size} device(s) each"
        )


def plan_batch(size: int, accumulate: int, world_size: int) -> BatchPlan:
    """Cuts the global batch.

    Raises:
        UserError: it cannot be cut evenly; names the nearest sizes that can.
    """
    unit = world_size * accumulate
    if size < 1 or accumulate < 1 or size % unit:
        below, above = size // unit * unit, (size // unit + 1) * unit
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
    try:
        plain: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        reason = str(error).splitlines()[0]
        raise UserError(f"{key}: {reason}" if key else reason) from error
    table = plain.pop("recipe")["table"]
    if plain["kind"] not in table:
        raise UserError(f"kind={plain['kind']} is not a row of the recipe; rows: {sorted(table)}")
    return plain


def validate(cfg: Mapping[str, Any], world_size: int = 1) -> None:
    """Rules across keys, all checked before anything is built.

    Args:
        cfg: resolved configuration, from `to_plain`.
        world_size: number of processes.

    Raises:
        UserError: with every problem found.
    """
    problems: list[str] = []

    def need(condition: bool, message: str) -> None:
        if not condition:
            problems.append(message)

    def one_of(key: str, allowed: tuple) -> None:
        value: Any = cfg
        for part in key.split("."):
            value = value[part]
        need(value in allowed, f"{key}={value} must be one of {', '.join(map(str, allowed))}")

    def at_least(key: str, least: float, *, null: bool = False) -> None:
        value: Any = cfg
        for part in key.split("."):
            value = value[part]
        if value is None and null:
            return
        number = isinstance(value, int | float) and not isinstance(value, bool)
        need(number and value >= least, f"{key}={value} must be a number of at least {least}")

    one_of("loss.itc.gradient", ("reference", "full"))
    one_of("loss.normalise", ("global", "rank"))
    one_of("trainer.precision", ("32-true", "64-true", "bf16-mixed"))
    one_of("trainer.accelerator", ("auto", "cpu", "gpu"))
    one_of("vision.dtype", ("float32", "bfloat16"))
    one_of("data.caption", ("uniform", "first"))
    one_of("wandb.mode", ("auto", "online", "offline", "disabled"))
    for key in ("trainer.log_every", "checkpoint.every", "checkpoint.keep_last"):
        at_least(key, 1)
    for key in ("trainer.max_steps", "batch.size", "batch.accumulate", "validation.batch_size"):
        at_least(key, 1)
    for key in ("validation.every", "validation.max_images", "checkpoint.keep_every"):
        at_least(key, 1, null=True)
    for key in ("data.num_workers", "validation.rerank_k", "validation.samples"):
        at_least(key, 0)
    at_least("text.max_tokens", 3)
    at_least("text.bucket", 1)
    at_least("optimizer.grad_clip", 1e-12, null=True)
    for key in ("optimizer.lr", "optimizer.weight_decay", "optimizer.eps"):
        at_least(key, 0)
    for key in ("schedule.min_lr", "schedule.warmup_lr", "schedule.warmup_steps"):
        at_least(key, 0)
    at_least("schedule.steps_per_epoch", 1, null=True)
    weights = cfg["loss"]["weights"]
    need(
        any(weights.values()) and all(w >= 0 for w in weights.values()),
        f"loss.weights={weights} must not be negative, and at least one must be above 0",
    )
    for name in ("itc", "lm"):
        smoothing = cfg["loss"][name]["smoothing"]
        need(0 <= smoothing < 1, f"loss.{name}.smoothing={smoothing} must be in [0, 1)")
    need(bool(cfg["data"]["sources"]), "data.sources is empty; name at least one source")
    need(
        cfg["text"]["max_tokens"] <= cfg["qformer"]["max_positions"],
        f"text.max_tokens={cfg['text']['max_tokens']} exceeds qformer.max_positions="
        f"{cfg['qformer']['max_positions']}",
    )
    need(
        "/" not in str(cfg["run"]["name"]) and str(cfg["run"]["name"]) not in ("", ".", ".."),
        f"run.name={cfg['run']['name']} must be a plain folder name; run.dir holds the path",
    )
    try:
        plan_batch(int(cfg["batch"]["size"]), int(cfg["batch"]["accumulate"]), world_size)
    except UserError as error:
        problems.append(str(error))
    except (TypeError, ValueError):
        pass  # no number: said above
    if problems:
        raise UserError("; ".join(problems))


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


# -- what may change when a run is continued -------------------------------------------------------

# May change freely: where and on what it runs, what it logs, how much it keeps.
RESUME_FREE = (
    "run.",
    "resume.",
    "init_from",
    "batch.",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.log_every",
    "trainer.max_consecutive_skips",
    "data.root",
    "data.num_workers",
    "data.max_skip_fraction",
    "validation.",
    "checkpoint.",
    "wandb.",
)
# Never: another model, other data, other random numbers. That is another run.
RESUME_REFUSED = ("kind", "seed", "data.", "text.", "vision.", "qformer.", "model.")


def compare_for_resume(
    saved: Mapping[str, Any], current: Mapping[str, Any], allow: list[str]
) -> list[str]:
    """What changed since the checkpoint was written.

    Args:
        saved: the checkpoint's configuration.
        current: this start's.
        allow: keys (or their parents) that the user allows to change.

    Returns:
        A line "key: old -> new" for each permitted change.

    Raises:
        UserError: naming every change that is not permitted.
    """
    old, new = flatten(saved), flatten(current)
    permitted, problems = [], []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        change = f"{key}: {before} -> {after}"
        allowed = any(key == a or key.startswith(a + ".") for a in allow)
        where = key.startswith("data.sources.") and key.endswith(".shards")
        if key.startswith(RESUME_FREE) or where:
            permitted.append(change)
        elif key.startswith(RESUME_REFUSED):
            problems.append(f"{change} (another {key.split('.')[0]} is another run)")
        elif allowed:
            permitted.append(change)
        else:
            problems.append(f"{change} (permit it with resume.allow=[{key}])")
    if problems:
        raise UserError(
            "the run cannot be continued with a changed configuration: "
            + "; ".join(problems)
            + "; or give it a new run.name"
        )
    return permitted


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {"a.b.c": value}; lists are values."""
    if not isinstance(cfg, Mapping):
        return {prefix.removesuffix("."): cfg}
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        flat |= flatten(value, f"{prefix}{key}.")
    return flat
